"""Critique and revise: the loop of Constitutional AI (arXiv 2212.08073, section 3.1; section 5 of the user's document).

For every prompt: sample an initial answer; k times, draw a principle without repetition, let the critic criticise the
current answer under it and rewrite it. The initial answer becomes `rejected`, the last revision `chosen`.

Deviations: the revision is asked for in the critic's own conversation, so it sees the principle and the critique without
paying for a second copy of the prompt; where the critic finds nothing, the answer stands and no revision is asked for.
Whether it finds nothing is read from the probability of those words, not from the likeliest text: a small critic that
was taught "No violations found" in some of the cases (18 % in the shipped data) would otherwise say so always, since every
real critique opens differently. A critic that tells no probabilities (an endpoint) finds nothing where its critique says so;
where it refuses to criticise, the answer stands and counts as truncated. Several revisions may be sampled; a judge, usually a
reward model trained on human pairs alone, picks the best, and says whether it is better than the initial answer (rejection
sampling, as in arXiv 2112.09332; the evaluator takes no part in it).
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from alignment import asking
from alignment.constitutions import Constitution, Principle, finds_nothing
from alignment.critic import Answerer, AnswererSettings, KeptAnswers
from alignment.fingerprint import layout
from alignment.finished import in_chunks
from alignment.generation import Completion, SamplingSettings
from alignment.models import Config, LoadSettings
from alignment.pair_filters import FilterSettings, reject_reason
from alignment.progress import SILENT, Log
from alignment.readers import NO_VIOLATIONS
from alignment.records import Conversation, CritiqueDemonstration, Message, PreferencePair, Prompt, Record
from alignment.reward import score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CODE_VERSION = "3"

Judge = Callable[[Sequence[tuple[str, str]]], list[float]]  # the reward of each (prompt, answer)


class CritiqueConfig(Config):
    """Settings of critique-and-revise."""

    sampler: AnswererSettings = Field(AnswererSettings(), description="Who gives the initial answers")
    critic: AnswererSettings = Field(AnswererSettings(), description="Who criticises and revises them")
    rounds: int = Field(2, ge=1, description="Critique-and-revise rounds per prompt, each with a principle of its own")
    max_prompts: int = Field(0, ge=0, description="Use only this many of the constitution's training prompts; 0: all")
    prompt_tags: list[str] = Field(
        [],
        description="Only prompts that also carry one of these tags; empty: all of the constitution's. The paper criticises "
        "answers to red-team prompts only: harmful-intent",
    )
    answer: SamplingSettings = Field(
        SamplingSettings(temperature=1.0, max_new_tokens=128), description="How the initial answers are sampled"
    )
    critique: SamplingSettings = Field(
        SamplingSettings(temperature=0.0, max_new_tokens=96), description="How critiques are sampled"
    )
    revision: SamplingSettings = Field(
        SamplingSettings(temperature=0.0, max_new_tokens=128), description="How revisions are sampled"
    )
    no_violation_threshold: float = Field(
        0.5,
        gt=0,
        le=1,
        description="A local critic finds nothing when the probability that it says so is at least this; 1: always "
        "revise. An endpoint's finds nothing when its critique says so",
    )
    candidates: int = Field(
        1, ge=1, description="Revisions sampled per critique; of those the filters let through, the judge picks the best"
    )
    filters: FilterSettings = Field(FilterSettings(), description="Which revisions are worth training on")
    load: LoadSettings = Field(LoadSettings(), description="How critic and judge are loaded")
    score_batch_size: int = Field(64, ge=1, **layout("Answers the judge scores at once"))
    chunk: int = Field(64, ge=1, **layout("Prompts taken through all rounds before their results are saved"))
    seed: int = Field(0, ge=0, description="Seed of the principles drawn and the answers sampled")


class Round(Record):
    """One round: the principle's id, what the critic said of the answer before, and the answer after."""

    principle: str
    critique: str
    revision: str
    revised: bool


class Revised(Record):
    """A prompt's way through the loop: as in the document, `initial`, `revisions` and `final`.

    `truncated`: the initial answer or a revision hit the token limit, or one of them or a critique was refused. `reward_*`: the
    judge's score of the initial and of the final answer, None without a judge.
    """

    id: str
    prompt: str
    tags: tuple[str, ...] = ()
    initial: str
    revisions: tuple[Round, ...]
    final: str
    truncated: bool
    reward_initial: float | None = None
    reward_final: float | None = None


def critique_and_revise(
    sampler: Answerer,
    critic: Answerer,
    prompts: Sequence[Prompt],
    constitution: Constitution,
    config: CritiqueConfig,
    *,
    judge: Judge | None = None,
    work: Path,
    log: Log = SILENT,
) -> list[Revised]:
    """Take every prompt through the loop. Without a judge the first candidate is taken that the filters let through.

    Every generation is in `work` as soon as it has ended (`sampler.jsonl`, `critic.jsonl`), and every prompt that is through
    in `rounds.jsonl`; nothing that is there is generated again.
    """
    loop = _Loop(
        KeptAnswers(sampler, work / "sampler.jsonl"), KeptAnswers(critic, work / "critic.jsonl"), judge, constitution, config, log
    )
    return in_chunks(
        work / "rounds.jsonl",
        Revised,
        prompts,
        lambda p: (p.id, p.prompt),  # two files may give two prompts the same id
        loop.revise,
        config.chunk,
        log,
        "critique and revise",
        lambda results: f"{sum(r.final != r.initial for r in results)} of the last {len(results)} answers revised",
    )


def reward_judge(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Judge:
    """A reward model as the judge of the loop."""

    def rewards(answers: Sequence[tuple[str, str]]) -> list[float]:
        told = [[{"role": "user", "content": p}, {"role": "assistant", "content": a or " "}] for p, a in answers]
        return score(model, tokenizer, told, batch_size)

    return rewards


def preference_pairs(
    revised: Sequence[Revised], constitution: Constitution, filters: FilterSettings
) -> tuple[list[PreferencePair], Counter[str]]:
    """Pairs (rejected = initial, chosen = final) worth training on, and how many were left out by reason."""
    pairs, reasons = [], Counter()
    for r in revised:
        gain = None if r.reward_final is None or r.reward_initial is None else r.reward_final - r.reward_initial
        reason = reject_reason(r.prompt, r.initial, r.final, r.truncated, gain, filters, r.tags)
        if reason is None:
            pairs.append(
                PreferencePair(
                    id=r.id,
                    prompt=r.prompt,
                    chosen=r.final,
                    rejected=r.initial,
                    domain=constitution.name,
                    source="constitutional",
                )
            )
        else:
            reasons[reason] += 1
    return pairs, reasons


def draw_principles(constitution: Constitution, rounds: int, prompt_id: str, seed: int) -> list[Principle]:
    """`rounds` different principles (all of them, if there are fewer), decided by the prompt and the seed alone."""
    rng = random.Random(f"{seed}/{constitution.name}/{prompt_id}")
    return rng.sample(constitution.principles, min(rounds, len(constitution.principles)))


def critique_request(prompt: str, response: str, principle: str, request: str | None = None) -> str:
    """What the critic is asked, in the words of the user's document or those of the principle's own `request`."""
    return asking.request("critique", prompt=prompt, response=response, principle=principle, request=request)


def revision_request(request: str | None = None) -> str:
    """What the critic is asked after its critique, in the same conversation."""
    return asking.request("revision", request=request)


def worked_examples(constitution: Constitution, principle: Principle) -> list[dict[str, str]]:
    """The constitution's examples for a principle as earlier turns of the critic's conversation; asked as it is asked itself."""
    turns = []
    for example in constitution.examples:
        if example.principle not in (None, principle.id):
            continue
        asked = critique_request(example.prompt, example.response, principle.text, principle.critique_request)
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": example.critique}]
        if example.revision is not None:
            turns += [
                {"role": "user", "content": revision_request(principle.revision_request)},
                {"role": "assistant", "content": example.revision},
            ]
    return turns


def critique_conversation(demonstration: CritiqueDemonstration) -> Conversation:
    """The conversation that teaches one worked critique: request, critique and, unless nothing was found, the revision.

    Exactly what the critic is asked later, turn for turn.
    """
    d = demonstration
    turns = [
        Message(role="user", content=critique_request(d.prompt, d.response, d.principle)),
        Message(role="assistant", content=d.critique),
    ]
    if d.revision is not None:
        turns += [Message(role="user", content=revision_request()), Message(role="assistant", content=d.revision)]
    return Conversation(id=d.id, messages=tuple(turns), category="critique")


class _Loop:
    def __init__(
        self,
        sampler: Answerer,
        critic: Answerer,
        judge: Judge | None,
        constitution: Constitution,
        config: CritiqueConfig,
        log: Log,
    ) -> None:
        self._sampler, self._critic, self._judge = sampler, critic, judge
        self._constitution, self._config, self._log = constitution, config, log

    def revise(self, prompts: Sequence[Prompt]) -> list[Revised]:
        config, everyone = self._config, range(len(prompts))
        initial = self._sampler.answer(
            [[{"role": "user", "content": p.prompt}] for p in prompts],
            config.answer,
            seeds=[self._seed(p, "answer") for p in prompts],
            log=self._log,
            what="initial answers",
        )
        principles = [draw_principles(self._constitution, config.rounds, p.id, config.seed) for p in prompts]
        current = [c.text for c in initial]
        truncated = [not c.ended for c in initial]
        reward_initial = self._rewards(prompts, current)
        reward_final = list(reward_initial)
        rounds: list[list[Round]] = [[] for _ in prompts]
        for k in range(len(principles[0])):
            asked = [self._asked(p, current[i], principles[i][k]) for i, p in enumerate(prompts)]
            said = self._critiques(prompts, asked, k)
            refused = {i for i, critique in said.items() if not (critique.text or critique.tokens or critique.ended)}
            faulty = [i for i in everyone if i in said and i not in refused and not finds_nothing(said[i].text)]
            requests = [
                [
                    *asked[i],
                    {"role": "assistant", "content": said[i].text or "-"},
                    {"role": "user", "content": revision_request(principles[i][k].revision_request)},
                ]
                for i in faulty
            ]
            best = self._best_revisions([prompts[i] for i in faulty], [current[i] for i in faulty], requests, k)
            chosen = dict(zip(faulty, best, strict=True))
            for i in everyone:
                if i in chosen:
                    reward_final[i], revision = chosen[i]
                    current[i], truncated[i] = revision.text, truncated[i] or not revision.ended
                truncated[i] = truncated[i] or i in refused
                rounds[i].append(
                    Round(
                        principle=principles[i][k].id,
                        critique=said[i].text if i in said else f"{NO_VIOLATIONS}.",
                        revision=current[i],
                        revised=i in chosen,
                    )
                )
        return [
            Revised(
                id=p.id,
                prompt=p.prompt,
                tags=p.tags,
                initial=initial[i].text,
                revisions=tuple(rounds[i]),
                final=current[i],
                truncated=truncated[i],
                reward_initial=reward_initial[i],
                reward_final=reward_final[i],
            )
            for i, p in enumerate(prompts)
        ]

    def _asked(self, prompt: Prompt, answer: str, principle: Principle) -> list[dict[str, str]]:
        asked = critique_request(prompt.prompt, answer, principle.text, principle.critique_request)
        return [*worked_examples(self._constitution, principle), {"role": "user", "content": asked}]

    def _critiques(self, prompts: Sequence[Prompt], asked: Sequence[list[dict[str, str]]], k: int) -> dict[int, Completion]:
        # By the prompt's number; those of whom the critic says beforehand that it finds nothing are left out.
        config, faulty = self._config, list(range(len(prompts)))
        if config.no_violation_threshold < 1:
            approval = self._critic.probability(asked, NO_VIOLATIONS)
            if approval is not None:
                faulty = [i for i in faulty if approval[i] < config.no_violation_threshold]
        critiques = self._critic.answer(
            [asked[i] for i in faulty],
            config.critique,
            seeds=[self._seed(prompts[i], f"critique {k}") for i in faulty],
            not_first=NO_VIOLATIONS,
            continued=True,
            log=self._log,
            what="critiques",
        )
        return dict(zip(faulty, critiques, strict=True))

    def _best_revisions(
        self, prompts: Sequence[Prompt], answers: Sequence[str], requests: Sequence[list[dict[str, str]]], k: int
    ) -> list[tuple[float | None, Completion]]:
        # Of each prompt's candidates the one with the highest reward among those that the filters let through.
        config = self._config
        sampled = [(i, j) for i in range(len(prompts)) for j in range(config.candidates)]
        revisions = self._critic.answer(
            [requests[i] for i, _ in sampled],
            config.revision,
            seeds=[self._seed(prompts[i], f"revision {k} {j}") for i, j in sampled],
            log=self._log,
            what="revisions",
        )
        rewards = self._rewards([prompts[i] for i, _ in sampled], [r.text for r in revisions])
        # What decides about pairs, gain and first answer, is no fault of a candidate: after a round the answer may well decline.
        anything_better = config.filters.model_copy(update={"min_reward_gain": -math.inf, "keep_already_declined": True})
        best: dict[int, tuple[bool, float | None, Completion]] = {}
        for (i, _), revision, reward in zip(sampled, revisions, rewards, strict=True):
            p = prompts[i]
            reason = reject_reason(p.prompt, answers[i], revision.text, not revision.ended, reward, anything_better, p.tags)
            if i not in best or (reason is None, reward or 0.0) > (best[i][0], best[i][1] or 0.0):
                best[i] = (reason is None, reward, revision)
        return [best[i][1:] for i in range(len(prompts))]

    def _rewards(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float | None]:
        if self._judge is None or not prompts:
            return [None] * len(prompts)
        return list(self._judge([(p.prompt, a) for p, a in zip(prompts, answers, strict=True)]))

    def _seed(self, prompt: Prompt, what: str) -> int:
        return asking.seed_of(self._config.seed, prompt.id, what)
