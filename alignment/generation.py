"""Batched sampling whose result depends on the prompt and its seed, not on the batch it happened to be in.

Rows are sorted by length so that a batch holds little padding, and what they begin with in common is read once
(`alignment.prefixes`). Sampling draws from the top-k tokens by the Gumbel-max
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
from alignment.prefixes import Prefixes
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
    read: Prefixes | None = None,
    remember: Prefixes | None = None,
    log: Log = SILENT,
    what: str = "sampling",
) -> list[Completion]:
    """Answer every conversation (each ends with a user turn). Returns completions in the order of the conversations.

    Args:
        seeds: one per conversation, needed when temperature > 0.
        not_first: no answer starts with the first token of this text.
        keep: called with a conversation's number and its answer as soon as that has ended, while others go on.
        read: what the model has read already; conversations that begin so go on from there.
        remember: takes in what is read now, for conversations that go on from these.
    """
    barred = tokenizer(not_first, add_special_tokens=False)["input_ids"][:1] if not_first else None
    prompts = [prompt_ids(tokenizer, messages) for messages in conversations]
    ended = None if keep is None else lambda i, ids: keep(i, completion(tokenizer, ids))
    given = {"seeds": seeds, "barred": barred, "ended": ended, "read": read, "remember": remember, "log": log, "what": what}
    answers = sample_ids(model, tokenizer, prompts, settings, **given)
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
    read: Prefixes | None = None,
    remember: Prefixes | None = None,
    log: Log = SILENT,
    what: str = "sampling",
) -> list[list[int]]:
    """`generate` on token ids: for every prompt the new ids, up to and including EOS if the answer ended by itself.

    Args:
        barred: no answer starts with one of these ids.
        ended: called with a prompt's number and its new ids as soon as its answer has ended, once for each.
        read, remember: see `generate`.
    """
    import torch

    check_length(
        model,
        max(map(len, prompts), default=0) + settings.max_new_tokens,
        f"{what}: the longest prompt and max_new_tokens",
        "lower max_new_tokens, or leave out the longest prompts",
    )
    read = read or Prefixes(model)
    order = sorted(range(len(prompts)), key=lambda i: (read.length_of(prompts[i]) - len(prompts[i]), prompts[i]))
    done: dict[int, list[int]] = {}
    progress = Progress(log, what, len(prompts))
    eos = tokenizer.eos_token_id
    model.eval()
    for start in range(0, len(order), settings.batch_size):
        rows = order[start : start + settings.batch_size]
        row_seeds = [seeds[i] for i in rows] if seeds else None

        def finish(row: int, new: list[int], rows: list[int] = rows) -> None:
            if rows[row] not in done:
                done[rows[row]] = new
                if ended is not None:
                    ended(rows[row], new)

        with torch.inference_mode():
            asked = [prompts[i] for i in rows]
            out = _generate_batch(model, tokenizer, asked, settings, row_seeds, barred, finish, read, remember)
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
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    seeds: Sequence[int] | None,
    barred: Sequence[int] | None,
    finish: Callable[[int, list[int]], None],
    read: Prefixes,
    remember: Prefixes | None,
) -> torch.Tensor:
    """New token ids, (B, max_new_tokens), right-padded. `finish(row, ids)` is called for a row when it reaches EOS.

    Whenever a quarter of the answers at work have ended, the others go on without them: most answers are much shorter than
    the longest, and an ended row would cost as much as a living one.
    """
    import torch
    from transformers import LogitsProcessorList, StoppingCriteriaList

    eos = tokenizer.eos_token_id
    noise = None
    if settings.temperature > 0:
        if seeds is None:
            raise ValueError("temperature > 0 needs a seed per conversation")
        noise = _noise(settings, seeds)
    out = torch.full((len(prompts), settings.max_new_tokens), tokenizer.pad_token_id)
    with _quick_head(model):
        batch = read.with_beginnings_of(prompts, tokenizer.pad_token_id, len(prompts)).open(
            prompts, tokenizer.pad_token_id, room=settings.max_new_tokens, least=1
        )
        ids, mask, cache = batch.input_ids, batch.attention_mask, batch.cache
        rows, width = torch.arange(len(ids)), ids.shape[1]
        limit = width + settings.max_new_tokens
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
            if remember is not None and ids.shape[1] == width:
                remember.keep(cache, done, torch.cat([mask, _before_the_end(done[:, width:], eos)], dim=1))
            out[rows, : done.shape[1] - width] = done[:, width:].cpu()
            alive = (~(done[:, width:] == eos).any(dim=1)).nonzero().squeeze(-1)
            if cache is None or not len(alive) or done.shape[1] == limit:
                return out
            mask = torch.cat([mask, mask.new_ones(len(done), done.shape[1] - mask.shape[1])], dim=1)[alive]
            ids, rows = done[alive], rows[alive.cpu()]
            cache.batch_select_indices(alive)


def _before_the_end(new: torch.Tensor, eos: int) -> torch.Tensor:
    # 1 for the tokens (B, T) of an answer, its EOS included, 0 for the padding after it.
    ends = (new == eos).long()
    return (ends.cumsum(1) - ends == 0).long()


@contextmanager
def _quick_head(model: PreTrainedModel) -> Iterator[None]:
    # generate() projects the last position of the prompts, a slice with gaps. A CPU's matmul then lays out one copy of the
    # whole vocabulary matrix per prompt: with 64 prompts 3.6 GB and half of the time of sampling. And for a few rows a matrix
    # of a vocabulary's height is read twice as fast from its own side: (V, H) (H, B) instead of (B, H) (H, V).
    import torch

    head = model.get_output_embeddings()
    if type(head) is torch.nn.Linear and head.bias is None and head.weight.device.type == "cpu":

        def project(states: torch.Tensor) -> torch.Tensor:
            flat = states.reshape(-1, states.shape[-1])
            return (head.weight @ flat.t()).t().contiguous().view(*states.shape[:-1], -1)

        head.forward = project
        try:
            yield
        finally:
            del head.forward
        return
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


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
