"""The table of methods: each entry carries its own facts, so nobody writes `if method ==` elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignment.constitutions import pairs_under
from alignment.methods.dpo import CODE_VERSION as DPO_VERSION
from alignment.methods.dpo import DpoConfig, train_dpo
from alignment.methods.group_rl import GroupRlConfig
from alignment.methods.grpo import CODE_VERSION as GRPO_VERSION
from alignment.methods.grpo import GrpoConfig, train_grpo
from alignment.methods.kto import CODE_VERSION as KTO_VERSION
from alignment.methods.kto import KtoConfig, train_kto
from alignment.methods.orpo import CODE_VERSION as ORPO_VERSION
from alignment.methods.orpo import OrpoConfig, train_orpo
from alignment.methods.pairs import PairsConfig, training_pairs
from alignment.methods.ppo import CODE_VERSION as PPO_VERSION
from alignment.methods.ppo import PpoConfig, train_ppo
from alignment.methods.rloo import CODE_VERSION as RLOO_VERSION
from alignment.methods.rloo import RlooConfig, train_rloo
from alignment.methods.sl_cai import CODE_VERSION as SL_CAI_VERSION
from alignment.methods.sl_cai import SlCaiConfig, train_sl_cai
from alignment.methods.tasks import training_tasks
from alignment.models import Config, ModelFiles
from alignment.progress import Log
from alignment.readers import read_records
from alignment.records import Conversation, PreferencePair
from alignment.training import Trained


@dataclass(frozen=True)
class Training:
    """What a method's training gets: the models and folders its inputs resolved to, and where to write.

    `models` holds the model inputs by asset name, `folders` the artifact folder of every input, `prompt_tags` the tags of the
    prompts that the constitution applies to, `preference_domains` the domains of human pairs that it learns from (empty: all).
    """

    models: Mapping[str, ModelFiles]
    folders: Mapping[str, Path]
    prompt_tags: Sequence[str]
    work: Path
    out: Path
    log: Log
    preference_domains: Sequence[str] = ()


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


def _sl_cai(config: SlCaiConfig, t: Training) -> tuple[Trained, dict[str, float]]:
    pairs = read_records(t.folders["constitutional_preference_pairs"] / "pairs.jsonl", PreferencePair)
    sides = (t.folders["sft_dataset"] / f"{side}.jsonl" for side in ("train", "heldout"))
    demonstrations, heldout = (read_records(path, Conversation) for path in sides)
    return train_sl_cai(config, t.models["sft_checkpoint"], pairs, demonstrations, heldout, work=t.work, out=t.out, log=t.log)


def _on_pairs(train: Callable[..., tuple[Trained, dict[str, float]]], start: str):
    """The `train` of a method that learns from pairs, begun at the input `start`."""

    def run(config: PairsConfig, t: Training) -> tuple[Trained, dict[str, float]]:
        constitutional = read_records(t.folders["constitutional_preference_pairs"] / "pairs.jsonl", PreferencePair)
        people = t.folders["human_preferences"] / "reward_train.jsonl"
        human = pairs_under(read_records(people, PreferencePair) if config.human_pairs else [], t.preference_domains)
        pairs = training_pairs(constitutional, human, config.human_pairs, config.optim.seed, config.constitutional_pairs)
        trained, metrics = train(config, t.models[start], pairs, work=t.work, out=t.out, log=t.log)
        return trained, metrics | {"train/human_pairs": sum(pair.source == "human" for pair in pairs)}

    return run


def _on_tasks(train: Callable[..., tuple[Trained, dict[str, float]]]):
    """The `train` of a method that samples answers to tasks and learns from their reward."""

    def run(config: GroupRlConfig, t: Training) -> tuple[Trained, dict[str, float]]:
        tasks = training_tasks(t.folders["prompts"], config.tasks, t.prompt_tags, config.max_tasks, config.optim.seed)
        sft, reward_model = t.models["sft_checkpoint"], t.models["reward_model"]
        return train(config, sft, reward_model, tasks, work=t.work, out=t.out, log=t.log)

    return run


def _ppo(config: PpoConfig, t: Training) -> tuple[Trained, dict[str, float]]:
    tasks = training_tasks(t.folders["prompts"], config.tasks, t.prompt_tags, 0, config.seed)
    sft, reward_model = t.models["sft_checkpoint"], t.models["reward_model"]
    return train_ppo(config, sft, reward_model, tasks, work=t.work, out=t.out, log=t.log)


_RL_CURVES = ("reward", "kl", "entropy", "zero_variance_groups")

METHODS: dict[str, Method] = {
    "sl_cai": Method(
        title="Supervised fine-tuning on revisions (SL-CAI)",
        inputs=("sft_checkpoint", "constitutional_preference_pairs", "sft_dataset"),
        start="sft_checkpoint",
        config=SlCaiConfig,
        code_version=SL_CAI_VERSION,
        curves=("loss", "mean_token_accuracy"),
        train=_sl_cai,
    ),
    "dpo": Method(
        title="Direct Preference Optimization",
        inputs=("sft_checkpoint", "constitutional_preference_pairs", "human_preferences"),
        start="sft_checkpoint",
        config=DpoConfig,
        code_version=DPO_VERSION,
        curves=("loss", "rewards/margins"),
        train=_on_pairs(train_dpo, "sft_checkpoint"),
    ),
    "kto": Method(
        title="Kahneman-Tversky Optimization",
        inputs=("sft_checkpoint", "constitutional_preference_pairs", "human_preferences"),
        start="sft_checkpoint",
        config=KtoConfig,
        code_version=KTO_VERSION,
        curves=("loss", "rewards/margins", "kl"),
        train=_on_pairs(train_kto, "sft_checkpoint"),
    ),
    "orpo": Method(
        title="Odds Ratio Preference Optimization",
        inputs=("base_model", "constitutional_preference_pairs", "human_preferences"),
        start="base_model",
        config=OrpoConfig,
        code_version=ORPO_VERSION,
        curves=("loss", "nll_loss", "log_odds_chosen"),
        train=_on_pairs(train_orpo, "base_model"),
    ),
    "ppo": Method(
        title="Proximal Policy Optimization with a critic",
        inputs=("sft_checkpoint", "reward_model", "prompts"),
        start="sft_checkpoint",
        config=PpoConfig,
        code_version=PPO_VERSION,
        curves=("objective/scores", "objective/kl", "critic/explained_variance", "eos_rate"),
        train=_ppo,
    ),
    "grpo": Method(
        title="Group Relative Policy Optimization",
        inputs=("sft_checkpoint", "reward_model", "prompts"),
        start="sft_checkpoint",
        config=GrpoConfig,
        code_version=GRPO_VERSION,
        curves=_RL_CURVES,
        train=_on_tasks(train_grpo),
    ),
    "rloo": Method(
        title="REINFORCE leave-one-out",
        inputs=("sft_checkpoint", "reward_model", "prompts"),
        start="sft_checkpoint",
        config=RlooConfig,
        code_version=RLOO_VERSION,
        curves=_RL_CURVES,
        train=_on_tasks(train_rloo),
    ),
}
