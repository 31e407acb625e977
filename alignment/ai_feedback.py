"""RLAIF: preferences from a model instead of people (arXiv 2212.08073, section 4.1; arXiv 2309.00267).

For every prompt: sample two answers from the policy, draw one principle, and ask a judge which answer is better under it, as
a multiple-choice question. The choice is the normalised probability of the letters A and B, never a text to be parsed.
It is asked for in both orders and averaged, since judges prefer a position, small ones most (arXiv 2309.00267); how much the
order matters is measured. The result is a soft label: the probability that an answer is better. With chain of thought
the judge reasons first, which makes it overconfident, and labels are clamped to 0.4-0.6, as in the paper.

Deviation: the paper's judge is shown worked examples first; ours is asked directly. What cannot be told is a missing value: it
is left out and counted, and never becomes a score.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from alignment.asking import request, seed_of
from alignment.constitutions import Constitution
from alignment.critic import Answerer, AnswererSettings, KeptAnswers
from alignment.critique import draw_principles
from alignment.fingerprint import layout
from alignment.finished import in_chunks
from alignment.generation import Completion, SamplingSettings
from alignment.models import Config, LoadSettings
from alignment.progress import SILENT, Log
from alignment.records import PreferencePair, Prompt, Record, Text, WeightedPair
from alignment.reward import accuracy_metrics
from alignment.splits import normalise

CODE_VERSION = "2"
OPTIONS = ("A", "B")  # their first tokens differ, and an endpoint tells no probabilities of more than the first
DropReason = Literal["empty", "truncated", "identical", "unreadable"]
EDGE = 1e-6  # labels stay this far from 0 and 1: no judge is certain


class AiFeedbackConfig(Config):
    """Settings of AI feedback (RLAIF)."""

    policy: AnswererSettings = Field(AnswererSettings(), description="Who gives the answers that are compared")
    max_prompts: int = Field(0, ge=0, description="Use only this many of the constitution's training prompts; 0: all")
    prompt_tags: list[str] = Field(
        [], description="Only prompts that also carry one of these tags; empty: all of the constitution's"
    )
    answer: SamplingSettings = Field(
        SamplingSettings(temperature=1.0, max_new_tokens=128), description="How the two answers are sampled; temperature above 0"
    )
    keep_truncated: bool = Field(False, description="Compare answers, too, that were cut at their token limit")
    judge: AnswererSettings = Field(AnswererSettings(), description="Who says which answer is better")
    chain_of_thought: bool = Field(False, description="The judge writes its reasoning before its choice is read")
    reasoning: SamplingSettings = Field(
        SamplingSettings(temperature=0.0, max_new_tokens=128), description="How the judge's reasoning is sampled"
    )
    clamp: list[float] = Field(
        [0.4, 0.6],
        min_length=2,
        max_length=2,
        description="Lowest and highest label with chain of thought, whose choices are overconfident; not used without",
    )
    max_heldout: int = Field(
        100, ge=0, description="The judge's accuracy is measured on this many of the human held-out pairs; 0: not at all"
    )
    load: LoadSettings = Field(LoadSettings(), description="How policy and local judge are loaded")
    chunk: int = Field(32, ge=1, **layout("Prompts sampled and judged before their results are saved"))
    seed: int = Field(0, ge=0, description="Seed of the answers sampled, the principles drawn and the held-out pairs taken")

    @model_validator(mode="after")
    def _labels_and_answers_can_differ(self) -> AiFeedbackConfig:
        low, high = self.clamp
        if not 0 < low <= high < 1:
            raise ValueError(f"clamp: {self.clamp} must be a lowest and a highest label between 0 and 1")
        if self.answer.temperature == 0:
            raise ValueError("answer: at temperature 0 both answers to a prompt are the same; set it above 0")
        return self


class Case(NamedTuple):
    """What a judge is asked: which of the answers `a` and `b` to a conversation is better under a principle's text."""

    id: str
    conversation: Sequence[Mapping[str, str]]
    a: str
    b: str
    principle: str


class Judgement(Record):
    """The probability that `a` is better, by the order: `a_first` where it was option (A), `a_second` where it was (B)."""

    a_first: float = Field(ge=0, le=1)
    a_second: float = Field(ge=0, le=1)
    reasoning: tuple[str, ...] = ()

    @property
    def probability(self) -> float:
        """That `a` is better, both orders averaged."""
        return (self.a_first + self.a_second) / 2

    @property
    def flipped(self) -> bool:
        """Whether the order decided the choice."""
        return (self.a_first - 0.5) * (self.a_second - 0.5) < 0


class AiComparison(Record):
    """Two answers to a prompt and the probability in (0, 1) that `a` is the better one under the principle of that id.

    `judgement` holds what the judge said in each order, before averaging and clamping.
    """

    id: str
    prompt: Text
    a: Text
    b: Text
    principle: str
    probability: float = Field(gt=0, lt=1)
    judgement: Judgement

    @property
    def label(self) -> float:
        """The probability, in [0.5, 1), that the likelier answer is the better one."""
        return max(self.probability, 1 - self.probability)

    def pair(self, domain: str) -> WeightedPair:
        """As a pair to train on: chosen is the likelier answer, the label soft."""
        chosen, rejected = (self.a, self.b) if self.probability >= 0.5 else (self.b, self.a)
        return WeightedPair(
            id=self.id,
            prompt=self.prompt,
            chosen=chosen,
            rejected=rejected,
            domain=domain,
            source="ai_feedback",
            label=self.label,
        )


class Compared(Record):
    """What became of one prompt: a comparison, or the reason why there is none."""

    id: str
    prompt: str
    comparison: AiComparison | None = None
    dropped: DropReason | None = None


class Measured(Record):
    """What the judge says of one human pair, with the chosen answer as `a`; None where it cannot be told."""

    id: str
    prompt: str
    chosen: str
    rejected: str
    principle: str
    judgement: Judgement | None


def collect_feedback(
    policy: Answerer,
    judge: Answerer,
    prompts: Sequence[Prompt],
    constitution: Constitution,
    config: AiFeedbackConfig,
    *,
    work: Path,
    log: Log = SILENT,
) -> list[Compared]:
    """Two answers of `policy` to every prompt, compared by `judge`; in the order of the prompts.

    Every text is in `work` as soon as it has ended (`policy.jsonl`, `judge.jsonl`), and finished prompts are appended to
    `compared.jsonl` chunk by chunk; nothing that is there is asked for again.
    """
    policy, judge = KeptAnswers(policy, work / "policy.jsonl"), KeptAnswers(judge, work / "judge.jsonl")

    def compare(chunk: Sequence[Prompt]) -> list[Compared]:
        return _compare(policy, judge, chunk, constitution, config, log)

    # Two files may give two prompts the same id.
    return in_chunks(work / "compared.jsonl", Compared, prompts, lambda p: (p.id, p.prompt), compare, config.chunk, log, "RLAIF")


def measure_judge(
    judge: Answerer,
    heldout: Sequence[PreferencePair],
    constitution: Constitution,
    config: AiFeedbackConfig,
    *,
    work: Path,
    log: Log = SILENT,
) -> tuple[dict[str, float], list[Measured]]:
    """How often the judge agrees with people: on `config.max_heldout` of the pairs, drawn by the seed.

    Metrics: heldout/accuracy with its 95 % Wilson interval, the length-only baselines and the gain over them
    (`alignment.reward.accuracy_metrics`, on the probability of either answer), heldout/order_flips, and heldout/unreadable,
    the number of pairs of which the judge could not tell; these take no part in the others.
    """
    judge = KeptAnswers(judge, work / "judge_heldout.jsonl")
    taken = random.Random(config.seed).sample(list(heldout), min(config.max_heldout, len(heldout)))

    def measure(chunk: Sequence[PreferencePair]) -> list[Measured]:
        principles = [draw_principles(constitution, 1, p.id, config.seed)[0] for p in chunk]
        cases = [
            Case(p.id, p.prompt_messages, p.chosen, p.rejected, principle.text)
            for p, principle in zip(chunk, principles, strict=True)
        ]
        said = _judge(judge, cases, config, log)
        return [
            Measured(id=p.id, prompt=p.prompt, chosen=p.chosen, rejected=p.rejected, principle=principle.id, judgement=judgement)
            for p, principle, judgement in zip(chunk, principles, said, strict=True)
        ]

    measured = in_chunks(
        work / "measured.jsonl",
        Measured,
        taken,
        lambda p: (p.id, p.prompt, p.chosen, p.rejected),
        measure,
        config.chunk,
        log,
        "judge against people",
    )
    told = [(p, m.judgement) for p, m in zip(taken, measured, strict=True) if m.judgement is not None]
    likely = [judgement.probability for _, judgement in told]
    metrics = accuracy_metrics([p for p, _ in told], likely, [1 - p for p in likely])
    if told:
        metrics["heldout/order_flips"] = sum(judgement.flipped for _, judgement in told) / len(told)
    if taken:
        metrics["heldout/unreadable"] = len(taken) - len(told)
    return metrics, measured


def feedback_metrics(compared: Sequence[Compared]) -> dict[str, float]:
    """Counts, the labels' mean confidence, and how much the order of the options mattered.

    position/bias is the mean of |p(a better, shown first) - p(a better, shown second)|, position/order_flips the share of
    comparisons in which the order decided the choice, position/first_chosen how often the judge chose whatever came first.
    """
    found = [c.comparison for c in compared if c.comparison is not None]
    metrics = {
        "prompts": float(len(compared)),
        "pairs": float(len(found)),
        "share_compared": len(found) / len(compared),
        **{f"dropped/{reason}": float(n) for reason, n in sorted(Counter(c.dropped for c in compared if c.dropped).items())},
    }
    if not found:
        return metrics
    said = [c.judgement for c in found]
    first = [(j.a_first > 0.5) + (j.a_second < 0.5) for j in said]
    return metrics | {
        "confidence": sum(c.label for c in found) / len(found),
        "position/bias": sum(abs(j.a_first - j.a_second) for j in said) / len(found),
        "position/order_flips": sum(j.flipped for j in said) / len(found),
        "position/first_chosen": sum(first) / (2 * len(found)),
    }


def judge_in_both_orders(
    judge: Answerer,
    cases: Sequence[Case],
    *,
    reasoning: SamplingSettings | None = None,
    seed: int = 0,
    log: Log = SILENT,
) -> list[Judgement | None]:
    """What the judge says of every case, asked twice with the options exchanged; None where either order cannot be told.

    Args:
        reasoning: how its chain of thought is sampled; None: it is asked for its choice at once.
        seed: of the reasoning, together with the case's id.
    """
    if not judge.chooses:  # no reasoning is bought for a choice that cannot be told
        return [None] * len(cases)
    orders = [(c, first, second) for c in cases for first, second in ((c.a, c.b), (c.b, c.a))]
    asked = [
        [_user(comparison_request(c.conversation, first, second, c.principle, reasoning=reasoning is not None))]
        for c, first, second in orders
    ]
    thoughts: list[Completion] = []
    if reasoning is not None:
        seeds = [seed_of(seed, c.id, f"reasoning {i % 2}") for i, (c, _, _) in enumerate(orders)]
        thoughts = judge.answer(asked, reasoning, seeds=seeds, log=log, what="the judge's reasoning")
        asked = [
            [*turns, {"role": "assistant", "content": thought.text or "-"}, _user(verdict_request())]
            for turns, thought in zip(asked, thoughts, strict=True)
        ]
    choices = judge.choose(asked, OPTIONS, log=log)
    out: list[Judgement | None] = []
    for i in range(0, len(choices), 2):
        one, other = choices[i : i + 2]
        if one is None or other is None:
            out.append(None)
        else:
            said = tuple(t.text for t in thoughts[i : i + 2])
            out.append(Judgement(a_first=one[0], a_second=other[1], reasoning=said))
    return out


def prefers_in_both_orders(judge: Answerer, cases: Sequence[Case], *, log: Log = SILENT) -> list[bool | None]:
    """Whether the judge prefers `a` to `b` whichever is shown first; None where it cannot be told."""
    said = judge_in_both_orders(judge, cases, log=log)
    return [None if j is None else j.a_first > 0.5 and j.a_second > 0.5 for j in said]


def keep_preferred(
    judge: Answerer, pairs: Sequence[PreferencePair], principles: Mapping[tuple[str, str], str], *, log: Log = SILENT
) -> tuple[list[PreferencePair], Counter[str]]:
    """The pairs whose chosen answer the judge prefers in both orders, and the others counted by reason.

    Args:
        principles: the text of the principle to judge a pair under, by the pair's (id, prompt).
    """
    cases = [Case(p.id, p.prompt_messages, p.chosen, p.rejected, principles[p.id, p.prompt]) for p in pairs]
    kept, reasons = [], Counter()
    for pair, prefers in zip(pairs, prefers_in_both_orders(judge, cases, log=log), strict=True):
        if prefers:
            kept.append(pair)
        else:
            reasons["judge_unreadable" if prefers is None else "judged_worse"] += 1
    return kept, reasons


def comparison_request(
    conversation: Sequence[Mapping[str, str]], first: str, second: str, principle: str, *, reasoning: bool = False
) -> str:
    """What the judge is asked: the conversation, the principle and two options, `first` as (A) and `second` as (B)."""
    return request("comparison", conversation=conversation, first=first, second=second, principle=principle, reasoning=reasoning)


def verdict_request() -> str:
    """What the judge is asked after its reasoning, in the same conversation."""
    return request("verdict")


def drop_reason(a: Completion, b: Completion, keep_truncated: bool = False) -> DropReason | None:
    """Why two answers are not worth comparing, or None if they are."""
    before, after = normalise(a.text), normalise(b.text)
    if not before or not after:
        return "empty"
    if not (a.ended and b.ended) and not keep_truncated:
        return "truncated"
    return "identical" if before == after else None


def _compare(policy, judge, prompts, constitution, config, log) -> list[Compared]:
    asked = [[_user(p.prompt)] for p in prompts for _ in range(2)]
    seeds = [seed_of(config.seed, p.id, f"answer {i}") for p in prompts for i in range(2)]
    answers = policy.answer(asked, config.answer, seeds=seeds, log=log, what="answers to compare")
    pairs = list(zip(answers[::2], answers[1::2], strict=True))
    principles = [draw_principles(constitution, 1, p.id, config.seed)[0] for p in prompts]
    reasons = [drop_reason(a, b, config.keep_truncated) for a, b in pairs]
    worth = [i for i, reason in enumerate(reasons) if reason is None]
    cases = [Case(prompts[i].id, asked[2 * i], pairs[i][0].text, pairs[i][1].text, principles[i].text) for i in worth]
    said = dict(zip(worth, _judge(judge, cases, config, log), strict=True))
    out = []
    for i, p in enumerate(prompts):
        judgement = said.get(i)
        if judgement is None:
            out.append(Compared(id=p.id, prompt=p.prompt, dropped=reasons[i] or "unreadable"))
            continue
        low, high = config.clamp if config.chain_of_thought else (EDGE, 1 - EDGE)
        comparison = AiComparison(
            id=p.id,
            prompt=p.prompt,
            a=pairs[i][0].text,
            b=pairs[i][1].text,
            principle=principles[i].id,
            probability=min(max(judgement.probability, low), high),
            judgement=judgement,
        )
        out.append(Compared(id=p.id, prompt=p.prompt, comparison=comparison))
    return out


def _judge(judge, cases, config, log) -> list[Judgement | None]:
    reasoning = config.reasoning if config.chain_of_thought else None
    return judge_in_both_orders(judge, cases, reasoning=reasoning, seed=config.seed, log=log) if cases else []


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
