"""Checks a constitution before it is used: is the file right, and are there prompts for it?

    python -m alignment.constitution_check conf/constitutions/cooking.yaml [--prompts FILE ...] [--recipe FILE]

Ends with exit code 1, and one sentence, if the file is wrong or not a single prompt would be criticised under it.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from alignment.constitutions import ConstitutionError, load_constitution, prompts_to_criticise, prompts_under
from alignment.critique import CritiqueConfig
from alignment.datasets import PromptsConfig
from alignment.errors import UserError
from alignment.readers import read_prompts
from alignment.recipes import load_recipe
from alignment.splits import split_of

ENOUGH = 20
"""With fewer prompts, a few filtered revisions leave no pair to train on."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("constitution", type=Path)
    parser.add_argument("--prompts", type=Path, nargs="+", default=[Path("data/prompts.jsonl")])
    parser.add_argument("--recipe", type=Path, default=Path("conf/recipes/demo.yaml"))
    given = parser.parse_args(arguments)
    try:
        print("\n".join(check(given.constitution, given.prompts, given.recipe)))
    except UserError as error:
        sys.exit(str(error))


def check(path: Path, sources: Sequence[Path], recipe: Path) -> list[str]:
    """What there is to say about a constitution, line by line.

    Raises:
        UserError: a file that cannot be used; or no prompt is left to criticise answers to.
    """
    rules = load_constitution(path)
    values = load_recipe(recipe)
    critique = values.config("constitutional_preference_pairs", CritiqueConfig)
    heldout_fraction = values.config("prompts", PromptsConfig).heldout_fraction
    prompts = [p for source in sources for p in read_prompts(source)]
    ours = prompts_under(prompts, rules, ())
    train = [p for p in ours if split_of(p.prompt, heldout_fraction) == "train"]
    asked = prompts_to_criticise(train, rules, critique.prompt_tags)
    if not asked:
        raise ConstitutionError(
            f"{path}: of {len(train)} training prompts with one of the tags {list(rules.prompt_tags)} none would be criticised. "
            "Remedy: add prompts with such a tag, or set critique_tags."
        )
    intents = Counter(tag for p in asked for tag in p.tags if tag not in rules.prompt_tags)
    lines = [
        f"{rules.name}: {len(rules.principles)} principles: {', '.join(p.id for p in rules.principles)}",
        f"prompts with its tags: {len(train)} for training, {len(ours) - len(train)} held out for the reports",
        f"criticised in training: {len(asked)} ({', '.join(f'{n} {tag}' for tag, n in intents.most_common())})",
    ]
    if len(rules.principles) < critique.rounds:
        lines.append(f"warning: {critique.rounds} rounds were asked for, and each takes a principle of its own; add principles")
    if len(asked) < ENOUGH:
        lines.append(f"warning: fewer than {ENOUGH} prompts are criticised; add prompts, or widen critique_tags")
    if len(train) == len(ours):
        lines.append("warning: no prompt is held out, so nothing can be reported on; add prompts")
    return lines


if __name__ == "__main__":
    main()
