"""Token sequences that begin alike are read once: keys and values are kept, and every row that begins so goes on from there.

What servers call prefix caching (RadixAttention, arXiv 2312.07104), for batches in this process. Chat prompts have much in
common: the system prompt and worked examples of all, the question of several answers that are sampled or scored, the critic's
whole conversation when it is asked to revise. Nothing but rounding changes.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignment.chat import common_length
from alignment.models import backbone

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

WORTH_READING = 16  # tokens that reading a common beginning by itself must save; all of one depth are read in one pass
KEPT_BYTES = 2**30  # of keys and values that one `Prefixes` reads or keeps


@dataclass(frozen=True)
class _Read:
    """A sequence that was read: token j has its keys and values at `[row, :, positions[j]]` of every layer's tensors."""

    tokens: tuple[int, ...]
    layers: list[list[torch.Tensor]]  # keys and values of each layer, (B, heads, T, head size)
    row: int
    positions: list[int]


@dataclass
class Opened:
    """A batch whose beginnings are in a cache already.

    Attributes:
        cache: holds the first P positions of every row; None where nothing was read and no room asked for, or the model's own
            way of caching has to do.
        input_ids: (B, P + R), what is left to read right of P. Where the mask is 0: the row's first token in the gap after what
            was read, `pad` elsewhere.
        attention_mask: (B, P + R).
        past: P.
    """

    cache: Any
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    past: int

    def inputs(self) -> dict[str, Any]:
        """What a model's forward takes to read the rest."""
        given = {"input_ids": self.input_ids[:, self.past :], "attention_mask": self.attention_mask}
        if self.cache is None:
            return given
        positions = (self.attention_mask.cumsum(1) - 1).clamp(min=0)[:, self.past :]
        return given | {"position_ids": positions, "past_key_values": self.cache, "use_cache": True}


class Prefixes:
    """What a model has read, by its tokens. It must not be trained while this is in use."""

    def __init__(self, model: PreTrainedModel, read: Sequence[_Read] = ()) -> None:
        self._model = model
        self._read = sorted(read, key=lambda r: r.tokens)
        self._bytes = 0

    def with_beginnings_of(self, rows: Sequence[Sequence[int]], pad: int, at_once: int) -> Prefixes:
        """These and, newly read, what enough of `rows` have in common; of a row all but its last token.

        Args:
            at_once: most beginnings in one forward pass. No more are read once these take `KEPT_BYTES`.
        """
        out = Prefixes(self._model, self._read)
        if not can_share(self._model):
            return out
        body = backbone(self._model)
        for level in common_beginnings(rows):
            new = sorted((tokens for tokens in level if out.length_of(tokens) < len(tokens)), key=len)
            for start in range(0, len(new), at_once):
                if out._bytes >= KEPT_BYTES:
                    return out
                batch = out.open(new[start : start + at_once], pad, room=0)
                body(**batch.inputs())
                out._bytes += _size(batch.cache)
                out.add(batch.cache, batch.input_ids, batch.attention_mask)
        return out

    def open(self, rows: Sequence[Sequence[int]], pad: int, *, room: int | None, left: bool = True, least: int = 0) -> Opened:
        """A batch of rows, each going on from the longest beginning of it that was read.

        Args:
            rows: token ids, none of them empty.
            room: new tokens for which the cache has memory set aside; None where it is not used beyond these rows.
            left: pad what is left to read on the left, as sampling needs it; else on the right.
            least: tokens of each row that are left to read, whatever was read.
        """
        import torch

        found = [self._longest(row[: len(row) - least]) for row in rows]
        past = max(length for _, length in found)
        rest = [list(row[length:]) for row, (_, length) in zip(rows, found, strict=True)]
        width = max(map(len, rest))
        ids = torch.full((len(rows), past + width), pad)
        mask = torch.zeros_like(ids)
        for i, ((_, length), tokens) in enumerate(zip(found, rest, strict=True)):
            at = past + width - len(tokens) if left else past
            if length:  # a gap is no padding to a repetition penalty: it holds a token that the row has anyway
                ids[i, length:at] = rows[i][0]
            ids[i, :length], mask[i, :length] = torch.tensor(rows[i][:length]), 1
            ids[i, at : at + len(tokens)], mask[i, at : at + len(tokens)] = torch.tensor(tokens), 1
        capacity = past + width + (room or 0)
        cache = growing_cache(self._model, capacity) if past or room is not None else None
        if past:
            _fill(cache, found, past, capacity)
        device = self._model.device
        return Opened(cache, ids.to(device), mask.to(device), past)

    def add(self, cache: Any, ids: torch.Tensor, mask: torch.Tensor) -> None:
        """Take in what a cache holds: of each row the tokens (B, T) where the mask is 1, as far as they were read."""
        layers = [layer.room for layer in cache.layers]
        end = cache.get_seq_length()
        for i, (tokens, wanted) in enumerate(zip(ids[:, :end].tolist(), mask[:, :end].tolist(), strict=True)):
            positions = [j for j, w in enumerate(wanted) if w]
            self._read.append(_Read(tuple(tokens[j] for j in positions), layers, i, positions))
        self._read.sort(key=lambda r: r.tokens)

    def keep(self, cache: Any, ids: torch.Tensor, mask: torch.Tensor) -> None:
        """`add`, as long as less than `KEPT_BYTES` are held; nothing for a model that cannot go on from it."""
        if not can_share(self._model):
            return
        if self._bytes + _size(cache) <= KEPT_BYTES:
            self._bytes += _size(cache)
            self.add(cache, ids, mask)

    def length_of(self, tokens: Sequence[int]) -> int:
        """How many of the first tokens of a sequence were read."""
        return self._longest(tokens)[1]

    def _longest(self, tokens: Sequence[int]) -> tuple[_Read | None, int]:
        # In the order of their tokens, what has the longest beginning in common with a sequence is beside its place.
        tokens = tuple(tokens)
        at = bisect_left(self._read, tokens, key=lambda r: r.tokens)
        best: tuple[_Read | None, int] = (None, 0)
        for read in self._read[max(at - 1, 0) : at + 1]:
            length = common_length(read.tokens, tokens)
            if length > best[1]:
                best = (read, length)
        return best


def common_beginnings(rows: Sequence[Sequence[int]]) -> list[list[tuple[int, ...]]]:
    """Beginnings worth reading by themselves, by depth: those of a level go on from those of the levels before.

    A row's last token is in none of them, so that reading it gives the logits after the whole row.
    """
    ordered = sorted(map(tuple, rows))
    levels: list[list[tuple[int, ...]]] = []
    todo = [(0, len(ordered), 0, 0)] if ordered else []
    while todo:
        start, end, depth, level = todo.pop()
        first = ordered[start]
        common = common_length(first, ordered[end - 1])  # sorted, so all between have it, too
        shared = min(common, len(first) - 1)
        if (shared - depth) * (end - start - 1) >= WORTH_READING:
            if level == len(levels):
                levels.append([])
            levels[level].append(first[:shared])
            depth, level = shared, level + 1
        while start < end and len(ordered[start]) == common:
            start += 1
        while start < end:
            stop = start + 1
            while stop < end and ordered[stop][common] == ordered[start][common]:
                stop += 1
            if stop - start > 1:
                todo.append((start, stop, depth, level))
            start = stop
    return levels


def can_share(model: Any) -> bool:
    """Whether a model can go on from kept keys and values: it takes them, and positions, and every layer looks at all tokens."""
    if not hasattr(model, "base_model_prefix") and not hasattr(model, "get_base_model"):
        return False
    taken = inspect.signature(backbone(model).forward).parameters
    if not {"position_ids", "past_key_values", "attention_mask"} <= set(taken):
        return False
    cache = growing_cache(model, 0)
    return cache is not None and all(hasattr(layer, "room") for layer in cache.layers)


def growing_cache(model: PreTrainedModel, capacity: int):
    """A key-value cache that writes into memory set aside for `capacity` tokens, or None for models with a cache of their own.

    The library's cache copies all of its contents for every new token: on a CPU a third of the time of sampling.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    supported = getattr(model, "_supports_default_dynamic_cache", None)  # models that generate nothing have no such method
    if supported is not None and not supported():
        return None

    class GrowingLayer(DynamicLayer):
        room: Sequence[torch.Tensor] = ()  # keys and values, (B, heads, capacity, head size)

        def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
            super().lazy_initialization(key_states, value_states)
            self.set_room([s.new_empty(*s.shape[:2], capacity, s.shape[3]) for s in (key_states, value_states)], 0)

        def set_room(self, room: list[torch.Tensor], length: int) -> None:
            self.room, self._length = room, length
            self.keys, self.values = (tensor[:, :, :length] for tensor in room)

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            end = self._length + key_states.shape[-2]
            for room, states in zip(self.room, (key_states, value_states), strict=True):
                room[:, :, self._length : end] = states
            self.set_room(self.room, end)
            return self.keys, self.values

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            if self.is_initialized:
                self.set_room([room[indices] for room in self.room], self._length)

    cache = DynamicCache(config=model.config)
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return cache  # sliding windows and the like keep the library's layers
    cache.layers = [GrowingLayer() for _ in cache.layers]
    return cache


def _size(cache: Any) -> int:
    return sum(tensor.nbytes for layer in cache.layers for tensor in layer.room)


def _fill(cache: Any, found: Sequence[tuple[_Read | None, int]], past: int, capacity: int) -> None:
    # Copies every row's beginning to the first positions of the cache; what is right of it up to `past` is masked.
    import torch

    sources: dict[int, list[int]] = {}
    for i, (read, length) in enumerate(found):
        if length:
            sources.setdefault(id(read.layers), []).append(i)
    for number, layer in enumerate(cache.layers):
        some = next(read for read, length in found if length).layers[number]
        room = [s.new_zeros(len(found), s.shape[1], capacity, s.shape[3]) for s in some]
        for rows in sources.values():
            reads = [found[i] for i in rows]
            at = torch.tensor([[*r.positions[:n], *[0] * (past - n)] for r, n in reads], device=some[0].device)
            of = torch.tensor([[r.row] for r, _ in reads], device=some[0].device)
            for target, source in zip(room, reads[0][0].layers[number], strict=True):
                target[rows, :, :past] = source[of, :, at].transpose(1, 2)
        layer.lazy_initialization(room[0][:, :, :0], room[1][:, :, :0])
        layer.set_room(room, past)
