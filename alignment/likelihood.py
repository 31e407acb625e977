"""How likely a model finds given tokens: the log-probabilities behind perplexity, KL and the critic's decisions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from alignment.chat import IGNORE, prompt_ids, text_ids
from alignment.context_length import check_length
from alignment.models import without_cache

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")
Row = tuple[list[int], list[int]]  # input ids and labels of equal length; labels are -100 where nothing is asked
POSITIONS_AT_ONCE = 1024  # as many have their float32 logits in memory together: 0.6 GB of a vocabulary of 150,000


def label_log_probs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], batch_size: int
) -> list[float]:
    """For each row, the sum over its labelled positions t of log p(label_t | ids before t), in float32 nats.

    Only labelled positions are projected onto the vocabulary, except for models that do more to their logits than project
    (Gemma caps them, Granite divides them): their own logits are taken, at all positions.
    """
    return [total for total, _ in label_and_last_log_probs(model, tokenizer, rows, batch_size)]


def label_and_last_log_probs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], batch_size: int
) -> list[tuple[float, float]]:
    """As `label_log_probs`, and beside each sum the log-probability of the row's last label alone."""
    import torch

    def both(logp: torch.Tensor, wanted: torch.Tensor) -> list[tuple[float, float]]:
        placed = torch.zeros(wanted.shape, device=logp.device).masked_scatter(wanted, logp.squeeze(-1))
        last = (wanted * torch.arange(wanted.shape[1], device=wanted.device)).argmax(-1, keepdim=True)
        return list(zip(placed.sum(-1).tolist(), placed.gather(-1, last).squeeze(-1).tolist(), strict=True))

    return _read_labelled(model, tokenizer, rows, batch_size, both)


def first_token_log_probs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[dict[str, str]]],
    tokens: Sequence[int],
    batch_size: int,
) -> list[list[float]]:
    """For each conversation, log p(token | conversation) of each of the tokens as the answer's first, in one pass."""
    rows = []
    for conversation in conversations:
        before = prompt_ids(tokenizer, conversation)
        rows.append(([*before, tokens[0]], [*[IGNORE] * len(before), tokens[0]]))
    # One labelled position a row.
    return _read_labelled(model, tokenizer, rows, batch_size, lambda logp, _: logp.tolist(), tokens)


def _read_labelled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    batch_size: int,
    read: Callable[[torch.Tensor, torch.Tensor], list[T]],
    tokens: Sequence[int] | None = None,
) -> list[T]:
    # `read` makes one value per row of a batch's log-probabilities (N, K) at its N labelled positions, and of where these are,
    # (B, T - 1). They are those of K `tokens` at every position; of the label there, if none are given.
    import torch

    check_length(model, max((len(ids) for ids, _ in rows), default=0), "a text to score", "leave it out, or shorten it")
    out: dict[int, T] = {}
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
            asked = targets[wanted].unsqueeze(-1)
            if tokens is not None:
                asked = torch.tensor(tokens, device=model.device).expand(len(asked), -1)
            if plain is None:
                plain = only_projects(inner, {name: tensor[:1] for name, tensor in batch.items()})
            values = read(_next_token_log_probs(inner, batch, wanted, plain, asked), wanted)
        out |= dict(zip(picks, values, strict=True))
    return [out[i] for i in range(len(rows))]


def next_token_logits(model: PreTrainedModel, batch: dict, wanted: torch.Tensor, plain: bool) -> torch.Tensor:
    """(N, V) float32 logits of the tokens that follow the N `wanted` positions ((B, T - 1), true where asked), row by row.

    Args:
        model: a causal language model without a PEFT wrapper around it (adapters inside its layers are applied).
        plain: what `only_projects` says of it.
    """
    states, head = _before_the_head(model, batch, wanted, plain)
    return head(states).float()


def _next_token_log_probs(
    model: PreTrainedModel, batch: dict, wanted: torch.Tensor, plain: bool, asked: torch.Tensor
) -> torch.Tensor:
    # (N, K) log-probabilities of the tokens `asked`, (N, K), at the N wanted positions: see `next_token_logits`.
    import torch

    states, head = _before_the_head(model, batch, wanted, plain)
    out = []
    for some, tokens in zip(states.split(POSITIONS_AT_ONCE), asked.split(POSITIONS_AT_ONCE), strict=True):
        logits = head(some).float()
        out.append(logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True))
    return torch.cat(out)


def _before_the_head(model: PreTrainedModel, batch: dict, wanted: torch.Tensor, plain: bool) -> tuple[torch.Tensor, Callable]:
    # At the wanted positions, the last hidden states (N, hidden size) and what makes logits of them; of models that do more than
    # project, the logits (N, V), of which nothing is left to be made.
    if plain:
        body = getattr(model, model.base_model_prefix)
        return body(**batch, **without_cache(body))[0][:, :-1][wanted], model.get_output_embeddings()
    return model(**batch, **without_cache(model)).logits[:, :-1][wanted], lambda logits: logits


def only_projects(model: PreTrainedModel, batch: dict) -> bool:
    """Whether a model's logits are its last hidden states times the output embeddings, and nothing more."""
    body = getattr(model, model.base_model_prefix)
    states = body(**batch, **without_cache(body))[0][:, :1]
    logits = model(**batch, **without_cache(model)).logits[:, :1].float()
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
