"""What GRPO and RLOO share: a group of answers to every prompt is sampled, scored, and compared within itself.

TRL's trainers compute advantages and losses. Three things are ours, the same for both:

- sampling, by `alignment.generation`: prompts are rendered as in all other stages, and every answer has a seed made of the
  run's seed, the step and its place, so that a resumed run samples what an uninterrupted one would have;
- the reward, the weighted sum of `alignment.rewards`, and from it the share of groups whose answers all score the same;
- the order of the tasks, laid out for the whole run before it starts.

The policy starts at the SFT checkpoint, which is the reference, too, as in `dpo`.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from alignment.chat import prompt_ids
from alignment.cpu import speed_up
from alignment.fingerprint import layout
from alignment.generation import SamplingSettings, completion, sample_ids
from alignment.methods.tasks import TaskKind
from alignment.models import (
    Config,
    LoadSettings,
    LoraSettings,
    LoraWithoutDropout,
    ModelFiles,
    load_for_training,
    load_reward_model,
    load_tokenizer,
    resolve_dtype,
    save_model,
)
from alignment.progress import Log
from alignment.rewards import RewardFunction, RewardWeights, Rollout, Task, model_reward, reward_functions, total_rewards
from alignment.sft import NothingToTrain
from alignment.training import OptimSettings, Trained, run_trainer, trainer_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

# With beta 0 TRL has no reference and measures no KL. This weight is too small to change any float32 loss.
MEASURED_ONLY = 1e-12
SAME_REWARD = 1e-4


class GroupRlConfig(Config):
    """Settings that GRPO and RLOO share. `optim` counts answers: batch_size / num_generations prompts a step."""

    rewards: RewardWeights = Field(RewardWeights(), description="What is maximised")
    tasks: TaskKind = Field("prompts", description="Train on the constitution's prompts, on problems with answers, or on both")
    max_tasks: int = Field(0, ge=0, description="Train on at most this many tasks, a seeded sample; 0 takes all")
    max_prompt_length: int = Field(512, ge=16, description="Tasks with a longer prompt (tokens) are dropped and counted")
    num_generations: int = Field(8, ge=2, description="Answers sampled to every prompt: the group they are compared in")
    temperature: float = Field(1.0, gt=0, description="Softmax temperature of sampling; the whole vocabulary is sampled from")
    max_new_tokens: int = Field(128, ge=1, description="An answer is cut after this many tokens")
    missing_eos_penalty: float = Field(
        0.0, ge=0, description="Taken off the reward of an answer that was cut at its length limit"
    )
    beta: float = Field(0.04, ge=0, description="KL coefficient: higher stays closer to the SFT checkpoint")
    updates_per_batch: int = Field(1, ge=1, description="Optimiser steps on each batch of answers (the paper's mu)")
    epsilon: float = Field(
        0.2, gt=0, lt=1, description="Probability ratios are clipped to 1 +- this; they are 1 unless updates_per_batch is more"
    )
    finetuning: Literal["lora", "full"] = Field("lora", description="Train an adapter, or all weights of a full SFT model")
    lora: LoraWithoutDropout = Field(
        LoraSettings(r=64, alpha=16, dropout=0.0, target_modules=["attention"]),
        description="The new adapter, where the SFT checkpoint is a full model; an SFT adapter keeps its own shape",
    )
    load: LoadSettings = Field(LoadSettings(), description="How base, SFT adapter and reward model are loaded")
    optim: OptimSettings = Field(
        OptimSettings(epochs=1, learning_rate=1e-5, scheduler="constant_with_warmup", batch_size=32, micro_batch_size=8),
        description="Training settings; a row is an answer, an epoch a pass over the tasks",
    )
    sample_batch_size: int = Field(64, ge=1, **layout("Answers sampled at once"))
    score_batch_size: int = Field(32, ge=1, **layout("Answers the reward model scores at once"))

    @model_validator(mode="after")
    def _whole_groups_and_batches(self) -> GroupRlConfig:
        if self.optim.batch_size % self.num_generations:
            raise ValueError(
                f"optim.batch_size {self.optim.batch_size} must be a multiple of num_generations {self.num_generations}"
            )
        if self.optim.save_every % self.updates_per_batch:
            raise ValueError(
                f"optim.save_every {self.optim.save_every} must be a multiple of updates_per_batch {self.updates_per_batch}: "
                "sampled answers are not kept for a killed run"
            )
        return self


class Sampler:
    """Answers from the policy at work: a function of its weights, the run's seed, the step and the answer's place."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: GroupRlConfig) -> None:
        self._tokenizer, self._seed = tokenizer, config.optim.seed
        self._settings = SamplingSettings(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=0,  # the log-probabilities that the loss compares are those of the whole softmax
            batch_size=config.sample_batch_size,
        )

    def render(self, prompts: Sequence[Sequence[Mapping[str, str]]]) -> list[list[int]]:
        """Token ids of conversations that the policy is to continue."""
        return [prompt_ids(self._tokenizer, [dict(message) for message in prompt]) for prompt in prompts]

    def sample(self, trainer: Trainer, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Token ids of one answer to each of this process's prompts (ids), EOS included."""
        step, first = trainer.state.global_step, trainer.accelerator.process_index * len(prompts)
        seeds = [_seed(self._seed, step, first + i) for i in range(len(prompts))]
        policy = trainer.accelerator.unwrap_model(trainer.model)
        model = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        with trainer.accelerator.autocast():
            answers = sample_ids(model, self._tokenizer, prompts, self._settings, seeds=seeds)
        policy.train()
        return answers


def train_group_rl(
    method: str,
    make_trainer: Callable[..., Trainer],
    config: GroupRlConfig,
    sft: ModelFiles,
    reward_model: ModelFiles | None,
    tasks: Sequence[Task],
    *,
    work: Path,
    out: Path,
    log: Log,
) -> tuple[Trained, dict[str, float]]:
    """Train the SFT checkpoint on `tasks`; the policy goes to `out/model`. Returns curves and final metrics.

    Args:
        make_trainer: makes TRL's trainer of a `Sampler`, of a function that fills its config class (and takes more settings
            for it), and of keyword arguments that are its own.
    """
    from datasets import Dataset

    speed_up()
    tokenizer = load_tokenizer(sft.base, config.load.trust_remote_code)
    sampler = Sampler(tokenizer, config)
    rendered = sampler.render([task.messages for task in tasks])
    fitting = [task for task, ids in zip(tasks, rendered, strict=True) if len(ids) <= config.max_prompt_length]
    if not fitting:
        raise NothingToTrain(
            f"none of {len(tasks)} tasks has a prompt of at most max_prompt_length {config.max_prompt_length} tokens. "
            "Remedy: raise max_prompt_length, or give tasks."
        )
    functions = reward_functions(config.rewards, _of_model(config, reward_model))
    model, adapter = load_for_training(sft, finetuning=config.finetuning, lora=config.lora, load=config.load)
    order = task_order(len(fitting), config)
    arguments = partial(
        trainer_arguments,
        optim=config.optim,
        work=work,
        dtype=config.load.dtype,
        num_train_epochs=1,
        shuffle_dataset=False,
        disable_dropout=True,
        num_generations=config.num_generations,
        num_iterations=config.updates_per_batch,
        max_completion_length=config.max_new_tokens,
        temperature=config.temperature,
        beta=config.beta or MEASURED_ONLY,
        epsilon=config.epsilon,
    )
    trainer = make_trainer(
        sampler,
        arguments,
        model=model,
        peft_config=adapter,
        reward_funcs=_total(functions, fitting, tokenizer, config),
        train_dataset=Dataset.from_list([{"prompt": list(fitting[i].messages), "task": i} for i in order]),
        processing_class=tokenizer,
    )
    trained = run_trainer(trainer, work, log, method)
    save_model(trainer.model, tokenizer, out / "model", resolve_dtype(config.load.dtype))
    metrics = {
        "train/loss": trained.mean("loss"),
        "train/loss_last": trained.last("loss"),
        "train/tasks": len(fitting),
        "train/tasks_dropped_too_long": len(tasks) - len(fitting),
        "train/reward_first": trained.first("reward"),
        "train/reward_last": trained.last("reward"),
        **{f"train/{name}_last": trained.last(f"rewards/{name}") for name in functions},
        "train/kl_last": trained.last("kl"),
        "train/entropy_last": trained.last("entropy"),
        "train/zero_variance_groups_last": trained.last("zero_variance_groups"),
        "train/clipped_completions_last": trained.last("completions/clipped_ratio"),
        "train/mean_length_last": trained.last("completions/mean_length"),
        "train/max_new_tokens": config.max_new_tokens,
    }
    return trained, {k: v for k, v in metrics.items() if math.isfinite(v)}


def task_order(tasks: int, config: GroupRlConfig) -> list[int]:
    """The tasks of the whole run, one after the other: pass by pass in a seeded order, up to whole steps.

    One epoch of the trainer covers all passes, since a trainer that resumes in a later epoch sees another order.
    """
    rng = random.Random(config.optim.seed)
    per_step = config.optim.batch_size // config.num_generations
    count = max(round(config.optim.epochs * tasks / per_step), 1) * per_step
    order: list[int] = []
    while len(order) < count:
        order += rng.sample(range(tasks), tasks)
    return order[:count]


def _of_model(config: GroupRlConfig, files: ModelFiles | None) -> RewardFunction | None:
    if files is None or not config.rewards.reward_model:
        return None
    tokenizer = load_tokenizer(files.base, config.load.trust_remote_code)
    return model_reward(load_reward_model(files, config.load, tokenizer=tokenizer), tokenizer, config.score_batch_size)


def _total(
    functions: Mapping[str, tuple[float, RewardFunction]],
    tasks: Sequence[Task],
    tokenizer: PreTrainedTokenizerBase,
    config: GroupRlConfig,
) -> Callable[..., list[float]]:
    # One function for TRL: its own sum passes over an answer that nothing can judge, and its share of groups without
    # variance counts the KL penalty (RLOO), which always varies.
    def total(completion_ids: Sequence[list[int]], task: Sequence[int], log_metric: Callable, **_: Any) -> list[float]:
        answers = [completion(tokenizer, ids) for ids in completion_ids]
        rollouts = [Rollout(tasks[i], a.text, a.ended) for i, a in zip(task, answers, strict=True)]
        totals, values = total_rewards(functions, rollouts)
        totals = [t - config.missing_eos_penalty * (not r.ended) for t, r in zip(totals, rollouts, strict=True)]
        for name, of_function in values.items():
            applies = [v for v in of_function if not math.isnan(v)]
            if applies:
                log_metric(f"rewards/{name}", sum(applies) / len(applies))
        groups = [totals[i : i + config.num_generations] for i in range(0, len(totals), config.num_generations)]
        log_metric("zero_variance_groups", sum(max(g) - min(g) < SAME_REWARD for g in groups) / len(groups))
        return totals

    return total


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 1
