"""Constitutions: a YAML of principles per domain, and nothing else. A new one needs no Python.

    description: What an assistant under this constitution is like.
    prompt_tags: [general]            # prompts with one of these tags are used for it
    critique_tags: [harmful-intent]   # optional: criticise answers to these only, whatever the recipe says
    principles:
      - id: honest
        text: Please choose the response that is the most helpful, harmless, and honest.

Source of the method: Constitutional AI, arXiv 2212.08073, section 3.1.
"""

from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import Field, ValidationError, model_validator

from alignment.errors import UserError
from alignment.models import Config
from alignment.records import Prompt, Text


class ConstitutionError(UserError):
    """A constitution file that cannot be used; the message names file and key."""


class Principle(Config):
    """One rule the critic holds an answer against."""

    id: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="Short name, used in tables and metrics")
    text: Text = Field(description="The principle, as the critic reads it")


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
    preference_domains: tuple[str, ...] = Field((), description="Domains of human pairs its reward models learn from; empty: all")
    principles: tuple[Principle, ...] = Field(min_length=1, description="At least one principle")
    text: str = Field(description="The file's content, part of every fingerprint under this constitution")

    @model_validator(mode="after")
    def _ids_unique(self) -> "Constitution":
        ids = [p.id for p in self.principles]
        twice = sorted({i for i in ids if ids.count(i) > 1})
        if twice:
            raise ValueError(f"principles: id {twice[0]!r} occurs twice")
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


def prompts_to_criticise(prompts: Sequence[Prompt], constitution: Constitution, recipe_tags: Sequence[str]) -> list[Prompt]:
    """The prompts whose answers are criticised under a constitution, in their order.

    Args:
        recipe_tags: the recipe's restriction, used where the constitution has no `critique_tags`; empty: none.
    """
    own = set(constitution.prompt_tags)
    further = set(recipe_tags if constitution.critique_tags is None else constitution.critique_tags)
    return [p for p in prompts if own & set(p.tags) and (not further or further & set(p.tags))]


def constitution_names(folder: Path) -> list[str]:
    """The partition keys: stems of all YAML files in the folder, sorted."""
    return sorted(p.stem for p in folder.glob("*.yaml"))


def _first_error(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    return f"key {key!r}: {first['msg']}" if key else first["msg"]
