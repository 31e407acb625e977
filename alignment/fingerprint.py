"""Content addresses: equal fingerprints mean the same computation on the same inputs.

A fingerprint covers what decides the result (asset, code version, configuration, input fingerprints, constitution text)
and leaves out where and how it runs (device, paths, micro-batch layout), so that moving a pipeline to another machine
recomputes nothing.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel


def layout(description: str, **kwargs: Any) -> dict[str, Any]:
    """Arguments for a pydantic `Field` that changes how a computation is laid out, never its result.

    Such fields are left out of the fingerprint: `micro_batch_size: int = Field(8, **layout("..."))`.
    """
    return {"description": description, "json_schema_extra": {"layout": True}, **kwargs}


def identity(config: BaseModel) -> dict[str, Any]:
    """The JSON-ready part of a configuration that decides the result, nested models included."""
    out: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, Mapping) and extra.get("layout"):
            continue
        value = getattr(config, name)
        out[name] = identity(value) if isinstance(value, BaseModel) else json.loads(json.dumps(value, default=str))
    return out


def fingerprint(
    *,
    asset: str,
    code_version: str,
    config: BaseModel,
    inputs: Mapping[str, str],
    constitution: str | None = None,
) -> str:
    """sha256 (hex, 64 characters) over the canonical JSON of everything that decides an asset's content."""
    payload = {
        "asset": asset,
        "code_version": code_version,
        "config": identity(config),
        "inputs": dict(inputs),
        "constitution": constitution,
    }
    canonical = json.dumps(payload, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
