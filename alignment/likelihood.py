"""How likely a model finds given tokens: the log-probabilities behind perplexity, KL and the critic's decisions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from alignment.chat import IGNORE, prompt_ids, text_ids
from alignment.context_length import check_length

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = tuple[list[int], list[int]]  # input ids and labels of equal length; labels are -100 where nothing is asked


def label_log_probs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], batch_size: int
) -> list[float]:
    """For each row, the sum over its labelled positions t of log p(label_t | ids before t), in float32 nats.

    Only labelled positions are projected onto the vocabulary, except for models that do more to their logits than project
    (Gemma caps them, Granite divides them): their own logits are taken, at all positions.
    """
    import torch

    check_length(model, max((len(ids) for ids, _ in rows), default=0), "a text to score", "leave it out, or shorten it")
    out: dict[int, float] = {}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    plain: bool | None = None
    model.eval()
    for start in range(0, len(order), batch_size):
        picks = order[start : start + batch_size]
        width = max(len(rows[i][0]) for i in picks)
        ids = torch.full((len(picks), width), tokenizer.pad_token_id)
        labels = torch.full((len(picks), width), IGNORE)
        mask = torch.zeros((len(picks), width), dtype=torch.long)
        for j, i in enumerate(picks):
            ids[j, : len(rows[i][0])] = torch.tensor(rows[i][0])
            labels[j, : len(rows[i][1])] = torch.tensor(rows[i][1])
            mask[j, : len(rows[i][0])] = 1
        with torch.inference_mode():
            batch = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
            targets = labels[:, 1:].to(model.device)
            wanted = targets != IGNORE
            if plain is None:
                plain = only_projects(inner, {name: tensor[:1] for name, tensor in batch.items()})
            logits = next_token_logits(inner, batch, wanted, plain)
            logp = logits.log_softmax(-1).gather(-1, targets[wanted].unsqueeze(-1)).squeeze(-1)
            sums = torch.zeros(targets.shape, device=logp.device).masked_scatter(wanted, logp).sum(-1)
        out |= dict(zip(picks, sums.tolist(), strict=True))
    return [out[i] for i in range(len(rows))]


def next_token_logits(model: PreTrainedModel, batch: dict, wanted: torch.Tensor, plain: bool) -> torch.Tensor:
    """(N, V) float32 logits of the tokens that follow the N `wanted` positions ((B, T - 1), true where asked), row by row.

    Args:
        model: a causal language model without a PEFT wrapper around it (adapters inside its layers are applied).
        plain: what `only_projects` says of it.
    """
    if plain:
        states = getattr(model, model.base_model_prefix)(**batch)[0][:, :-1]
        return model.get_output_embeddings()(states[wanted]).float()
    return model(**batch).logits[:, :-1][wanted].float()


def only_projects(model: PreTrainedModel, batch: dict) -> bool:
    """Whether a model's logits are its last hidden states times the output embeddings, and nothing more."""
    states = getattr(model, model.base_model_prefix)(**batch)[0][:, :1]
    logits = model(**batch).logits[:, :1].float()
    projected = model.get_output_embeddings()(states.contiguous()).float()
    return bool((projected - logits).abs().max() <= 0.02 * logits.abs().max())


def answer_log_probs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[dict[str, str]]],
    answers: Sequence[str],
    batch_size: int,
    ended: Sequence[bool] | None = None,
) -> list[float]:
    """log p(answer | conversation) of each answer; EOS is counted where `ended` says so (nowhere by default)."""
    rows = []
    for i, (conversation, answer) in enumerate(zip(conversations, answers, strict=True)):
        before = prompt_ids(tokenizer, conversation)
        tokens = text_ids(tokenizer, answer)
        tokens += [tokenizer.eos_token_id] if ended is not None and ended[i] else []
        rows.append((before + tokens, [IGNORE] * len(before) + tokens))
    return label_log_probs(model, tokenizer, rows, batch_size)
