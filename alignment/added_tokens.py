"""Tokens that join a model's vocabulary, and how a stage that freezes the base learns their embeddings nonetheless.

A new token's embedding says nothing. The base model's config lists such tokens under `untrained_token_ids`; every adapter
over that base then holds trained rows for them (peft's `trainable_token_indices`) beside its matrices. Training all weights
trains them, too, and ends the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from alignment.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UNTRAINED = "untrained_token_ids"


def add_special_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Add those of `tokens` that the vocabulary lacks, as tokens that no ordinary text becomes. Returns their ids."""
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    new = [token for token in dict.fromkeys(tokens) if token not in known]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in new], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(new)


def embed_new_tokens(model: PreTrainedModel, vocabulary: int, new: Sequence[int], to_train: Sequence[int]) -> None:
    """Give the tokens `new`, the last of `vocabulary`, the mean of all other embeddings: none is likely at first, none unlikely.

    The matrices grow unless they have the rows already, as padded ones do.

    Raises:
        UserError: the vocabulary head has a bias, which peft leaves out where single tokens are trained.
    """
    import torch

    if to_train and getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UserError(
            f"base_model.chat_template: tokens cannot be added to this model ({model.config.model_type}), whose vocabulary head "
            "has a bias. Remedy: set chat_template to plain, which adds none that must be trained."
        )
    if vocabulary > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        with torch.no_grad():
            module.weight[list(new)] = module.weight[: min(new)].float().mean(dim=0).to(module.weight)
    if to_train:
        setattr(model.config, UNTRAINED, list(to_train))


def rows_to_train(model: PreTrainedModel) -> dict[str, list[int]] | None:
    """The untrained tokens by the name of each matrix that has rows for them; None if there are no such tokens."""
    ids = getattr(model.config, UNTRAINED, None)
    if not ids:
        return None
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = {names[embedding]: list(ids)}
    if head is not None and _weight(head) is not _weight(embedding):
        rows[names[head]] = list(ids)
    return rows


def put_trained_rows_in_base(model: Any) -> None:
    """Write the rows that the adapter `default` holds into the base in memory.

    Who copies the adapter as a fixed reference (TRL does) copies its matrices, and takes the rows from the base.
    """
    import torch
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for module in model.modules():
        if isinstance(module, TrainableTokensLayer) and module.tied_adapter is None:
            weight = module.base_layer.weight
            with torch.no_grad():
                weight[module.token_indices["default"]] = module.trainable_tokens_delta["default"].to(weight)


def complete_wrappers(model: Any) -> None:
    """Give peft's wrappers around trained rows what TRL and peft itself look for on every head and every adapted layer."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.utils.other import TrainableTokensWrapper

    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper):
            module.bias = None  # of the vocabulary head; one with a bias gets no tokens
        elif isinstance(module, TrainableTokensLayer):
            module.cast_input_dtype_enabled = False  # its inputs are ids, or are multiplied as they come


def rows_for_another_adapter(model: Any, config: Any, weights: dict[str, torch.Tensor]) -> None:
    """Complete peft configuration and weights (keys as saved) of an adapter that is to join `default` on one base.

    peft wants every adapter of a model to hold rows of the same matrices; a reward model's has none for the vocabulary head,
    which it does not use. What is missing is taken from the base.
    """
    wanted = model.peft_config["default"].trainable_token_indices or {}
    for name, ids in wanted.items():
        key = f"base_model.model.{name}.token_adapter.trainable_tokens_delta"
        if key not in weights:
            weights[key] = _weight(model.get_base_model().get_submodule(name))[ids].detach().clone()
    if wanted:
        config.trainable_token_indices = dict(wanted)


def mark_trained(model: PreTrainedModel) -> None:
    """All weights were trained, those of added tokens among them."""
    if hasattr(model.config, UNTRAINED):
        delattr(model.config, UNTRAINED)


def _weight(module: Any) -> torch.Tensor:
    # The weights themselves, also where another adapter that trains rows of them wraps the module.
    return getattr(module, "original_module", module).weight
