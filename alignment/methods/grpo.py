"""Group Relative Policy Optimization (arXiv 2402.03300, equation 3), by TRL's GRPOTrainer.

    advantage of an answer = (reward - mean of its group) / standard deviation of its group
    loss = - mean over answers of 1/|o| sum over tokens of
               min(ratio * advantage, clip(ratio, 1 - epsilon, 1 + epsilon) * advantage) - beta * KL
    KL   = ref/pi - log ref/pi - 1 (equation 4),   ratio = pi / pi that sampled the answer

Rewards are of outcomes (section 4.1.2). `loss_type` and `scale_rewards` offer what Dr. GRPO (arXiv 2503.20783) and DAPO
(arXiv 2503.14476) found better: without 1/|o| long bad answers are not spared, without the deviation easy and hard prompts
weigh no more than others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from alignment.methods.group_rl import GroupRlConfig, train_group_rl
from alignment.models import ModelFiles
from alignment.progress import SILENT, Log
from alignment.rewards import Task
from alignment.training import Trained

CODE_VERSION = "2"


class GrpoConfig(GroupRlConfig):
    """Settings of GRPO; beta is the paper's."""

    loss_type: Literal["grpo", "dapo", "dr_grpo"] = Field(
        "grpo",
        description="How tokens are averaged: within each answer (grpo, the paper's), over all tokens of the batch (dapo), or "
        "over answers of constant length (dr_grpo)",
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group", description="Advantages are divided by the rewards' standard deviation in the group, in the batch, or not"
    )


def train_grpo(
    config: GrpoConfig,
    sft: ModelFiles,
    reward_model: ModelFiles | None,
    tasks: Sequence[Task],
    *,
    work: Path,
    out: Path,
    log: Log = SILENT,
) -> tuple[Trained, dict[str, float]]:
    """Train the SFT checkpoint on `tasks`; the policy goes to `out/model`. Returns curves and final metrics."""
    from trl import GRPOConfig as TrlConfig
    from trl import GRPOTrainer

    def trainer(sampler, arguments, **kwargs):
        def rollout(prompts, trainer):
            ids = sampler.render(prompts)
            return {"prompt_ids": ids, "completion_ids": sampler.sample(trainer, ids), "logprobs": None}

        args = arguments(
            TrlConfig,
            loss_type=config.loss_type,
            scale_rewards=config.scale_rewards,
            use_bias_correction_kl=False,  # a later paper's: TRL multiplies the KL by the ratio unless told otherwise
        )
        return GRPOTrainer(args=args, rollout_func=rollout, **kwargs)

    return train_group_rl("GRPO", trainer, config, sft, reward_model, tasks, work=work, out=out, log=log)
