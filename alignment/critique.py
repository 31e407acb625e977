"""Critique and revise: the loop of Constitutional AI (arXiv 2212.08073, section 3.1; section 5 of the user's document).

For every prompt: sample an initial answer; k times, draw a principle without repetition, let the critic criticise the
current answer under it and rewrite it. The initial answer becomes `rejected`, the last revision `chosen`.

Deviations: the revision is asked for in the critic's own conversation, so it sees the principle and the critique without
paying for a second copy of the prompt; where the critic finds nothing, the answer stands and no revision is asked for.
Whether it finds nothing is read from the probability of those words, not from the likeliest text: a small critic that
was taught "No violations found" in a third of the cases would otherwise say so always, since every real critique opens
differently. Several revisions may be sampled; a reward model trained on human pairs alone picks the best, and says whether
it is better than the initial answer (rejection sampling, as in arXiv 2112.09332; the evaluator takes no part in it).
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from alignment.constitutions import Constitution, Principle
from alignment.fingerprint import layout
from alignment.generation import Completion, SamplingSettings, generate
from alignment.likelihood import answer_log_probs
from alignment.models import Config, LoadSettings
from alignment.pair_filters import FilterSettings, reject_reason
from alignment.progress import SILENT, Log, Progress
from alignment.readers import NO_VIOLATIONS
from alignment.records import Conversation, CritiqueDemonstration, Message, PreferencePair, Prompt, Record
from alignment.reward import score

if TYPE_CHECKING:
    from jinja2 import Template
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CODE_VERSION = "1"


class CritiqueConfig(Config):
    """Settings of critique-and-revise."""

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
        description="The critic finds nothing when the probability that it says so is at least this; 1: always revise",
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

    `truncated`: the initial answer or a revision hit the token limit. `reward_*`: the judge's score of the initial and of
    the final answer.
    """

    id: str
    prompt: str
    tags: tuple[str, ...] = ()
    initial: str
    revisions: tuple[Round, ...]
    final: str
    truncated: bool
    reward_initial: float
    reward_final: float


def critique_and_revise(
    model: PreTrainedModel,
    judge: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    constitution: Constitution,
    config: CritiqueConfig,
    *,
    work: Path,
    log: Log = SILENT,
) -> list[Revised]:
    """Take every prompt through the loop; `judge` is a reward model over the same tokenizer.

    Finished prompts are appended to `work/rounds.jsonl` chunk by chunk, so a killed run loses at most one chunk; what that
    file already holds is not generated again.
    """
    path = work / "rounds.jsonl"
    done = {(r.id, r.prompt): r for r in _read_finished(path)}  # two files may give two prompts the same id
    todo = [p for p in prompts if (p.id, p.prompt) not in done]
    if done:
        log.say(f"critique and revise: {len(done)} of {len(prompts)} prompts were already done")
    progress = Progress(log, "critique and revise", len(todo))
    for start in range(0, len(todo), config.chunk):
        chunk = todo[start : start + config.chunk]
        results = _revise_chunk(model, judge, tokenizer, chunk, constitution, config, log)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(r.model_dump_json() + "\n" for r in results)
        done |= {(r.id, r.prompt): r for r in results}
        changed = sum(r.final != r.initial for r in results)
        progress.advance(len(chunk), f"{changed} of the last {len(chunk)} answers revised")
    return [done[p.id, p.prompt] for p in prompts]


def preference_pairs(
    revised: Sequence[Revised], constitution: Constitution, filters: FilterSettings
) -> tuple[list[PreferencePair], Counter[str]]:
    """Pairs (rejected = initial, chosen = final) worth training on, and how many were left out by reason."""
    pairs, reasons = [], Counter()
    for r in revised:
        gain = r.reward_final - r.reward_initial
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


def critique_request(prompt: str, response: str, principle: str) -> str:
    """What the critic is asked, in the words of the user's document."""
    return _template("critique").render(prompt=prompt, response=response, principle=principle)


def revision_request() -> str:
    """What the critic is asked after its critique, in the same conversation."""
    return _template("revision").render()


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


def _revise_chunk(model, judge, tokenizer, prompts, constitution, config, log) -> list[Revised]:
    def seeds(rows: Sequence[int], what: str) -> list[int]:
        return [_seed(config.seed, prompts[i].id, what) for i in rows]

    def asked(i: int, k: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": critique_request(prompts[i].prompt, current[i], principles[i][k].text)}]

    def rewards(rows: Sequence[int], answers: Sequence[str]) -> list[float]:
        told = [[*questions[i], {"role": "assistant", "content": a or " "}] for i, a in zip(rows, answers, strict=True)]
        return score(judge, tokenizer, told, config.score_batch_size)

    everyone = range(len(prompts))
    questions = [[{"role": "user", "content": p.prompt}] for p in prompts]
    initial = generate(
        model, tokenizer, questions, config.answer, seeds=seeds(everyone, "answer"), log=log, what="initial answers"
    )
    principles = [draw_principles(constitution, config.rounds, p.id, config.seed) for p in prompts]
    current = [c.text for c in initial]
    truncated = [not c.ended for c in initial]
    reward_initial = rewards(everyone, current)
    reward_final = list(reward_initial)
    anything_better = config.filters.model_copy(update={"min_reward_gain": -math.inf})
    rounds: list[list[Round]] = [[] for _ in prompts]
    for k in range(len(principles[0])):
        faulty = list(everyone)
        if config.no_violation_threshold < 1:
            approval = _approval(model, tokenizer, [asked(i, k) for i in everyone], config)
            faulty = [i for i in everyone if approval[i] < config.no_violation_threshold]
        requests = [asked(i, k) for i in faulty]
        critiques = generate(
            model,
            tokenizer,
            requests,
            config.critique,
            seeds=seeds(faulty, f"critique {k}"),
            not_first=NO_VIOLATIONS,
            log=log,
            what="critiques",
        )
        requests = [
            [*r, {"role": "assistant", "content": c.text or "-"}, {"role": "user", "content": revision_request()}]
            for r, c in zip(requests, critiques, strict=True)
        ]
        sampled = [(i, r, j) for i, r in zip(faulty, requests, strict=True) for j in range(config.candidates)]
        revisions = generate(
            model,
            tokenizer,
            [r for _, r, _ in sampled],
            config.revision,
            seeds=[_seed(config.seed, prompts[i].id, f"revision {k} {j}") for i, _, j in sampled],
            log=log,
            what="revisions",
        )
        scores = rewards([i for i, _, _ in sampled], [r.text for r in revisions])
        best: dict[int, tuple[bool, float, Completion]] = {}
        for (i, _, _), revision, reward in zip(sampled, revisions, scores, strict=True):
            reason = reject_reason(
                prompts[i].prompt, current[i], revision.text, not revision.ended, reward, anything_better, prompts[i].tags
            )
            if i not in best or (reason is None, reward) > best[i][:2]:
                best[i] = (reason is None, reward, revision)
        said = {i: c.text for i, c in zip(faulty, critiques, strict=True)}
        for i in everyone:
            if i in best:
                _, reward_final[i], revision = best[i]
                current[i], truncated[i] = revision.text, truncated[i] or not revision.ended
            rounds[i].append(
                Round(
                    principle=principles[i][k].id,
                    critique=said.get(i, f"{NO_VIOLATIONS}."),
                    revision=current[i],
                    revised=i in best,
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


def _approval(model, tokenizer, requests, config) -> list[float]:
    said = [NO_VIOLATIONS] * len(requests)
    return [math.exp(lp) for lp in answer_log_probs(model, tokenizer, requests, said, config.critique.batch_size)]


def _read_finished(path: Path) -> list[Revised]:
    if not path.exists():
        return []
    finished = []
    for line in path.read_bytes().decode("utf-8", errors="replace").split("\n"):
        try:
            finished.append(Revised(**json.loads(line)))
        except ValueError:  # the line that a kill cut short; its prompt is simply done again
            continue
    path.write_text("".join(r.model_dump_json() + "\n" for r in finished), encoding="utf-8")
    return finished


def _seed(seed: int, *names: str) -> int:
    digest = hashlib.sha256("\0".join([str(seed), *names]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@cache
def _template(name: str) -> Template:
    from jinja2 import StrictUndefined, Template

    text = files("alignment").joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8")
    return Template(text, undefined=StrictUndefined)
