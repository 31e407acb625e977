"""REINFORCE leave-one-out (arXiv 2402.14740, section 3.3), by TRL's RLOOTrainer.

    R         = reward - beta * sum over the answer's tokens of log pi/ref
    advantage = R - mean R of the other answers of its group
    loss      = - mean over answers of ratio * advantage,   ratio = pi(answer) / pi(answer) that sampled it

The whole answer is one action: no value model, no advantage of single tokens.

Deviation: the ratio, 1 with one update per batch, is clipped as in PPO where there are more (`updates_per_batch`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from alignment.methods.group_rl import GroupRlConfig, train_group_rl
from alignment.models import ModelFiles
from alignment.progress import SILENT, Log
from alignment.rewards import Task
from alignment.training import Trained

CODE_VERSION = "2"


class RlooConfig(GroupRlConfig):
    """Settings of RLOO; small groups suffice, since the baseline needs no standard deviation."""

    num_generations: int = Field(4, ge=2, description="Answers sampled to every prompt: the group they are compared in")
    beta: float = Field(0.05, ge=0, description="KL coefficient: higher stays closer to the SFT checkpoint")


def train_rloo(
    config: RlooConfig,
    sft: ModelFiles,
    reward_model: ModelFiles | None,
    tasks: Sequence[Task],
    *,
    work: Path,
    out: Path,
    log: Log = SILENT,
) -> tuple[Trained, dict[str, float]]:
    """Train the SFT checkpoint on `tasks`; the policy goes to `out/model`. Returns curves and final metrics."""
    from trl import RLOOConfig as TrlConfig
    from trl import RLOOTrainer

    def trainer(sampler, arguments, **kwargs):
        class SeededRlooTrainer(RLOOTrainer):
            # What GRPO's trainer takes as `rollout_func`.
            def _tokenize_prompts(self, prompts):
                return sampler.render(prompts), None, {}

            def _generate_single_turn(self, prompt_ids, *args, **kwargs):
                return sampler.sample(self, prompt_ids)

        return SeededRlooTrainer(args=arguments(TrlConfig), **kwargs)

    return train_group_rl("RLOO", trainer, config, sft, reward_model, tasks, work=work, out=out, log=log)
