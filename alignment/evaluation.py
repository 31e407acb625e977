"""Measure policies against the SFT checkpoint they came from, on held-out prompts only.

The SFT checkpoint answers once (`measure_sft`), every policy answers the same prompts with the same seeds and settings
(`evaluate_policy`), and the difference is judged by a paired bootstrap over prompts. The scores come from `evaluator`, a
reward model that no policy was trained with. Guardrails beside it: answer length, EOS rate, over-refusal, perplexity on
held-out demonstrations, KL from the SFT checkpoint; and the share of held-out problems that are solved.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from pydantic import ConfigDict, Field

from alignment.asking import seed_of
from alignment.chat import IGNORE, prompt_ids, training_examples
from alignment.context_length import position_limit
from alignment.errors import UserError
from alignment.fingerprint import layout
from alignment.generation import Completion, SamplingSettings, generate
from alignment.likelihood import label_log_probs
from alignment.models import Config, LoadSettings, ModelFiles, load_causal_lm, load_reward_model, load_tokenizer
from alignment.pair_filters import HARMFUL, HARMLESS
from alignment.progress import SILENT, Log
from alignment.records import Conversation, Problem, Prompt, Record
from alignment.refusals import is_refusal
from alignment.reward import score
from alignment.rewards import Rollout, exact_answer, problem_task
from alignment.statistics import paired_bootstrap, wilson

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")

CODE_VERSION = "5"


class SftReportConfig(Config):
    """Settings of the comparison: the SFT checkpoint and every policy answer the same prompts in the same way."""

    sampling: SamplingSettings = Field(SamplingSettings(temperature=0.7, max_new_tokens=128), description="How the models answer")
    samples_per_prompt: int = Field(1, ge=1, description="Answers per prompt and model; their mean score is compared")
    max_prompts: int = Field(0, ge=0, description="Use only this many held-out prompts; 0: all")
    max_problems: int = Field(40, ge=0, description="Held-out problems with a known answer, answered greedily; 0: none")
    base_examples: int = Field(12, ge=0, description="Prompts that the base model answers too, for the table of generations")
    load: LoadSettings = Field(LoadSettings(), description="How the models are loaded")
    score_batch_size: int = Field(32, ge=1, **layout("Conversations scored at once"))
    seed: int = Field(0, ge=0, description="Seed of the sampled answers")


class ReportConfig(Config):
    """Settings of one policy's measurement. How it is loaded and answers is decided by `sft_report`, so that both sides are
    measured alike."""

    sampling_batch_size: int = Field(
        0, ge=0, **layout("Prompts sampled at once; 0: as in sft_report. Lower it where memory runs out")
    )
    score_batch_size: int = Field(32, ge=1, **layout("Conversations scored at once"))


class Heldout(Record):
    """What models are measured on: held-out prompts of a constitution, plain demonstrations, problems."""

    prompts: tuple[Prompt, ...]
    demonstrations: tuple[Conversation, ...] = ()
    problems: tuple[Problem, ...] = ()


class Measured(Record):
    """What one model did. Answers are flat, prompt by prompt: `samples` of each.

    Attributes:
        scores, rewards: the evaluator's and the reward model's score of each answer.
        nll: nats per assistant token of the held-out demonstrations, NaN without any.
        correct: for each problem, whether it was solved.
    """

    model_config = ConfigDict(ser_json_inf_nan="constants")

    settings: SftReportConfig
    answers: tuple[Completion, ...]
    scores: tuple[float, ...]
    rewards: tuple[float, ...]
    nll: float
    correct: tuple[bool, ...]


def measure_sft(
    config: SftReportConfig,
    *,
    base: ModelFiles,
    sft: ModelFiles,
    evaluator: ModelFiles,
    reward_model: ModelFiles,
    heldout: Heldout,
    log: Log = SILENT,
) -> tuple[Measured, dict[str, float], list[dict]]:
    """Let the SFT checkpoint (and, for a few prompts, the base model) answer. Returns what it did, metrics, a row per prompt.

    Raises:
        UserError: no held-out prompts.
    """
    heldout = _limited(heldout, config)
    tokenizer = load_tokenizer(base.base, config.load.trust_remote_code)
    n = config.samples_per_prompt
    answers, nll, correct = _while_loaded(
        partial(load_causal_lm, sft, config.load),
        lambda model: _answer(model, tokenizer, config, heldout, log, "SFT"),
    )
    examples: list[Completion] = []
    if config.base_examples:
        # The table shows the first answer to a prompt.
        questions, seeds = (of_all[::n][: config.base_examples] for of_all in _questions(config, heldout))
        examples = _while_loaded(
            partial(load_causal_lm, base, config.load),
            lambda model: generate(model, tokenizer, questions, config.sampling, seeds=seeds, log=log, what="base answers"),
        )
    scores, rewards = _scored(config, config, tokenizer, heldout, answers, evaluator, reward_model, log)
    measured = Measured(settings=config, answers=tuple(answers), scores=scores, rewards=rewards, nll=nll, correct=tuple(correct))
    table = [
        {
            "prompt": p.prompt,
            "tags": ", ".join(p.tags),
            "base": examples[i].text if i < len(examples) else "",
            "sft": answers[i * n].text,
            "score_sft": scores[i * n],
        }
        for i, p in enumerate(heldout.prompts)
    ]
    metrics = _side("sft", measured, heldout.prompts) | {"prompts": len(heldout.prompts)}
    return measured, {k: v for k, v in metrics.items() if math.isfinite(v)}, table


def evaluate_policy(
    config: ReportConfig,
    *,
    theirs: Measured,
    base_rows: Sequence[Mapping],
    sft: ModelFiles,
    policy: ModelFiles,
    evaluator: ModelFiles,
    reward_model: ModelFiles,
    heldout: Heldout,
    log: Log = SILENT,
) -> tuple[dict[str, float], list[dict]]:
    """Compare `policy` with the SFT checkpoint. Returns metrics (gain with interval, win rate, guardrails) and a row per prompt.

    Args:
        theirs: what `measure_sft` returned for the same held-out data; its settings hold here, too, but for batch sizes.
        base_rows: the table of `measure_sft`, which this one continues.

    KL is measured on the first answer to each prompt.
    """
    settings = theirs.settings
    if config.sampling_batch_size:
        sampling = settings.sampling.model_copy(update={"batch_size": config.sampling_batch_size})
        settings = settings.model_copy(update={"sampling": sampling})
    n = settings.samples_per_prompt
    heldout = _limited(heldout, settings)
    tokenizer = load_tokenizer(policy.base, settings.load.trust_remote_code)
    questions, _ = _questions(settings, heldout)

    def log_probs(model: PreTrainedModel, answers: Sequence[Completion]) -> list[float]:
        asked = [(prompt_ids(tokenizer, q), list(c.ids)) for q, c in zip(questions[::n], answers[::n], strict=True)]
        rows = [(p + ids, [IGNORE] * len(p) + ids) for p, ids in asked]
        return label_log_probs(model, tokenizer, rows, config.score_batch_size)

    def measure(model: PreTrainedModel) -> tuple[list[Completion], float, list[bool], list[float]]:
        answers, nll, correct = _answer(model, tokenizer, settings, heldout, log, "policy")
        return answers, nll, correct, log_probs(model, answers)

    answers, nll, correct, log_probs_policy = _while_loaded(partial(load_causal_lm, policy, settings.load), measure)
    log_probs_sft = _while_loaded(partial(load_causal_lm, sft, settings.load), lambda model: log_probs(model, answers))
    scores, rewards = _scored(config, settings, tokenizer, heldout, answers, evaluator, reward_model, log)
    ours = Measured(settings=settings, answers=tuple(answers), scores=scores, rewards=rewards, nll=nll, correct=tuple(correct))
    metrics = _compared(ours, theirs, heldout.prompts)
    kl = [a - b for a, b in zip(log_probs_policy, log_probs_sft, strict=True)]
    metrics["kl/from_sft"] = _mean(kl)
    metrics["kl/from_sft_per_token"] = _mean([k / max(c.tokens, 1) for k, c in zip(kl, answers[::n], strict=True)])
    table = [{**row, "policy": answers[i * n].text, "score_policy": scores[i * n]} for i, row in enumerate(base_rows)]
    return {k: v for k, v in metrics.items() if math.isfinite(v)}, table


def _limited(heldout: Heldout, config: SftReportConfig) -> Heldout:
    if not heldout.prompts:
        raise UserError("there are no held-out prompts for this constitution. Remedy: add prompts with its tags.")
    return heldout.model_copy(
        update={
            "prompts": heldout.prompts[: config.max_prompts or None],
            "problems": heldout.problems[: config.max_problems],
        }
    )


def _questions(config: SftReportConfig, heldout: Heldout) -> tuple[list[list[dict[str, str]]], list[int]]:
    n = config.samples_per_prompt
    questions = [[{"role": "user", "content": p.prompt}] for p in heldout.prompts for _ in range(n)]
    return questions, [seed_of(config.seed, p.id, k) for p in heldout.prompts for k in range(n)]


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: SftReportConfig,
    heldout: Heldout,
    log: Log,
    name: str,
) -> tuple[list[Completion], float, list[bool]]:
    questions, seeds = _questions(config, heldout)
    answers = generate(model, tokenizer, questions, config.sampling, seeds=seeds, log=log, what=f"{name} answers")
    tasks = [problem_task(p) for p in heldout.problems]
    greedy = config.sampling.model_copy(update={"temperature": 0.0})
    solved = generate(model, tokenizer, [list(t.messages) for t in tasks], greedy, log=log, what=f"{name} solutions")
    correct = exact_answer([Rollout(t, c.text, c.ended) for t, c in zip(tasks, solved, strict=True)])
    return answers, _nll(model, tokenizer, heldout.demonstrations, config.score_batch_size), [c == 1 for c in correct]


def _scored(config, settings: SftReportConfig, tokenizer, heldout: Heldout, answers, evaluator, reward_model, log) -> tuple:
    questions, _ = _questions(settings, heldout)
    finished = [[*q, {"role": "assistant", "content": c.text or " "}] for q, c in zip(questions, answers, strict=True)]

    def scores(files: ModelFiles, what: str) -> tuple[float, ...]:
        load = partial(load_reward_model, files, settings.load, tokenizer=tokenizer)
        return tuple(_while_loaded(load, lambda scorer: score(scorer, tokenizer, finished, config.score_batch_size, log, what)))

    return scores(evaluator, "evaluator"), scores(reward_model, "reward model")


def _compared(ours: Measured, theirs: Measured, prompts: Sequence[Prompt]) -> dict[str, float]:
    n = ours.settings.samples_per_prompt
    a, b = (_per_prompt(m.scores, n) for m in (ours, theirs))
    gain = paired_bootstrap(a, b)
    win = paired_bootstrap([1.0 if x > y else 0.5 if x == y else 0.0 for x, y in zip(a, b, strict=True)], [0.0] * len(a))
    return {
        "evaluator/gain": gain.value,
        "evaluator/gain_low": gain.low,
        "evaluator/gain_high": gain.high,
        "win_rate": win.value,
        "win_rate_low": win.low,
        "win_rate_high": win.high,
        "reward_model/gain": _mean(ours.rewards) - _mean(theirs.rewards),
        "prompts": len(prompts),
        **_side("policy", ours, prompts),
        **_side("sft", theirs, prompts),
    }


def _side(name: str, measured: Measured, prompts: Sequence[Prompt]) -> dict[str, float]:
    """One model's own numbers."""
    n = measured.settings.samples_per_prompt
    out = {
        f"evaluator/score_{name}": _mean(measured.scores),
        f"reward_model/score_{name}": _mean(measured.rewards),
        f"perplexity/{name}": math.exp(measured.nll),
        f"length/{name}": _mean([c.tokens for c in measured.answers]),
        f"eos_rate/{name}": _mean([float(c.ended) for c in measured.answers]),
    }
    intent = [p.tags for p in prompts for _ in range(n)]
    for label, tags in (("refusal", {HARMFUL}), ("over_refusal", HARMLESS)):
        hits = [float(is_refusal(c.text)) for c, t in zip(measured.answers, intent, strict=True) if tags & set(t)]
        if hits:
            out[f"{label}_rate/{name}"] = _mean(hits)
    if measured.correct:
        solved = wilson(sum(measured.correct), len(measured.correct))
        out |= {f"problems/solved_{name}": solved.value, f"problems/solved_{name}_low": solved.low}
        out[f"problems/solved_{name}_high"] = solved.high
    return out


def _per_prompt(values: Sequence[float], n: int) -> list[float]:
    return [_mean(values[i : i + n]) for i in range(0, len(values), n)]


def _while_loaded(load: Callable[[], PreTrainedModel], use: Callable[[PreTrainedModel], T]) -> T:
    """What `use` makes of a model that is in memory for that long only.

    Not a `with`: its `as` would keep the model in a variable of the caller's, beside the next one.
    """
    model = load()
    try:
        return use(model)
    finally:
        del model
        gc.collect()


def _nll(model, tokenizer, conversations: Sequence[Conversation], batch_size: int) -> float:
    """Mean negative log-likelihood (nats) of the assistant tokens of those held-out demonstrations that the model can read."""
    examples = [e for c in conversations for e in training_examples(tokenizer, [m.model_dump() for m in c.messages])]
    limit = position_limit(model)
    examples = [e for e in examples if len(e.input_ids) <= limit]
    if not examples:
        return math.nan
    totals = label_log_probs(model, tokenizer, [(e.input_ids, e.labels) for e in examples], batch_size)
    return -sum(totals) / sum(sum(label != IGNORE for label in e.labels) for e in examples)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
