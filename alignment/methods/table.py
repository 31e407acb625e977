"""The table of methods: each entry carries its own facts, so nobody writes `if method ==` elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignment.methods.dpo import CODE_VERSION as DPO_VERSION
from alignment.methods.dpo import DpoConfig, dpo_training_pairs, train_dpo
from alignment.models import Config, ModelFiles
from alignment.progress import Log
from alignment.readers import read_preferences
from alignment.training import Trained


@dataclass(frozen=True)
class Training:
    """What a method's training gets: the models and folders its inputs resolved to, and where to write.

    `models` holds the model inputs by asset name, `folders` the artifact folder of every input, `prompt_tags` the tags of the
    prompts that the constitution applies to.
    """

    models: Mapping[str, ModelFiles]
    folders: Mapping[str, Path]
    prompt_tags: Sequence[str]
    work: Path
    out: Path
    log: Log


@dataclass(frozen=True)
class Method:
    """One way to align a policy.

    Attributes:
        title: the method's name for people.
        inputs: asset names it is trained from.
        start: the input its adapter continues from (the policy before training).
        config: its configuration class.
        code_version: part of the fingerprint; raised when the method's result changes.
        curves: metrics plotted inline in Dagster.
        train: trains, writes `out/model`, returns curves and final metrics.
    """

    title: str
    inputs: tuple[str, ...]
    start: str
    config: type[Config]
    code_version: str
    curves: tuple[str, ...]
    train: Callable[[Config, Training], tuple[Trained, dict[str, float]]]


def _dpo(config: DpoConfig, t: Training) -> tuple[Trained, dict[str, float]]:
    constitutional = read_preferences(t.folders["constitutional_preference_pairs"] / "pairs.jsonl")
    human = read_preferences(t.folders["human_preferences"] / "reward_train.jsonl") if config.human_pairs else []
    pairs = dpo_training_pairs(constitutional, human, config)
    trained, metrics = train_dpo(config, t.models["sft_checkpoint"], pairs, work=t.work, out=t.out, log=t.log)
    return trained, metrics | {"train/human_pairs": len(pairs) - len(constitutional)}


METHODS: dict[str, Method] = {
    "dpo": Method(
        title="Direct Preference Optimization",
        inputs=("sft_checkpoint", "constitutional_preference_pairs", "human_preferences"),
        start="sft_checkpoint",
        config=DpoConfig,
        code_version=DPO_VERSION,
        curves=("loss", "rewards/margins"),
        train=_dpo,
    ),
}
