"""Batched sampling whose result depends on the prompt and its seed, not on the batch it happened to be in.

Rows are sorted by length so that a batch holds little padding. Sampling draws from the top-k tokens by the Gumbel-max
trick (argmax of logit / temperature + Gumbel noise equals a draw from the softmax), with noise from a generator per
row; batch size and order therefore change nothing but rounding. From the whole vocabulary it draws by inverting the
cumulative distribution, one uniform number a token: noise for every token of the vocabulary would not fit in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from alignment.chat import prompt_ids
from alignment.context_length import check_length
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
    top_k: int = Field(50, ge=0, description="Sample from the k likeliest tokens only; 0 samples from the whole vocabulary")
    repetition_penalty: float = Field(
        1.0,
        ge=1,
        description="Divide the logits of tokens already in the text by this (CTRL, arXiv 1909.05858); 1 is off",
    )
    batch_size: int = Field(32, ge=1, **layout("Prompts sampled at once"))


@dataclass(frozen=True)
class Completion:
    """A sampled answer: its text, its token ids (EOS included), their number, and whether it ended by itself."""

    text: str
    tokens: int
    ended: bool
    ids: tuple[int, ...] = ()


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[dict[str, str]]],
    settings: SamplingSettings,
    *,
    seeds: Sequence[int] | None = None,
    not_first: str | None = None,
    keep: Callable[[int, Completion], None] | None = None,
    log: Log = SILENT,
    what: str = "sampling",
) -> list[Completion]:
    """Answer every conversation (each ends with a user turn). Returns completions in the order of the conversations.

    Args:
        seeds: one per conversation, needed when temperature > 0.
        not_first: no answer starts with the first token of this text.
        keep: called with a conversation's number and its answer as soon as that has ended, while others go on.
    """
    barred = tokenizer(not_first, add_special_tokens=False)["input_ids"][:1] if not_first else None
    prompts = [prompt_ids(tokenizer, messages) for messages in conversations]
    ended = None if keep is None else lambda i, ids: keep(i, completion(tokenizer, ids))
    answers = sample_ids(model, tokenizer, prompts, settings, seeds=seeds, barred=barred, ended=ended, log=log, what=what)
    return [completion(tokenizer, ids) for ids in answers]


def sample_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    *,
    seeds: Sequence[int] | None = None,
    barred: Sequence[int] | None = None,
    ended: Callable[[int, list[int]], None] | None = None,
    log: Log = SILENT,
    what: str = "sampling",
) -> list[list[int]]:
    """`generate` on token ids: for every prompt the new ids, up to and including EOS if the answer ended by itself.

    Args:
        barred: no answer starts with one of these ids.
        ended: called with a prompt's number and its new ids as soon as its answer has ended, once for each.
    """
    import torch

    check_length(
        model,
        max(map(len, prompts), default=0) + settings.max_new_tokens,
        f"{what}: the longest prompt and max_new_tokens",
        "lower max_new_tokens, or leave out the longest prompts",
    )
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    done: dict[int, list[int]] = {}
    progress = Progress(log, what, len(prompts))
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    model.eval()
    for start in range(0, len(order), settings.batch_size):
        rows = order[start : start + settings.batch_size]
        width = max(len(prompts[i]) for i in rows)
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + list(prompts[i]) for i in rows])
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in rows])
        row_seeds = [seeds[i] for i in rows] if seeds else None

        def finish(row: int, new: list[int], rows: list[int] = rows) -> None:
            if rows[row] not in done:
                done[rows[row]] = new
                if ended is not None:
                    ended(rows[row], new)

        out = _generate_batch(model, tokenizer, ids, mask, settings, row_seeds, barred, finish)
        for j, row in enumerate(out.tolist()):
            finish(j, row[: row.index(eos) + 1] if eos in row else row)
        progress.advance(len(rows))
    return [done[i] for i in range(len(prompts))]


def completion(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Completion:
    """The answer that sampled ids spell, without NUL characters: no reader of text takes them back."""
    ended = tokenizer.eos_token_id in ids
    text = tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True).replace("\0", "").strip()
    return Completion(text, len(ids), ended, tuple(ids))


def _generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    mask: torch.Tensor,
    settings: SamplingSettings,
    seeds: Sequence[int] | None,
    barred: Sequence[int] | None,
    finish: Callable[[int, list[int]], None],
) -> torch.Tensor:
    """New token ids, (B, max_new_tokens), right-padded. `finish(row, ids)` is called for a row when it reaches EOS.

    Whenever a quarter of the answers at work have ended, the others go on without them: most answers are much shorter than
    the longest, and an ended row would cost as much as a living one.
    """
    import torch
    from transformers import LogitsProcessorList, StoppingCriteriaList

    width, eos = ids.shape[1], tokenizer.eos_token_id
    limit = width + settings.max_new_tokens
    noise = None
    if settings.temperature > 0:
        if seeds is None:
            raise ValueError("temperature > 0 needs a seed per conversation")
        noise = _noise(settings, seeds)
    out = torch.full((len(ids), settings.max_new_tokens), tokenizer.pad_token_id)
    rows, ids, mask = torch.arange(len(ids)), ids.to(model.device), mask.to(model.device)
    cache = growing_cache(model, limit)
    with torch.inference_mode(), _packed_head_input(model):
        if cache is not None:
            _read_shared_prompts_once(model, ids, mask, cache, tokenizer.pad_token_id)
        while True:
            done = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=limit - ids.shape[1],
                do_sample=False,
                repetition_penalty=settings.repetition_penalty,
                begin_suppress_tokens=list(barred) if barred and ids.shape[1] == width else None,
                logits_processor=LogitsProcessorList([] if noise is None else [_seeded_choice(settings, noise[rows], width)]),
                stopping_criteria=StoppingCriteriaList([_ended_rows(width, eos, rows.tolist(), finish, stop=cache is not None)]),
                past_key_values=cache,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=eos,
            )
            out[rows, : done.shape[1] - width] = done[:, width:].cpu()
            alive = (~(done[:, width:] == eos).any(dim=1)).nonzero().squeeze(-1)
            if cache is None or not len(alive) or done.shape[1] == limit:
                return out
            mask = torch.cat([mask, mask.new_ones(len(done), done.shape[1] - mask.shape[1])], dim=1)[alive]
            ids, rows = done[alive], rows[alive.cpu()]
            cache.batch_select_indices(alive)


def _read_shared_prompts_once(model, ids: torch.Tensor, mask: torch.Tensor, cache, pad: int) -> None:
    # Several answers to one prompt need its keys and values only once. All but the last token is read here: that one gives
    # the logits of the first new token and is left to generate().
    import torch

    prompts, of_row = torch.unique(ids, dim=0, return_inverse=True)
    if len(prompts) == len(ids) or not mask[:, :-1].any(dim=1).all():
        return
    first = torch.stack([(of_row == i).nonzero()[0, 0] for i in range(len(prompts))])
    model.generate(
        input_ids=ids[first, :-1],
        attention_mask=mask[first, :-1],
        max_new_tokens=1,
        do_sample=False,
        past_key_values=cache,
        pad_token_id=pad,
    )
    cache.batch_select_indices(of_row)


@contextmanager
def _packed_head_input(model: PreTrainedModel) -> Iterator[None]:
    # generate() projects the last position of the prompts, a slice with gaps. A CPU's matmul then lays out one copy of the
    # whole vocabulary matrix per prompt: with 64 prompts 3.6 GB and half of the time of sampling.
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


def growing_cache(model: PreTrainedModel, capacity: int):
    """A key-value cache that writes into memory set aside for `capacity` tokens, or None for models with a cache of their own.

    The library's cache copies all of its contents for every new token: on a CPU a third of the time of sampling.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    if not model._supports_default_dynamic_cache():
        return None

    class GrowingLayer(DynamicLayer):
        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self._room = [s.new_empty(*s.shape[:2], capacity, s.shape[3]) for s in (key_states, value_states)]
                self._length = 0
            end = self._length + key_states.shape[-2]
            for room, states in zip(self._room, (key_states, value_states), strict=True):
                room[:, :, self._length : end] = states
            self._length = end
            self.keys, self.values = (room[:, :, :end] for room in self._room)
            return self.keys, self.values

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            if self.is_initialized:
                self._room = [room[indices] for room in self._room]
                self.keys, self.values = (room[:, :, : self._length] for room in self._room)

    cache = DynamicCache(config=model.config)
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return cache  # sliding windows and the like keep the library's layers
    cache.layers = [GrowingLayer() for _ in cache.layers]
    return cache


def _ended_rows(prompt_width: int, eos: int, rows: list[int], finish: Callable[[int, list[int]], None], *, stop: bool):
    # Reports each row as it ends and, with `stop`, stops all when a quarter have ended.
    import torch
    from transformers import StoppingCriteria

    class EndedRows(StoppingCriteria):
        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
            for j in (input_ids[:, -1] == eos).nonzero().squeeze(-1).tolist():
                finish(rows[j], input_ids[j, prompt_width:].tolist())
            ended = (input_ids[:, prompt_width:] == eos).any(dim=1).sum().item()
            return torch.full((len(rows),), stop and 4 * ended >= len(rows), device=input_ids.device)

    return EndedRows()


def _noise(settings: SamplingSettings, seeds: Sequence[int]) -> torch.Tensor:
    """Row by row from a generator of its own: Gumbel noise (B, max_new_tokens, top_k), or uniform (B, max_new_tokens, 1)."""
    import torch

    shape = (settings.max_new_tokens, settings.top_k or 1)
    rows = [torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    noise = torch.stack(rows)
    return -torch.log(-torch.log(noise.clamp(1e-12, 1 - 1e-12))) if settings.top_k else noise.clamp(max=1 - 1e-6)


def _seeded_choice(settings: SamplingSettings, noise: torch.Tensor, prompt_width: int):
    import torch
    from transformers import LogitsProcessor

    class SeededChoice(LogitsProcessor):
        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
            now = noise[:, input_ids.shape[1] - prompt_width]
            if settings.top_k:
                values, indices = scores.float().topk(min(settings.top_k, scores.shape[-1]), dim=-1)
                noisy = values / settings.temperature + now[:, : values.shape[-1]].to(values)
                choice = indices.gather(-1, noisy.argmax(-1, keepdim=True))
            else:
                cumulative = (scores.float() / settings.temperature).softmax(-1).cumsum(-1)
                choice = torch.searchsorted(cumulative, now.to(cumulative) * cumulative[:, -1:], right=True)
            return torch.full_like(scores, float("-inf")).scatter_(-1, choice, 0.0)

    return SeededChoice()
