"""Rate answers on the helpfulness scale from 1 to 10 with a trained reward model (the user's document, exercise 3).

    python -m alignment.scorer <artifact>/model --prompt "How long do eggs boil?" --response "Seven minutes."
    python -m alignment.scorer <artifact>/model < rows.jsonl     # {"prompt": ..., "response": ...}; adds "helpfulness"

What the scale means is in `alignment.calibration`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from alignment.calibration import Calibration, read_calibration
from alignment.errors import UserError
from alignment.models import LoadSettings, ModelFiles, load_reward_model, load_tokenizer
from alignment.reward import score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Scorer:
    """A reward model in memory with its tokenizer and its calibration."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    calibration: Calibration

    @classmethod
    def load(cls, files: ModelFiles, settings: LoadSettings | None = None) -> Scorer:
        """Load a reward model as it was when it was calibrated, or with other settings.

        The text it reads is rendered with the chat template saved beside it, the one it was trained with.
        """
        folder = files.adapter or files.base
        calibration = read_calibration(folder)
        settings = settings or calibration.load
        tokenizer = load_tokenizer(folder, settings.trust_remote_code)
        model = load_reward_model(files, settings, tokenizer=tokenizer)
        return cls(model, tokenizer, calibration)

    def score(self, prompt: str, response: str) -> float:
        """Helpfulness of an answer, in [1, 10]."""
        return self.scores([(prompt, response)], batch_size=1)[0]

    def scores(self, answers: Sequence[tuple[str, str]], batch_size: int = 16) -> list[float]:
        """Helpfulness of each (prompt, response), in order. Rows that share a batch may differ in the last digits."""
        return [self.calibration.helpfulness(reward) for reward in self.rewards(answers, batch_size)]

    def rewards(self, answers: Sequence[tuple[str, str]], batch_size: int = 16) -> list[float]:
        """The reward model's own, unbounded score of each (prompt, response)."""
        told = [[{"role": "user", "content": p}, {"role": "assistant", "content": r or " "}] for p, r in answers]
        return score(self.model, self.tokenizer, told, batch_size)


def scorer_files(folder: Path, base: Path | None = None) -> ModelFiles:
    """The files of a reward model's folder; an adapter's base is `base`, or where the adapter says that it was.

    Raises:
        UserError: no model lies there, or the adapter's base is not where it was.
    """
    settings = folder / "adapter_config.json"
    if not settings.is_file():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: holds no model. Remedy: name the folder `model` of a reward model's artifact.")
        return ModelFiles(folder)
    base = base or Path(json.loads(settings.read_text(encoding="utf-8"))["base_model_name_or_path"])
    if not (base / "config.json").is_file():
        raise UserError(
            f"{folder}: is an adapter, and its base model is not in {base}. Remedy: name the base's folder with --base."
        )
    return ModelFiles(base, folder)


def main() -> None:
    """Command line: one pair from the arguments, or JSON lines from the standard input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the folder `model` of a reward model's artifact")
    parser.add_argument("--base", type=Path, help="the base model's folder, if it is not where it was in training")
    parser.add_argument("--prompt", help="what the user says")
    parser.add_argument("--response", help="the answer to rate")
    parser.add_argument("--batch-size", type=int, default=1, help="rows scored at once; 1 gives the same digits in any order")
    arguments = parser.parse_args()
    if (arguments.prompt is None) != (arguments.response is None):
        parser.error("--prompt and --response go together")
    try:
        if arguments.prompt is not None:
            rows = [{"prompt": arguments.prompt, "response": arguments.response}]
        else:
            rows = [_row(number, line) for number, line in enumerate(sys.stdin, start=1) if line.strip()]
        scorer = Scorer.load(scorer_files(arguments.model, arguments.base))
    except UserError as error:
        sys.exit(str(error))
    rated = scorer.scores([(row["prompt"], row["response"]) for row in rows], arguments.batch_size)
    for row, helpfulness in zip(rows, rated, strict=True):
        print(json.dumps({**row, "helpfulness": helpfulness}, ensure_ascii=False))


def _row(number: int, line: str) -> dict:
    try:
        row = json.loads(line)
        if isinstance(row["prompt"], str) and isinstance(row["response"], str):
            return row
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(
        f'standard input, line {number}: is not {{"prompt": "...", "response": "..."}}. Remedy: one such JSON object a line.'
    )


if __name__ == "__main__":
    main()
