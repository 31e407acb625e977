"""Supervised learning from a constitution (arXiv 2212.08073, section 3): fine-tuning on the critic's revisions.

The SFT checkpoint is trained on with cross-entropy on the revisions (the chosen side of the constitutional pairs), among
them demonstrations, which keep it helpful where nothing is harmful. The training itself is `alignment.sft`.

Deviations: demonstrations are people's, where the paper samples them from a model; the revisions of all rounds but the last
are left out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from alignment.models import ModelFiles
from alignment.progress import SILENT, Log
from alignment.records import Conversation, Message, PreferencePair
from alignment.sft import NothingToTrain, SftConfig, train_sft
from alignment.training import OptimSettings, Trained

CODE_VERSION = "2"


class SlCaiConfig(SftConfig):
    """Settings of SL-CAI: those of supervised fine-tuning (`lora` only where the SFT checkpoint is a full model), and a mix."""

    demonstrations: int = Field(
        100, ge=-1, description="Demonstrations that join the revisions: a seeded sample without worked critiques; -1 takes all"
    )
    optim: OptimSettings = Field(
        OptimSettings(epochs=1, learning_rate=1e-4, batch_size=8, micro_batch_size=2), description="Training settings"
    )


def train_sl_cai(
    config: SlCaiConfig,
    sft: ModelFiles,
    pairs: Sequence[PreferencePair],
    demonstrations: Sequence[Conversation],
    heldout: Sequence[Conversation],
    *,
    work: Path,
    out: Path,
    log: Log = SILENT,
) -> tuple[Trained, dict[str, float]]:
    """Train the SFT checkpoint on the revisions and some demonstrations; the policy goes to `out/model`.

    Returns curves and the metrics of `train_sft`, whose held-out loss tells whether it forgets the demonstrations.
    """
    rows = training_conversations(pairs, demonstrations, config.demonstrations, config.optim.seed)
    trained, metrics = train_sft(config, sft, rows, heldout, work=work, out=out, log=log, what="SL-CAI")
    return trained, metrics | {"train/revisions": len(pairs), "train/demonstrations": len(rows) - len(pairs)}


def training_conversations(
    pairs: Sequence[PreferencePair], demonstrations: Sequence[Conversation], count: int, seed: int
) -> list[Conversation]:
    """The revision of every pair and `count` demonstrations (-1: all), worked critiques left out, in a seeded order.

    Raises:
        NothingToTrain: there are no pairs.
    """
    if not pairs:
        raise NothingToTrain("there are no revisions. Remedy: look at the filter counts of the pairs asset.")
    rng = random.Random(seed)
    pool = [c for c in demonstrations if c.category != "critique"]
    rows = [_revision(p) for p in pairs] + rng.sample(pool, len(pool) if count < 0 else min(count, len(pool)))
    rng.shuffle(rows)
    return rows


def _revision(pair: PreferencePair) -> Conversation:
    turns = (*pair.history, Message(role="user", content=pair.prompt), Message(role="assistant", content=pair.chosen))
    return Conversation(id=f"{pair.id}-revision", messages=turns, category="revision")
