"""Proximal Policy Optimization with a critic, stage 3 of RLHF (arXiv 1707.06347, 2203.02155; details as in 2403.17031).

One step: the policy answers a batch of prompts; reward functions score the answers; every token is charged its divergence
from the SFT checkpoint (`kl_coef`), the last one gets the score on top; GAE makes advantages of rewards and the critic's
values; policy and critic then improve on this batch for several epochs of mini-batches, with clipped losses.

Deviations from the papers, each on purpose:

- policy and critic share no weights and AdamW is blind to a loss's scale, so a coefficient of the value loss would only shift
  the common gradient norm: the critic has a learning rate of its own instead, and each is clipped by its own norm;
- losses are means over the tokens of a mini-batch, however it is cut into micro-batches;
- dropout is off, so that the ratio of the first pass is exactly 1.

Where adapters sit on the last layers only, those below are computed once per answer and step (`alignment.methods.frozen_layers`).

A killed run goes on from its last checkpoint and ends as if nothing had happened: everything random follows from (seed, step,
row), and nothing else is carried along but weights, optimiser moments and the KL coefficient.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from alignment.chat import prompt_ids
from alignment.cpu import speed_up
from alignment.fingerprint import layout
from alignment.generation import SamplingSettings, generate
from alignment.methods.frozen_layers import FrozenLayers, NotFrozen
from alignment.methods.ppo_losses import (
    advantages_and_returns,
    explained_variance,
    next_kl_coef,
    policy_losses,
    token_rewards,
    value_losses,
    whiten,
)
from alignment.methods.roles import Roles, Sequences, make_roles, micro_batches
from alignment.methods.tasks import TaskKind
from alignment.models import (
    Config,
    LoadSettings,
    LoraSettings,
    LoraWithoutDropout,
    ModelFiles,
    load_tokenizer,
    resolve_dtype,
    save_model,
)
from alignment.progress import COMPLETE, SILENT, Log, last_complete_checkpoint
from alignment.rewards import RewardWeights, Rollout, Task, model_reward, reward_functions, total_rewards
from alignment.sft import NothingToTrain
from alignment.training import Trained, free_memory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

CODE_VERSION = "2"


class PpoConfig(Config):
    """Settings of PPO; the KL coefficient is the user's document's, the others are those of published runs with 1B models."""

    steps: int = Field(100, ge=1, description="PPO steps; each samples a batch of answers and improves on it")
    batch_size: int = Field(64, ge=1, description="Answers sampled per step")
    mini_batches: int = Field(1, ge=1, description="Optimiser steps per epoch over a batch; divides batch_size")
    ppo_epochs: int = Field(4, ge=1, description="Passes over each batch")
    learning_rate: float = Field(3e-6, gt=0, description="The policy's peak learning rate (AdamW)")
    critic_learning_rate: float = Field(1e-5, gt=0, description="The critic's peak learning rate (AdamW)")
    scheduler: Literal["linear", "cosine", "constant"] = Field("linear", description="Shape of both learning rates after warm-up")
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="Share of the steps in which the learning rates rise from 0")
    max_grad_norm: float = Field(1.0, gt=0, description="The policy's and the critic's gradients are each clipped to this norm")
    kl_coef: float = Field(0.1, ge=0, description="Charge per nat of divergence from the SFT checkpoint (beta)")
    kl_controller: Literal["fixed", "adaptive"] = Field("fixed", description="adaptive steers kl_coef towards kl_target")
    kl_target: float = Field(6.0, gt=0, description="KL per answer, in nats, that the adaptive controller aims at")
    kl_horizon: int = Field(10000, ge=1, description="Answers over which the adaptive controller corrects itself")
    kl_estimator: Literal["k1", "k3"] = Field("k1", description="k1 charges the log ratio; k3 has less variance, never negative")
    gamma: float = Field(1.0, gt=0, le=1, description="Discount per token")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="GAE's trade of bias (0) against variance (1)")
    clip_range: float = Field(0.2, gt=0, description="The policy's ratio counts only within 1 +- this")
    clip_range_value: float = Field(0.2, gt=0, description="A value counts only within this distance of its old one")
    whiten_rewards: bool = Field(False, description="Scale the rewards of a batch to variance 1, their mean kept")
    whiten_advantages: bool = Field(True, description="Scale the advantages of a mini-batch to mean 0 and variance 1")
    missing_eos_penalty: float = Field(1.0, ge=0, description="Taken off the score of an answer that was cut at its length limit")
    rewards: RewardWeights = Field(RewardWeights(), description="What is maximised: a weighted sum")
    tasks: TaskKind = Field("prompts", description="Train on the constitution's prompts, on problems with answers, or on both")
    sampling: SamplingSettings = Field(
        SamplingSettings(temperature=0.7, top_k=0, max_new_tokens=128),
        description="How the policy answers while it trains; top_k is to be 0 and repetition_penalty 1: the whole softmax learns",
    )
    critic_start: Literal["reward_model", "sft"] = Field(
        "reward_model", description="What the critic starts as; sft has a value head of zeros"
    )
    finetuning: Literal["lora", "full"] = Field("lora", description="Train adapters, or all weights of full models")
    lora: LoraWithoutDropout = Field(LoraSettings(dropout=0.0), description="New adapters, where there is none to continue")
    share_base: bool = Field(
        True, **layout("Policy, reference, critic and reward model as adapters of one loaded base; false: a model each")
    )
    reuse_frozen_layers: bool = Field(
        True,
        **layout("Compute the layers below all adapters once per answer and step, not in every role and epoch; on one base only"),
    )
    load: LoadSettings = Field(LoadSettings(), description="How the models are loaded")
    max_prompt_length: int = Field(256, ge=1, description="Prompts longer than this many tokens are dropped and counted")
    micro_batch_size: int = Field(8, ge=1, **layout("Answers in memory at once in forward and backward passes"))
    score_batch_size: int = Field(32, ge=1, **layout("Answers scored at once"))
    save_every: int = Field(5, ge=1, **layout("PPO steps between checkpoints that a killed run resumes from"))
    seed: int = Field(0, ge=0, description="Seed of the order of prompts, of sampling and of mini-batches")

    @model_validator(mode="after")
    def _settings_that_fit_together(self) -> PpoConfig:
        if self.batch_size % self.mini_batches:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of mini_batches {self.mini_batches}")
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature must be above 0: greedy answers explore nothing")
        if self.sampling.top_k or self.sampling.repetition_penalty != 1:
            raise ValueError(
                "sampling.top_k must be 0 and sampling.repetition_penalty 1: the log-probabilities that the loss compares are "
                "those of the whole softmax, and answers are to be drawn from it"
            )
        return self


@dataclass
class _Batch:
    """What one step learns from: B answers; tensors are (B, T), T the longest answer, on the CPU."""

    rows: list[tuple[list[int], list[int]]]  # prompt ids, sampled ids
    mask: torch.Tensor
    log_probs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    kl: float  # nats per answer


def train_ppo(
    config: PpoConfig,
    sft: ModelFiles,
    reward_model: ModelFiles | None,
    tasks: Sequence[Task],
    *,
    work: Path,
    out: Path,
    log: Log = SILENT,
) -> tuple[Trained, dict[str, float]]:
    """Train the SFT checkpoint to earn more reward on `tasks`; the policy goes to `out/model`. Returns curves and final metrics.

    Args:
        reward_model: may be None where `config.rewards` gives it no weight.

    Raises:
        NothingToTrain: every prompt is longer than `max_prompt_length`.
        UserError: rewards that apply to nothing, or roles that cannot be loaded so.
    """
    speed_up()
    tokenizer = load_tokenizer(sft.base, config.load.trust_remote_code)
    prompts = [(task, prompt_ids(tokenizer, task.messages)) for task in tasks]
    prompts = [(task, ids) for task, ids in prompts if len(ids) <= config.max_prompt_length]
    if not prompts:
        raise NothingToTrain(
            f"none of {len(tasks)} prompts has at most {config.max_prompt_length} tokens. Remedy: raise max_prompt_length."
        )
    if not config.rewards.reward_model:
        reward_model = None
    reward_tokenizer = load_tokenizer(reward_model.base, config.load.trust_remote_code) if reward_model else None
    roles = make_roles(
        sft,
        reward_model,
        config.load,
        lora=config.lora,
        full=config.finetuning == "full",
        share_base=config.share_base,
        critic_from_reward=config.critic_start == "reward_model",
        reward_tokenizer=reward_tokenizer,
        seed=config.seed,
    )
    of_model = model_reward(roles.scorer, reward_tokenizer, config.score_batch_size) if reward_model else None
    functions = reward_functions(config.rewards, of_model)
    learner = _Learner(config, roles)
    reuse = _Reuse(config, roles, log)
    checkpoints = work / "ppo"
    step, curves = learner.resume(checkpoints)
    log.say(
        f"PPO: resumed at step {step}/{config.steps}" if step else f"PPO: {config.steps} steps of {config.batch_size} answers"
    )
    begun, first = time.monotonic(), step
    while step < config.steps:
        batch, metrics = _roll_out(config, roles, reuse, tokenizer, functions, prompts, step, learner.kl_coef)
        metrics |= learner.improve(batch, step, tokenizer.pad_token_id)
        step += 1
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for name, value in metrics.items():
            curves.setdefault(name, []).append((step, value))
        log.metrics(step, metrics)
        eta = (time.monotonic() - begun) / (step - first) * (config.steps - step)
        log.say(
            f"PPO: step {step}/{config.steps}, score {metrics['objective/scores']:.3f}, KL {metrics['objective/kl']:.2f}, "
            f"EOS {metrics['eos_rate']:.0%}, ETA {eta:.0f} s"
        )
        if step % config.save_every == 0 and step < config.steps:
            learner.save(checkpoints, step, curves)
    trained = Trained(curves, step)
    model = roles.policy_model
    with roles.policy.active():
        save_model(model, tokenizer, out / "model", resolve_dtype(config.load.dtype))
    del roles, learner, reuse, model, functions, of_model
    free_memory()
    return trained, _final_metrics(trained, len(prompts), len(tasks) - len(prompts))


def _final_metrics(trained: Trained, kept: int, dropped: int) -> dict[str, float]:
    first = {name: points[0][1] for name, points in trained.curves.items()}
    metrics = {
        "train/policy_loss": trained.mean("loss/policy"),
        "train/value_loss": trained.mean("loss/value"),
        "train/scores_first": first.get("objective/scores", math.nan),
        "train/scores_last": trained.last("objective/scores"),
        "train/reward_last": trained.last("objective/rlhf_reward"),
        "train/kl_last": trained.last("objective/kl"),
        "train/kl_coef_last": trained.last("kl_coef"),
        "train/entropy_last": trained.last("objective/entropy"),
        "train/eos_rate_last": trained.last("eos_rate"),
        "train/mean_length_last": trained.last("length/mean"),
        "train/ratio_first": max((v for _, v in trained.curves.get("ratio/first_pass_off", [])), default=math.nan) + 1,
        "train/explained_variance_last": trained.last("critic/explained_variance"),
        "train/prompts": kept,
        "train/prompts_dropped_too_long": dropped,
    }
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _roll_out(
    config, roles: Roles, reuse: _Reuse, tokenizer: PreTrainedTokenizerBase, functions, prompts, step: int, kl_coef: float
) -> tuple[_Batch, dict[str, float]]:
    """Sample, score, and compute everything the updates need. Returns the batch and its metrics."""
    import torch

    size = config.batch_size
    picked = [prompts[i] for i in _picks(len(prompts), config.seed, step * size, size)]
    seeds = [_seed(config.seed, step, row) for row in range(size)]
    with roles.policy.sampling() as model:
        answers = generate(model, tokenizer, [task.messages for task, _ in picked], config.sampling, seeds=seeds)
    rows = [(ids, list(a.ids)) for (_, ids), a in zip(picked, answers, strict=True)]
    reuse.begin_step(rows, tokenizer.pad_token_id)
    rollouts = [Rollout(task, a.text, a.ended) for (task, _), a in zip(picked, answers, strict=True)]
    totals, parts = total_rewards(functions, rollouts)
    ended = torch.tensor([a.ended for a in answers])
    scores = torch.tensor(totals) - config.missing_eos_penalty * ~ended
    mask = _padded([torch.ones(len(sampled)) for _, sampled in rows]).bool()
    columns: dict[str, list] = {name: [None] * size for name in ("policy", "reference", "values", "entropy")}
    with torch.no_grad():
        # Cut as the first epoch is, so that its first pass repeats these very computations.
        for mini_batch in _mini_batches(config, rows, step, 0, model.device):
            for micro in mini_batch:
                batch = Sequences.of([rows[i] for i in micro], tokenizer.pad_token_id, model.device)
                log_probs, entropy = roles.policy.log_probs(batch, config.sampling.temperature)
                reference, _ = roles.reference.log_probs(batch, config.sampling.temperature, entropy=False)
                values = roles.critic.values(batch)
                for name, flat in (("policy", log_probs), ("reference", reference), ("values", values), ("entropy", entropy)):
                    for i, row in zip(micro, flat.cpu().split(batch.counts), strict=True):
                        columns[name][i] = row
    policy, reference, values, entropy = (_padded(columns[name]) for name in ("policy", "reference", "values", "entropy"))
    log_ratio = (policy - reference) * mask
    rewards = token_rewards(log_ratio, scores, mask, kl_coef, config.kl_estimator)
    kl, charged = log_ratio.sum(1).mean().item(), (rewards.sum(1) - scores).mean().item()
    if config.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = advantages_and_returns(rewards, values, mask, config.gamma, config.gae_lambda)
    metrics = {
        "objective/scores": scores.mean().item(),
        "objective/scores_std": scores.std(correction=0).item(),
        "objective/kl": kl,
        "objective/kl_per_token": (log_ratio.sum() / mask.sum()).item(),
        "objective/non_score_reward": charged,
        "objective/rlhf_reward": scores.mean().item() + charged,
        "objective/entropy": (entropy.sum() / mask.sum()).item(),
        "critic/explained_variance": explained_variance(values, returns, mask),
        "critic/value": (values.sum() / mask.sum()).item(),
        "eos_rate": ended.float().mean().item(),
        "length/mean": mask.sum(1).float().mean().item(),
        "length/max": float(mask.shape[1]),
        "kl_coef": kl_coef,
    }
    for name, of_function in parts.items():
        known = [v for v in of_function if not math.isnan(v)]
        metrics[f"rewards/{name}"] = sum(known) / len(known) if known else math.nan
    return _Batch(rows, mask, policy, values, advantages, returns, kl), metrics


class _Reuse:
    """What the roles on one base keep of the layers that no adapter changes; whether they do is settled by the first answers."""

    def __init__(self, config: PpoConfig, roles: Roles, log: Log) -> None:
        self._roles, self._log = roles, log
        self._frozen: FrozenLayers | None = None
        self._checked = False
        if not config.reuse_frozen_layers:
            return
        try:
            if not roles.on_shared_base:
                raise NotFrozen("each role has a model of its own")
            names = dict.fromkeys(name for name, _ in roles.on_shared_base)
            self._frozen = FrozenLayers(roles.policy_model, list(names), config.micro_batch_size)
        except NotFrozen as reason:
            self._do_without(reason)

    def begin_step(self, rows: Sequence[tuple[list[int], list[int]]], pad: int) -> None:
        """Forget the answers of the step before; on the first ones, try whether the roles may skip layers."""
        if self._frozen is None:
            return
        self._frozen.forget()
        if self._checked:
            return
        self._checked = True
        by_length = sorted(rows, key=lambda row: sum(map(len, row)))
        try:
            # The shortest beside the longest: padding is to be harmless, too.
            self._frozen.check(Sequences.of([by_length[0], by_length[-1]], pad, self._roles.policy_model.device).inputs)
        except NotFrozen as reason:
            self._frozen = None
            self._do_without(reason)
            return
        self._frozen.forget()
        self._roles.start_from(self._frozen)
        depths = ", ".join(f"{name} {depth}" for name, depth in self._frozen.depths.items())
        self._log.say(f"PPO: layers below all adapters are computed once per answer and step; first layer of each: {depths}")

    def _do_without(self, reason: NotFrozen) -> None:
        self._log.say(f"PPO: every role computes all layers in every epoch: {reason}")


class _Learner:
    """Optimisers of policy and critic, the KL coefficient, and what a killed run resumes from."""

    def __init__(self, config: PpoConfig, roles: Roles) -> None:
        import torch

        self._config, self._roles = config, roles
        self.kl_coef = config.kl_coef
        self._parameters = {"policy": roles.policy.trainable(), "critic": roles.critic.trainable()}
        rates = {"policy": config.learning_rate, "critic": config.critic_learning_rate}
        self._rates = rates
        self._optimisers = {
            role: torch.optim.AdamW(list(parameters.values()), lr=rates[role], eps=1e-5, weight_decay=0.0)
            for role, parameters in self._parameters.items()
        }

    def improve(self, batch: _Batch, step: int, pad: int) -> dict[str, float]:
        """All epochs over one batch. Returns means over its optimiser steps."""
        config = self._config
        share = self._rate(step)
        for role, optimiser in self._optimisers.items():
            optimiser.param_groups[0]["lr"] = self._rates[role] * share
        sums: dict[str, float] = {}
        updates = 0
        for epoch in range(config.ppo_epochs):
            for mini_batch in _mini_batches(config, batch.rows, step, epoch, self._roles.policy_model.device):
                values = self._update(batch, mini_batch, pad)
                if not updates:
                    first_off = values["ratio_off"]
                updates += 1
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + value
        if config.kl_controller == "adaptive":
            self.kl_coef = next_kl_coef(self.kl_coef, batch.kl, config.kl_target, config.batch_size, config.kl_horizon)
        mean = {name: value / updates for name, value in sums.items() if name != "ratio_off"}
        return mean | {"ratio/first_pass_off": first_off, "lr": self._rates["policy"] * share}

    def _update(self, batch: _Batch, mini_batch: list[list[int]], pad: int) -> dict[str, float]:
        """One optimiser step of both roles on the answers of a mini-batch, micro-batch by micro-batch."""
        import torch

        config, roles = self._config, self._roles
        rows = [i for micro in mini_batch for i in micro]
        tokens = batch.mask[rows].sum().item()
        advantages = batch.advantages.clone()
        if config.whiten_advantages:
            advantages[rows] = whiten(batch.advantages[rows], batch.mask[rows])
        device = roles.policy_model.device
        sums: dict[str, float] = {}

        def add(**values: torch.Tensor) -> None:
            for name, value in values.items():
                name = name.replace("__", "/")
                sums[name] = sums.get(name, 0.0) + value.sum().item() / tokens

        for micro in mini_batch:
            sequences = Sequences.of([batch.rows[i] for i in micro], pad, device)
            inside = batch.mask[micro]
            old, old_values, advantage, returns = (
                tensor[micro][inside].to(device) for tensor in (batch.log_probs, batch.values, advantages, batch.returns)
            )
            log_probs, _ = roles.policy.log_probs(sequences, config.sampling.temperature)
            losses, clipped = policy_losses(log_probs, old, advantage, config.clip_range)
            (losses.sum() / tokens).backward()
            change = (log_probs - old).detach()
            add(
                loss__policy=losses.detach(),
                policy__clipfrac=clipped,
                policy__approxkl=0.5 * change**2,
                policy__ratio=change.exp(),
            )
            sums["ratio_off"] = max(sums.get("ratio_off", 0.0), change.expm1().abs().max().item())
            values = roles.critic.values(sequences)
            losses, clipped = value_losses(values, old_values, returns, config.clip_range_value)
            (losses.sum() / tokens).backward()
            add(loss__value=losses.detach(), critic__clipfrac=clipped)
        for role, parameters in self._parameters.items():
            norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), config.max_grad_norm)
            sums[f"{role}/grad_norm"] = norm.item()
            self._optimisers[role].step()
            self._optimisers[role].zero_grad(set_to_none=True)
        return sums

    def _rate(self, step: int) -> float:
        """The learning rates' share of their peaks at a step, counted from 0."""
        config = self._config
        warm = round(config.warmup_ratio * config.steps)
        if step < warm:
            return (step + 1) / warm
        left = 1 - (step - warm) / max(config.steps - warm, 1)
        return {"linear": left, "cosine": 0.5 * (1 + math.cos(math.pi * (1 - left))), "constant": 1.0}[config.scheduler]

    def save(self, folder: Path, step: int, curves: dict[str, list[tuple[int, float]]]) -> None:
        """Write a checkpoint; older ones go once it is whole."""
        from safetensors.torch import save_file

        path = folder / f"checkpoint-{step}"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        tensors, counts = {}, {}
        for role, parameters in self._parameters.items():
            for name, parameter in parameters.items():
                tensors[f"{role}.{name}"] = parameter.data.contiguous()
                state = self._optimisers[role].state.get(parameter)
                if state is None:
                    continue  # it has no part in this role (a critic's rows of the vocabulary head), and never a gradient
                for moment in ("exp_avg", "exp_avg_sq"):
                    tensors[f"{role}.{name}.{moment}"] = state[moment]
                counts[role] = float(state["step"])
        save_file(tensors, path / "state.safetensors")
        (path / "state.json").write_text(json.dumps({"updates": counts, "kl_coef": self.kl_coef, "curves": curves}))
        (path / COMPLETE).touch()
        for other in folder.glob("checkpoint-*"):
            if other != path:
                shutil.rmtree(other)

    def resume(self, folder: Path) -> tuple[int, dict[str, list[tuple[int, float]]]]:
        """Load the last whole checkpoint, if there is one. Returns the steps done and the curves so far."""
        import torch
        from safetensors.torch import load_file

        path = last_complete_checkpoint(folder)
        if path is None:
            return 0, {}
        tensors = load_file(path / "state.safetensors")
        state = json.loads((path / "state.json").read_text())
        for role, parameters in self._parameters.items():
            for name, parameter in parameters.items():
                key = f"{role}.{name}"
                parameter.data.copy_(tensors[key])
                if f"{key}.exp_avg" not in tensors:
                    continue
                self._optimisers[role].state[parameter] = {
                    "step": torch.tensor(state["updates"][role]),
                    **{m: tensors[f"{key}.{m}"].to(parameter.device) for m in ("exp_avg", "exp_avg_sq")},
                }
        self.kl_coef = state["kl_coef"]
        curves = {name: [(int(step), value) for step, value in points] for name, points in state["curves"].items()}
        return int(path.name.removeprefix("checkpoint-")), curves


def _mini_batches(
    config: PpoConfig, rows: Sequence[tuple[list[int], list[int]]], step: int, epoch: int, device: torch.device
) -> list[list[list[int]]]:
    """The answers of a step in a seeded order: mini-batches of micro-batches of row numbers. Neighbours in length share a
    micro-batch, so that little of it is padding; which rows a mini-batch holds does not depend on how it is cut."""
    order = list(range(len(rows)))
    random.Random(f"{config.seed} {step} {epoch}").shuffle(order)
    size = len(rows) // config.mini_batches
    out = []
    for start in range(0, len(rows), size):
        mini_batch = order[start : start + size]
        lengths = [sum(map(len, rows[i])) for i in mini_batch]
        out.append([[mini_batch[j] for j in micro] for micro in micro_batches(lengths, config.micro_batch_size, device)])
    return out


def _picks(count: int, seed: int, start: int, size: int) -> list[int]:
    """Which of `count` prompts answers `start` to `start + size` of a run are about; each comes once before any comes again."""
    out = []
    while len(out) < size:
        epoch, offset = divmod(start + len(out), count)
        order = list(range(count))
        random.Random(f"{seed} {epoch}").shuffle(order)
        out += order[offset : offset + size - len(out)]
    return out


def _padded(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    from torch.nn.utils.rnn import pad_sequence

    return pad_sequence(list(rows), batch_first=True)


def _seed(seed: int, step: int, row: int) -> int:
    digest = hashlib.sha256(f"ppo {seed} {step} {row}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
