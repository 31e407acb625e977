"""Constitutions: a YAML of principles per domain, and nothing else. A new one needs no Python.

    description: What an assistant under this constitution is like.
    prompt_tags: [general]            # prompts with one of these tags are used for it
    critique_tags: [harmful-intent]   # optional: criticise answers to these only, whatever the recipe says
    principles:
      - id: honest
        text: Please choose the response that is the most helpful, harmless, and honest.
        critique_request: Say where the response above is dishonest.       # optional: in place of the usual request
        revision_request: Rewrite the response so that all of it is true.  # optional
    examples:                         # optional: shown to the critic as earlier turns of its conversation
      - prompt: Is the earth flat?
        response: "Yes."
        critique: The response states a falsehood.
        revision: No, it is round.    # left out where the critique finds nothing
        principle: honest             # shown under this principle only; left out: under all

Source of the method: Constitutional AI, arXiv 2212.08073, section 3.1.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import Field, ValidationError, model_validator

from alignment.errors import UserError
from alignment.models import Config
from alignment.readers import NO_VIOLATIONS
from alignment.records import PreferencePair, Prompt, Text


class ConstitutionError(UserError):
    """A constitution file that cannot be used; the message names file and key."""


class Principle(Config):
    """One rule the critic holds an answer against."""

    id: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="Short name, used in tables and metrics")
    text: Text = Field(description="The principle, as the critic reads it")
    critique_request: Text | None = Field(None, description="What the critic is asked in place of the usual request")
    revision_request: Text | None = Field(None, description="What it is asked after its critique, in place of the usual request")


class CritiqueExample(Config):
    """A worked critique that the critic is shown before its own task (few-shot)."""

    prompt: Text = Field(description="What the user asked")
    response: Text = Field(description="The answer that is criticised")
    critique: Text = Field(description='What a good critic says of it; "No violations found." where there is nothing to say')
    revision: Text | None = Field(None, description="The answer rewritten; left out where the critique finds nothing")
    principle: str | None = Field(None, description="Id of the principle it is shown under; left out: all")


class Constitution(Config):
    """A named set of principles and the tags of the prompts they apply to."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="The file's stem; the partition key")
    description: Text = Field(description="One or two sentences for people")
    prompt_tags: tuple[str, ...] = Field(min_length=1, description="A prompt with any of these tags belongs to it")
    critique_tags: tuple[str, ...] | None = Field(
        None,
        description="Of its prompts, criticise answers to those that also carry one of these tags; [] means all of them. Absent: "
        "the recipe decides (prompt_tags of constitutional_preference_pairs)",
    )
    preference_domains: tuple[str, ...] = Field(
        (), description="Domains of human pairs its reward models and policies learn from; empty: all"
    )
    principles: tuple[Principle, ...] = Field(min_length=1, description="At least one principle")
    examples: tuple[CritiqueExample, ...] = Field((), description="Worked critiques shown to the critic before its own task")
    text: str = Field(description="The file's content, part of every fingerprint under this constitution")

    @model_validator(mode="after")
    def _ids_unique(self) -> "Constitution":
        ids = [p.id for p in self.principles]
        twice = sorted({i for i in ids if ids.count(i) > 1})
        if twice:
            raise ValueError(f"principles: id {twice[0]!r} occurs twice")
        return self

    @model_validator(mode="after")
    def _examples_usable(self) -> "Constitution":
        known = {p.id for p in self.principles}
        for i, example in enumerate(self.examples):
            if example.principle is not None and example.principle not in known:
                raise ValueError(f"examples.{i}.principle: no principle has the id {example.principle!r}")
            if (example.revision is None) != finds_nothing(example.critique):
                raise ValueError(
                    f"examples.{i}.revision: must be left out where the critique begins with {NO_VIOLATIONS!r}, and only there"
                )
        return self


def load_constitution(path: Path) -> Constitution:
    """Read one constitution.

    Raises:
        ConstitutionError: missing file, bad YAML, unknown or missing key; names file and key.
    """
    try:
        text = path.read_text(encoding="utf-8")
        raw = yaml.safe_load(text)
    except FileNotFoundError:
        raise ConstitutionError(f"{path}: no such constitution. Remedy: write it, or ask for one that exists.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConstitutionError(f"{path}: is not readable YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConstitutionError(f"{path}: must be a mapping with the keys description, prompt_tags and principles")
    try:
        return Constitution(name=path.stem, text=text, **raw)
    except (ValidationError, TypeError) as error:
        raise ConstitutionError(f"{path}: {_first_error(error)}") from error


def finds_nothing(critique: str) -> bool:
    """Whether a critique's text says that there is nothing to criticise, whatever quotes, asterisks or dashes it opens with."""
    return re.sub(r"^[\W_]+", "", critique).lower().startswith(NO_VIOLATIONS.lower())


def prompts_under(prompts: Sequence[Prompt], constitution: Constitution, further: Sequence[str]) -> list[Prompt]:
    """The prompts that belong to a constitution and also carry one of the `further` tags (empty: all of its), in their order."""
    own, also = set(constitution.prompt_tags), set(further)
    return [p for p in prompts if own & set(p.tags) and (not also or also & set(p.tags))]


def prompts_to_criticise(prompts: Sequence[Prompt], constitution: Constitution, recipe_tags: Sequence[str]) -> list[Prompt]:
    """The prompts whose answers are criticised under a constitution, in their order.

    Args:
        recipe_tags: the recipe's restriction, used where the constitution has no `critique_tags`; empty: none.
    """
    return prompts_under(prompts, constitution, recipe_tags if constitution.critique_tags is None else constitution.critique_tags)


def pairs_under(pairs: Sequence[PreferencePair], domains: Sequence[str]) -> list[PreferencePair]:
    """The human pairs of these `preference_domains` (empty: all of them), in their order."""
    return [p for p in pairs if not domains or p.domain in domains]


def no_prompts(constitution: Constitution, further: Sequence[str], where: str) -> ConstitutionError:
    """The error that no training prompt belongs to a constitution and carries one of the `further` tags, which stand `where`."""
    also = f" and one of {list(further)} ({where})" if further else ""
    return ConstitutionError(
        f"constitution {constitution.name}: no training prompt has one of the tags {list(constitution.prompt_tags)}{also}. "
        "Remedy: add prompts with such tags, or correct the tags."
    )


def no_human_pairs(constitution: Constitution) -> ConstitutionError:
    """The error that no human pair to train on is of one of a constitution's domains."""
    return ConstitutionError(
        f"constitution {constitution.name}: no human pair to train on has one of its preference_domains "
        f"{list(constitution.preference_domains)}. Remedy: add pairs of such a domain to the files of "
        "human_preferences.preferences, or correct preference_domains (without it all human pairs count)."
    )


def constitution_names(folder: Path) -> list[str]:
    """The partition keys: stems of all YAML files in the folder, sorted."""
    return sorted(p.stem for p in folder.glob("*.yaml"))


def _first_error(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    return f"key {key!r}: {first['msg']}" if key else first["msg"]
