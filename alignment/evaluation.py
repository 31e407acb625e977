"""Measure a policy against the SFT checkpoint it came from, on held-out prompts only.

The scores come from `evaluator`, a reward model that no policy was trained with. Both models answer every prompt with
the same seeds; the difference is judged by a paired bootstrap over prompts. Guardrails beside it: answer length, EOS
rate, over-refusal, perplexity on held-out demonstrations, KL from the SFT checkpoint.
"""

from __future__ import annotations

import gc
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import Field

from alignment.chat import IGNORE, training_example
from alignment.context_length import position_limit
from alignment.errors import UserError
from alignment.fingerprint import layout
from alignment.generation import Completion, SamplingSettings, generate
from alignment.likelihood import answer_log_probs, label_log_probs
from alignment.models import Config, LoadSettings, ModelFiles, load_causal_lm, load_reward_model, load_tokenizer
from alignment.progress import SILENT, Log
from alignment.records import Conversation, Prompt
from alignment.refusals import is_refusal
from alignment.reward import score
from alignment.statistics import paired_bootstrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CODE_VERSION = "2"


class ReportConfig(Config):
    """Settings of the comparison."""

    sampling: SamplingSettings = Field(
        SamplingSettings(temperature=0.7, max_new_tokens=128), description="How both models answer"
    )
    samples_per_prompt: int = Field(1, ge=1, description="Answers per prompt and model; their mean score is compared")
    max_prompts: int = Field(0, ge=0, description="Use only this many held-out prompts; 0: all")
    base_examples: int = Field(12, ge=0, description="Prompts that the base model answers too, for the table of generations")
    load: LoadSettings = Field(LoadSettings(), description="How the models are loaded")
    score_batch_size: int = Field(32, ge=1, **layout("Conversations scored at once"))
    seed: int = Field(0, ge=0, description="Seed of the sampled answers and the bootstrap")


@dataclass
class _Answers:
    """What one model did: completions (prompts x samples, flat), evaluator's scores, and its perplexity."""

    completions: list[Completion]
    scores: list[float] = field(default_factory=list)
    nll: float = math.nan


def evaluate_policy(
    config: ReportConfig,
    *,
    base: ModelFiles,
    sft: ModelFiles,
    policy: ModelFiles,
    evaluator: ModelFiles,
    reward_model: ModelFiles | None,
    prompts: Sequence[Prompt],
    demonstrations: Sequence[Conversation],
    log: Log = SILENT,
) -> tuple[dict[str, float], list[dict]]:
    """Compare `policy` with `sft`. Returns metrics (gain and its interval, win rate, guardrails) and a row per prompt.

    Raises:
        UserError: no held-out prompts.
    """
    if not prompts:
        raise UserError("there are no held-out prompts for this constitution. Remedy: add prompts with its tags.")
    prompts = list(prompts)[: config.max_prompts or None]
    n = config.samples_per_prompt
    questions = [[{"role": "user", "content": p.prompt}] for p in prompts for _ in range(n)]
    seeds = [_seed(config.seed, p.id, k) for p in prompts for k in range(n)]
    tokenizer = load_tokenizer(base.base)

    def sample(model: PreTrainedModel, name: str, rows: int | None = None) -> list[Completion]:
        return generate(model, tokenizer, questions[:rows], config.sampling, seeds=seeds[:rows], log=log, what=f"{name} answers")

    def log_probs_of_ours(model: PreTrainedModel) -> list[float]:
        texts, ended = [c.text for c in ours.completions], [c.ended for c in ours.completions]
        return answer_log_probs(model, tokenizer, questions, texts, config.score_batch_size, ended)

    with _loaded(policy, config.load) as model:
        ours = _Answers(sample(model, "policy"), nll=_nll(model, tokenizer, demonstrations, config.score_batch_size))
        logps = log_probs_of_ours(model)
    with _loaded(sft, config.load) as model:
        theirs = _Answers(sample(model, "SFT"), nll=_nll(model, tokenizer, demonstrations, config.score_batch_size))
        sft_logps = log_probs_of_ours(model)
    base_answers: list[Completion] = []
    if config.base_examples:
        with _loaded(base, config.load) as model:
            base_answers = sample(model, "base", min(config.base_examples, len(prompts)) * n)
    ours.scores, theirs.scores = _scores(evaluator, config, tokenizer, questions, ours, theirs, log, "evaluator")
    rewards = _scores(reward_model, config, tokenizer, questions, ours, theirs, log, "reward model") if reward_model else None
    metrics = _metrics(prompts, n, ours, theirs, rewards)
    metrics["kl/from_sft_per_token"] = _mean(
        [(a - b) / max(c.tokens, 1) for a, b, c in zip(logps, sft_logps, ours.completions, strict=True)]
    )
    metrics["kl/from_sft"] = _mean([a - b for a, b in zip(logps, sft_logps, strict=True)])
    table = [
        {
            "prompt": p.prompt,
            "tags": ", ".join(p.tags),
            "base": base_answers[i * n].text if i * n < len(base_answers) else "",
            "sft": theirs.completions[i * n].text,
            "policy": ours.completions[i * n].text,
            "score_sft": theirs.scores[i * n],
            "score_policy": ours.scores[i * n],
        }
        for i, p in enumerate(prompts)
    ]
    return metrics, table


def _metrics(
    prompts: Sequence[Prompt], n: int, ours: _Answers, theirs: _Answers, rewards: tuple[list[float], list[float]] | None
) -> dict[str, float]:
    per_prompt = [_mean(ours.scores[i * n : i * n + n]) for i in range(len(prompts))]
    per_prompt_sft = [_mean(theirs.scores[i * n : i * n + n]) for i in range(len(prompts))]
    gain = paired_bootstrap(per_prompt, per_prompt_sft)
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(per_prompt, per_prompt_sft, strict=True)]
    win = paired_bootstrap(wins, [0.0] * len(wins))
    out = {
        "evaluator/gain": gain.value,
        "evaluator/gain_low": gain.low,
        "evaluator/gain_high": gain.high,
        "evaluator/score_policy": _mean(per_prompt),
        "evaluator/score_sft": _mean(per_prompt_sft),
        "win_rate": win.value,
        "win_rate_low": win.low,
        "win_rate_high": win.high,
        "prompts": len(prompts),
        "perplexity/policy": math.exp(ours.nll),
        "perplexity/sft": math.exp(theirs.nll),
    }
    if rewards:
        out["reward_model/gain"] = _mean(rewards[0]) - _mean(rewards[1])
    intent = [p.tags for p in prompts for _ in range(n)]
    for name, answers in (("policy", ours), ("sft", theirs)):
        done = answers.completions
        out[f"length/{name}"] = _mean([c.tokens for c in done])
        out[f"eos_rate/{name}"] = _mean([float(c.ended) for c in done])
        for label, tags in (("refusal", {"harmful-intent"}), ("over_refusal", {"benign", "borderline-but-fine"})):
            hits = [float(is_refusal(c.text)) for c, t in zip(done, intent, strict=True) if tags & set(t)]
            if hits:
                out[f"{label}_rate/{name}"] = _mean(hits)
    return out


class _loaded:
    """A model in memory for the length of a `with`, and gone after it."""

    def __init__(self, files: ModelFiles, settings: LoadSettings) -> None:
        self._files, self._settings = files, settings

    def __enter__(self) -> PreTrainedModel:
        self._model = load_causal_lm(self._files, self._settings)
        return self._model

    def __exit__(self, *_: object) -> None:
        del self._model
        gc.collect()


def _scores(
    files: ModelFiles,
    config: ReportConfig,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Sequence[Mapping[str, str]]],
    ours: _Answers,
    theirs: _Answers,
    log: Log,
    what: str,
) -> tuple[list[float], list[float]]:
    model = load_reward_model(files, config.load, tokenizer=tokenizer)
    conversations = [
        [*q, {"role": "assistant", "content": c.text or " "}]
        for answers in (ours, theirs)
        for q, c in zip(questions, answers.completions, strict=True)
    ]
    scores = score(model, tokenizer, conversations, config.score_batch_size, log, what)
    return scores[: len(questions)], scores[len(questions) :]


def _nll(model, tokenizer, conversations: Sequence[Conversation], batch_size: int) -> float:
    """Mean negative log-likelihood (nats) of the assistant tokens of those held-out demonstrations that the model can read."""
    examples = [training_example(tokenizer, [m.model_dump() for m in c.messages]) for c in conversations]
    limit = position_limit(model)
    examples = [e for e in examples if len(e.input_ids) <= limit]
    if not examples:
        return math.nan
    totals = label_log_probs(model, tokenizer, [(e.input_ids, e.labels) for e in examples], batch_size)
    return -sum(totals) / sum(sum(label != IGNORE for label in e.labels) for e in examples)


def _seed(seed: int, prompt_id: str, sample: int) -> int:
    digest = hashlib.sha256(f"{seed}\0{prompt_id}\0{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
