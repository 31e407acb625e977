"""Which layers LoRA adapts: the user's document names q_proj and v_proj, and not every architecture has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from alignment.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def target_layers(wanted: Sequence[str], model: PreTrainedModel) -> set[str]:
    """Names, or ends of names, of the layers that `lora.target_modules` means on this model.

    Raises:
        UserError: the model has no layer of a given name.
    """
    wanted = list(wanted)
    linear = _linear_names(model)
    last = {name.rsplit(".", 1)[-1] for name in linear}
    if wanted == ["auto"]:
        wanted = ["q_proj", "v_proj"] if {"q_proj", "v_proj"} <= last else ["attention"]
    if wanted == ["attention"]:
        return _attention_names(linear) or last
    if wanted == ["all-linear"]:
        return last
    unknown = [w for w in wanted if not any(f".{name}".endswith(f".{w}") for name, _ in model.named_modules())]
    if unknown:
        raise UserError(
            f"lora.target_modules: this model ({model.config.model_type}) has no layer named {', '.join(unknown)}. Remedy: "
            f'choose from its linear layers, {", ".join(sorted(last))}, or set ["auto"], ["attention"] or ["all-linear"].'
        )
    return set(wanted)


def _linear_names(model: PreTrainedModel) -> list[str]:
    # All linear layers inside the backbone, whether another adapter wraps them already or not; the vocabulary head and the
    # score head stay out.
    import torch
    from transformers.pytorch_utils import Conv1D

    backbone = getattr(model, model.base_model_prefix)
    linear = [name for name, module in backbone.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    return [name.removesuffix(".base_layer") for name in linear if ".lora_" not in name]


def _attention_names(linear: list[str]) -> set[str]:
    # From the part of its name that says attention, unless the last part alone tells it from all others: GPT-2 has a
    # c_proj in its attention and one in its MLP.
    inside = {name: i for name in linear if (i := _attention_part(name)) is not None}
    elsewhere = {name.rsplit(".", 1)[-1] for name in linear if name not in inside}
    names = set()
    for name, i in inside.items():
        last = name.rsplit(".", 1)[-1]
        names.add(".".join(name.split(".")[i:]) if last in elsewhere else last)
    return names


def _attention_part(name: str) -> int | None:
    parents = name.split(".")[:-1]
    return next((i for i, part in enumerate(parents) if "attn" in part or "attention" in part), None)
