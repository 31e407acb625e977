"""Recipes: one YAML with the values of every stage. What a recipe does not name keeps the default of its config class.

extends: demo          # optional: start from another recipe in the same folder
sft_checkpoint:
  optim: {epochs: 2, learning_rate: 0.0002}
aligned_policy/dpo:
  beta: 0.1
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from alignment.errors import UserError
from alignment.models import NEVER_SHOWN, Config

C = TypeVar("C", bound=Config)
# libyaml's parser where PyYAML has it: the recipe is read by every process that loads the definitions.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class RecipeError(UserError):
    """A recipe that cannot be used; the message names the file and the key."""


class Recipe:
    """A recipe's values by stage (an asset's key)."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self._values = path, values

    @property
    def name(self) -> str:
        """The file's stem."""
        return self.path.stem

    @property
    def stages(self) -> list[str]:
        """The stages it gives values for."""
        return list(self._values)

    def config(self, stage: str, kind: type[C]) -> C:
        """The configuration of a stage: the recipe's values over the class's defaults.

        Raises:
            RecipeError: an unknown key, or a value of the wrong type or out of bounds.
        """
        try:
            return kind.model_validate(_over(kind().model_dump(), self._values.get(stage, {})))
        except ValidationError as error:
            raise RecipeError(f"{self.path}: {describe(error, stage)}") from error


def load_recipe(path: Path, shipped: Path | None = None) -> Recipe:
    """Read a recipe and what it extends: a recipe beside it, or one of the folder `shipped`.

    Raises:
        RecipeError: missing file, bad YAML, or a recipe that extends itself.
    """
    return Recipe(path, _read(path, (), shipped))


def describe(error: ValidationError, prefix: str = "") -> str:
    """A validation error as one sentence per faulty key, with the value given unless that may hold a password or a key."""
    parts = []
    for e in error.errors():
        key = ".".join(str(p) for p in ((prefix,) if prefix else ()) + e["loc"])
        shown = e["type"] not in {"missing", "extra_forbidden", NEVER_SHOWN} and not _may_tell_a_secret(e["input"])
        given = f" (got {e['input']!r})" if shown else ""
        message = "is not a known key" if e["type"] == "extra_forbidden" else e["msg"]
        parts.append(f"key {key!r}: {message}{given}")
    return "; ".join(parts)


def _may_tell_a_secret(value: Any) -> bool:
    # Settings as a whole, which a rule about several of them is given, and an address with a password or a query.
    if isinstance(value, list):
        return any(map(_may_tell_a_secret, value))
    return isinstance(value, Mapping) or bool(re.search(r"://.*[@?]", str(value), re.DOTALL))


def _read(path: Path, seen: tuple[Path, ...], shipped: Path | None) -> dict[str, Any]:
    if path in seen:
        raise RecipeError(f"{path}: extends itself, through {' -> '.join(p.stem for p in seen)}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _LOADER) or {}
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml"))) or "none"
        raise RecipeError(f"{path}: no such recipe. Remedy: choose one of {known}, or write it.") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path}: is not readable YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: must map each stage to a mapping of its settings")
    for key, value in values.items():
        if key != "extends" and not isinstance(value, dict):
            raise RecipeError(
                f"{path}: key {key!r}: must be a stage with a mapping of its settings (got {value!r}). Remedy: put a setting "
                "below its stage, as in `human_preferences: {preferences: [mine.jsonl]}`."
            )
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str) or not re.fullmatch(r"[\w-]+", parent):
        raise RecipeError(f"{path}: key 'extends': {parent!r} is not the name of a recipe")
    below = path.with_name(f"{parent}.yaml")
    if shipped is not None and not below.exists():
        below = shipped / below.name
    return _over(_read(below, (*seen, path), shipped), values)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _over(out[key], value) if both else value
    return out
