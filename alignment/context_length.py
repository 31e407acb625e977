"""How much text a model can read. Beyond a table of learned positions a CPU raises IndexError and a GPU dies."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from alignment.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_length(model: PreTrainedModel, tokens: int, what: str, remedy: str) -> None:
    """Refuse texts of more tokens than the model has positions for.

    Raises:
        UserError: it names `what` is too long, and says the `remedy`.
    """
    limit = position_limit(model)
    if tokens > limit:
        raise UserError(
            f"{what}: {tokens} tokens, and this model ({model.config.model_type}) reads {limit} at most: the size of its table "
            f"of positions. Remedy: {remedy}."
        )


def position_limit(model: PreTrainedModel) -> float:
    """How many tokens a model can read at all: the size of its table of learned positions (GPT-2: 1024).

    Infinite for models that compute positions (rotary and the like): they get worse beyond their context, and do not fail;
    and for what is scored with but is no module of its own.
    """
    import torch

    for name, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
        last = name.rsplit(".", 1)[-1]
        if isinstance(module, torch.nn.Embedding) and (last == "wpe" or "position" in last):
            return model.config.get_text_config().max_position_embeddings
    return math.inf
