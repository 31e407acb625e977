"""Checks a constitution before it is used: is the file right, and are there prompts for it?

    python -m alignment.constitution_check conf/constitutions/cooking.yaml [--prompts FILE ...] [--recipe FILE]

Without --prompts, the prompts are those of the recipe. Ends with exit code 1, and one sentence, if the file is wrong or not a
single prompt would be criticised under it.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from alignment.constitutions import ConstitutionError, load_constitution, prompts_to_criticise, prompts_under
from alignment.critique import CritiqueConfig
from alignment.datasets import PromptsConfig
from alignment.errors import UserError
from alignment.evaluation import SftReportConfig
from alignment.pair_filters import HARMLESS
from alignment.promotion import GateConfig
from alignment.readers import read_prompts
from alignment.recipes import Recipe, load_recipe
from alignment.records import Prompt
from alignment.splits import split_of

RECIPES = Path(__file__).resolve().parents[1] / "conf" / "recipes"

ENOUGH = 20
"""With fewer prompts, a few filtered revisions leave no pair to train on."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("constitution", type=Path)
    parser.add_argument("--prompts", type=Path, nargs="+")
    parser.add_argument("--recipe", type=Path, default=RECIPES / "demo.yaml")
    given = parser.parse_args(arguments)
    try:
        print("\n".join(check(given.constitution, given.prompts, given.recipe)))
    except UserError as error:
        sys.exit(str(error))


def check(path: Path, sources: Sequence[Path] | None, recipe: Path) -> list[str]:
    """What there is to say about a constitution, line by line.

    Args:
        sources: files of prompts; None: those of the recipe.

    Raises:
        UserError: a file that cannot be used; or no prompt is left to criticise answers to.
    """
    rules = load_constitution(path)
    values = load_recipe(recipe, shipped=RECIPES)
    critique = values.config("constitutional_preference_pairs", CritiqueConfig)
    data = values.config("prompts", PromptsConfig)
    prompts = [p for source in sources or map(os.path.expanduser, data.prompts) for p in read_prompts(source)]
    ours = prompts_under(prompts, rules, ())
    train, heldout = ([p for p in ours if split_of(p.prompt, data.heldout_fraction) == side] for side in ("train", "heldout"))
    asked = prompts_to_criticise(train, rules, critique.prompt_tags)
    if not asked:
        raise ConstitutionError(
            f"{path}: of {len(train)} training prompts with one of the tags {list(rules.prompt_tags)} none would be criticised. "
            "Remedy: add prompts with such a tag, or set critique_tags."
        )
    intents = Counter(tag for p in asked for tag in p.tags if tag not in rules.prompt_tags)
    lines = [
        f"{rules.name}: {len(rules.principles)} principles: {', '.join(p.id for p in rules.principles)}",
        f"prompts with its tags: {len(train)} for training, {len(heldout)} held out for the reports",
        f"criticised in training: {len(asked)} ({', '.join(f'{n} {tag}' for tag, n in intents.most_common())})",
    ]
    if len(rules.principles) < critique.rounds:
        lines.append(f"warning: {critique.rounds} rounds were asked for, and each takes a principle of its own; add principles")
    if len(asked) < ENOUGH:
        lines.append(f"warning: fewer than {ENOUGH} prompts are criticised; add prompts, or widen critique_tags")
    return lines + _of_the_reports(heldout, values)


def _of_the_reports(heldout: Sequence[Prompt], values: Recipe) -> list[str]:
    # What would come out only after training: that nothing can be reported on, or nothing promoted.
    if not heldout:
        return ["warning: no prompt is held out, so nothing can be reported on; add prompts"]
    compared = len(heldout[: values.config("sft_report", SftReportConfig).max_prompts or None])
    needed = values.config("champion", GateConfig).min_prompts
    lines = []
    if compared < needed:
        lines.append(
            f"warning: {compared} held-out prompts would be compared, and the gate asks for {needed} (champion.min_prompts): no "
            "policy would be promoted; add prompts"
        )
    if not any(HARMLESS & set(p.tags) for p in heldout):
        lines.append(
            f"warning: no held-out prompt is tagged {' or '.join(sorted(HARMLESS))}: over-refusal could not be measured, and no "
            "policy would be promoted; add such prompts"
        )
    return lines


if __name__ == "__main__":
    main()
