"""What preference methods share: their common settings, the pairs they learn from, and the token ids of these."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from alignment.chat import answer_ids
from alignment.models import Config, LoadSettings, LoraSettings, LoraWithoutDropout
from alignment.records import PreferencePair
from alignment.sft import NothingToTrain
from alignment.training import OptimSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PairsConfig(Config):
    """Settings of every method that continues the SFT checkpoint on pairs; the defaults are those of the user's document."""

    beta: float = Field(0.1, gt=0, description="KL coefficient: higher stays closer to the SFT checkpoint")
    constitutional_pairs: int = Field(
        -1,
        ge=-1,
        description="Pairs of critique and revision to learn from: a seeded sample; -1 takes all, 0 none, so that people's "
        "comparisons alone are learnt from",
    )
    human_pairs: int = Field(
        0,
        ge=-1,
        description="Human comparisons that join the constitutional pairs: a seeded sample of those the reward model learns "
        "from, worked critiques left out; -1 takes all. They keep the policy helpful where nothing is harmful",
    )
    finetuning: Literal["lora", "full"] = Field("lora", description="Train an adapter, or all weights of a full SFT model")
    lora: LoraWithoutDropout = Field(
        LoraSettings(r=64, alpha=16, dropout=0.0, target_modules=["attention"]),
        description="The new adapter, where the SFT checkpoint is a full model; an SFT adapter keeps its own shape",
    )
    load: LoadSettings = Field(LoadSettings(), description="How base and SFT adapter are loaded")
    optim: OptimSettings = Field(
        OptimSettings(epochs=1, learning_rate=5e-7, batch_size=16, micro_batch_size=2), description="Training settings"
    )
    max_length: int = Field(512, ge=16, description="Prompt and answer are cut after this many tokens")

    @model_validator(mode="after")
    def _something_to_learn_from(self) -> PairsConfig:
        if not self.constitutional_pairs and not self.human_pairs:
            raise ValueError("constitutional_pairs and human_pairs are both 0: nothing is left to learn from")
        return self

    def reads(self, asset: str) -> bool:
        """Whether an input takes part: a data set of which no pair is wanted decides nothing."""
        wanted = {"constitutional_preference_pairs": self.constitutional_pairs, "human_preferences": self.human_pairs}
        return wanted.get(asset, -1) != 0


def training_pairs(
    constitutional: Sequence[PreferencePair],
    human: Sequence[PreferencePair],
    human_pairs: int,
    seed: int,
    constitutional_pairs: int = -1,
) -> list[PreferencePair]:
    """Samples of constitutional pairs and of human ones (-1: all), worked critiques left out, in a seeded order.

    The mixture is that of Constitutional AI (arXiv 2212.08073): its preference model learns harmlessness from the
    constitution and helpfulness from people.

    Raises:
        NothingToTrain: constitutional pairs are wanted and there are none, so that the policy would know nothing of its
            constitution; or only human ones are wanted, and there are none.
    """
    if constitutional_pairs and not constitutional:
        raise NothingToTrain(
            "there are no constitutional pairs. Remedy: look at the filter counts of the pairs asset, or learn from human pairs "
            "alone (constitutional_pairs: 0)."
        )
    rng = random.Random(seed)
    pool = [pair for pair in human if pair.source == "human"]
    people = rng.sample(pool, len(pool) if human_pairs < 0 else min(human_pairs, len(pool)))
    ours = list(constitutional)
    if 0 <= constitutional_pairs < len(ours):
        ours = rng.sample(ours, constitutional_pairs)
    pairs = [*ours, *people]
    if not pairs:
        raise NothingToTrain(
            "only human pairs are to be learnt from (constitutional_pairs: 0), and there are none. Remedy: add preferences to "
            "human_preferences; a constitution with preference_domains needs some of these."
        )
    rng.shuffle(pairs)
    return pairs


def tokenised_pairs(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[PreferencePair]) -> list[dict[str, list[int]]]:
    """Token ids of each pair: `prompt_ids`, and `chosen_ids` and `rejected_ids` with EOS and nothing after it.

    TRL's own rendering also scores and trains what a template writes after EOS, and turns special tokens that a text spells
    into special tokens.

    Raises:
        NothingToTrain: there are no pairs.
    """
    if not pairs:
        raise NothingToTrain("there are no preference pairs. Remedy: look at the filter counts of the pairs asset.")
    rows = []
    for pair in pairs:
        prompt, chosen = answer_ids(tokenizer, pair.prompt_messages, pair.chosen)
        _, rejected = answer_ids(tokenizer, pair.prompt_messages, pair.rejected)
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return rows


def with_room_for_an_answer(rows: Sequence[dict[str, list[int]]], max_length: int) -> list[dict[str, list[int]]]:
    """The rows of `tokenised_pairs` whose prompt leaves at least one token of `max_length` to the answer.

    Raises:
        NothingToTrain: there is none.
    """
    kept = [row for row in rows if len(row["prompt_ids"]) < max_length]
    if not kept:
        raise NothingToTrain(
            f"every one of {len(rows)} pairs has a prompt of max_length {max_length} tokens or more. Remedy: raise max_length."
        )
    return kept
