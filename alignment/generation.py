"""Batched sampling whose result depends on the prompt and its seed, not on the batch it happened to be in.

Rows are sorted by length so that a batch holds little padding. Sampling draws from the top-k tokens by the Gumbel-max
trick (argmax of logit / temperature + Gumbel noise equals a draw from the softmax), with noise from a generator per
row; batch size and order therefore change nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from alignment.chat import prompt_ids
from alignment.fingerprint import layout
from alignment.models import Config
from alignment.progress import SILENT, Log, Progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class SamplingSettings(Config):
    """How answers are sampled."""

    max_new_tokens: int = Field(128, ge=1, description="An answer is cut after this many tokens")
    temperature: float = Field(0.7, ge=0, description="Softmax temperature; 0 takes the likeliest token (greedy)")
    top_k: int = Field(50, ge=1, description="Sample from the k likeliest tokens only")
    repetition_penalty: float = Field(
        1.0,
        ge=1,
        description="Divide the logits of tokens already in the text by this (CTRL, arXiv 1909.05858); 1 is off",
    )
    batch_size: int = Field(32, ge=1, **layout("Prompts sampled at once"))


@dataclass(frozen=True)
class Completion:
    """A sampled answer: its text, its number of tokens (EOS included), and whether it ended by itself."""

    text: str
    tokens: int
    ended: bool


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[dict[str, str]]],
    settings: SamplingSettings,
    *,
    seeds: Sequence[int] | None = None,
    not_first: str | None = None,
    log: Log = SILENT,
    what: str = "sampling",
) -> list[Completion]:
    """Answer every conversation (each ends with a user turn). Returns completions in the order of the conversations.

    Args:
        seeds: one per conversation, needed when temperature > 0.
        not_first: no answer starts with the first token of this text.
    """
    import torch

    prompts = [prompt_ids(tokenizer, messages) for messages in conversations]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    done: dict[int, Completion] = {}
    barred = tokenizer(not_first, add_special_tokens=False)["input_ids"][:1] if not_first else None
    progress = Progress(log, what, len(prompts))
    model.eval()
    for start in range(0, len(order), settings.batch_size):
        rows = order[start : start + settings.batch_size]
        width = max(len(prompts[i]) for i in rows)
        pad = tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in rows])
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in rows])
        row_seeds = [seeds[i] for i in rows] if seeds else None
        out = _generate_batch(model, tokenizer, ids, mask, settings, row_seeds, barred)
        for i, row in zip(rows, out.tolist(), strict=True):
            ended = tokenizer.eos_token_id in row
            kept = row[: row.index(tokenizer.eos_token_id)] if ended else row
            text = tokenizer.decode(kept, skip_special_tokens=True).strip()
            done[i] = Completion(text, len(kept) + ended, ended)
        progress.advance(len(rows))
    return [done[i] for i in range(len(prompts))]


def _generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    mask: torch.Tensor,
    settings: SamplingSettings,
    seeds: Sequence[int] | None,
    barred: list[int] | None,
) -> torch.Tensor:
    """New token ids, (B, <= max_new_tokens), right-padded."""
    import torch
    from transformers import LogitsProcessorList

    processors = LogitsProcessorList()
    if settings.temperature > 0:
        if seeds is None:
            raise ValueError("temperature > 0 needs a seed per conversation")
        processors.append(_seeded_top_k(settings, seeds, ids.shape[1]))
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
            repetition_penalty=settings.repetition_penalty,
            begin_suppress_tokens=barred,
            logits_processor=processors,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    return out[:, ids.shape[1] :].cpu()


def _seeded_top_k(settings: SamplingSettings, seeds: Sequence[int], prompt_width: int):
    import torch
    from transformers import LogitsProcessor

    k = settings.top_k
    noise = torch.stack(
        [
            torch.rand(settings.max_new_tokens, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            for seed in seeds
        ]
    )  # (B, max_new_tokens, k)
    gumbel = -torch.log(-torch.log(noise.clamp(1e-12, 1 - 1e-12)))

    class SeededTopK(LogitsProcessor):
        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
            step = input_ids.shape[1] - prompt_width
            values, indices = scores.float().topk(min(k, scores.shape[-1]), dim=-1)
            noisy = values / settings.temperature + gumbel[:, step, : values.shape[-1]].to(values)
            choice = indices.gather(-1, noisy.argmax(-1, keepdim=True))
            return torch.full_like(scores, float("-inf")).scatter_(-1, choice, 0.0)

    return SeededTopK()
