"""Dagster run-config classes made from the library's configuration classes: same fields, same descriptions, with the
recipe's values as defaults, so that the launchpad opens with what the recipe says.

Bounds are left out here and checked when the step starts: Dagster would treat a violated bound as a crash and retry it.
Null is let through for the same reason: Dagster's schema allows it wherever there is a default.
"""

from typing import Any, Literal, Union, get_args, get_origin

import dagster as dg
from pydantic import BaseModel, ConfigDict, Field, create_model

from alignment.models import Config


def launch_config(stage: str, config: Config) -> type[dg.Config]:
    """The run-config class of a stage; `config` holds the recipe's values. Adds the key `force`."""
    force = (bool | None, Field(False, description="Compute anew although nothing has changed"))
    return _convert(f"{stage.replace('/', '_')}_config", config, {"force": force})


class _Launched(dg.Config):
    # A validator is made when a step starts, which needs one; making those of all stages took half the time of loading.
    model_config = ConfigDict(defer_build=True)


def _convert(name: str, config: BaseModel, extra: dict[str, Any]) -> type[dg.Config]:
    fields: dict[str, Any] = {}
    for key, info in type(config).model_fields.items():
        value = getattr(config, key)
        if isinstance(value, BaseModel):
            nested = _nested(value)
            fields[key] = (nested, Field(default_factory=nested, description=info.description))
        else:
            fields[key] = (_nullable(info.annotation), Field(default=value, description=info.description))
    model: type[dg.Config] = create_model(name, __base__=_Launched, **fields, **extra)
    model.__doc__ = type(config).__doc__
    return model


_NESTED: dict[tuple[type[BaseModel], str], type[dg.Config]] = {}


def _nested(config: BaseModel) -> type[dg.Config]:
    # Many stages hold the same settings with the same values (how an adapter is shaped, how a model is loaded).
    key = type(config), repr(config)
    if key not in _NESTED:
        _NESTED[key] = _convert(type(config).__name__, config, {})
    return _NESTED[key]


def _nullable(annotation: Any) -> Any:
    # Dagster shows a choice as such only when it is not optional, and refuses null for it.
    return annotation if get_origin(annotation) is Literal else _plain(annotation) | None


def _plain(annotation: Any) -> Any:
    origin = get_origin(annotation)
    if origin in (list, dict, tuple, Union):
        return origin[tuple(_plain(a) for a in get_args(annotation))]
    return annotation
