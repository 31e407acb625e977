"""The layers that no adapter changes, computed once per answer and PPO step instead of once per role and epoch.

Adapters on the last layers only (`LoraSettings.last_layers`) leave the layers below them frozen: what enters the lowest adapted
layer is the same for every role on the shared base, and in every epoch over one batch of answers. It is computed once and kept
row by row, and each role's forward pass starts from it, at the deepest layer that its own adapter allows.

Exact, not approximate: roll-out and updates read the same kept states, so the ratio of the first pass is still exactly 1. Whether
a model's layout bears it is not believed but tried, on the first answers, against the ordinary way; where it does not, or where
there is nothing frozen to keep, every role computes all layers as before, and the log says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from alignment.methods.roles import computing_in, micro_batches, switch_on
from alignment.models import backbone, without_cache

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


class NotFrozen(Exception):
    """Nothing can be kept between forward passes of a model; the message says why."""


class FrozenLayers:
    """Hidden states below the adapted layers of a shared base, by the token ids of their row.

    Args:
        adapters: a causal language model in evaluation mode with adapters, none of them merged.
        names: the adapters that roles are played by.
        batch_size: rows in one forward pass through the frozen layers.

    Raises:
        NotFrozen: no layer is below all parameters of any of the adapters, or the model is not one of decoder layers in a list.
    """

    def __init__(self, adapters: PeftModel, names: Sequence[str], batch_size: int) -> None:
        model = adapters.get_base_model()
        if any(module.training for module in model.modules()):
            raise NotFrozen("the model is in training mode, with dropout")
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise NotFrozen("gradient checkpointing is on")
        self._model, self._adapters, self._batch_size = model, adapters, batch_size
        self._layers = _decoder_layers(model)
        self.depths = {name: _first_layer_of(model, self._layers, name) for name in names}
        """The first layer, from 0, that each adapter changes."""
        if not any(self.depths.values()):
            raise NotFrozen("the adapters change the first layer, too, or the embeddings")
        self._deepest = max(self.depths, key=self.depths.__getitem__)
        self._kept: dict[tuple[int, ...], dict[int, torch.Tensor]] = {}
        self._tuple_of = 0  # length of the tuples that the layers return; 0 where they return a tensor

    def forget(self) -> None:
        """Drop what is kept: a new step has new answers."""
        self._kept.clear()

    @contextmanager
    def skipped(self, name: str, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Iterator[None]:
        """Inside, a forward pass of the model on this right-padded batch, (B, T) both, computes only the layers from the first
        one that adapter `name` changes; what enters it is computed now for rows that are not kept yet."""
        depth = self.depths[name]
        if not depth:
            yield
            return
        import torch
        from torch.nn.functional import pad
        from torch.nn.utils.rnn import pad_sequence

        rows = [tuple(ids[:length]) for ids, length in zip(input_ids.tolist(), attention_mask.sum(1).tolist(), strict=True)]
        self._keep(rows)
        states = pad_sequence([self._kept[row][depth] for row in rows], batch_first=True)
        states = pad(states, (0, 0, 0, input_ids.shape[1] - states.shape[1]))
        if not torch.is_autocast_enabled(states.device.type):
            # The reward model's weights are multiplied as they are; some models' states are wider where autocast is on.
            states = states.to(self._model.get_input_embeddings().weight.dtype)
        forwards = dict.fromkeys(range(depth - 1), self._passing) | {depth - 1: lambda *args, **kwargs: self._returned(states)}
        # Missing states were computed with another adapter on.
        switch_on(self._adapters, name)
        with self._replaced(forwards):
            yield

    def check(self, batch: dict[str, torch.Tensor]) -> None:
        """Compare each role's last hidden states with and without skipping.

        Args:
            batch: right-padded `input_ids` and `attention_mask`, (B, T) both.

        Raises:
            NotFrozen: they differ by more than rounding, or the model cannot be run so.
        """
        import torch

        inside = batch["attention_mask"].bool()
        tolerance = 1e-3 if self._model.get_input_embeddings().weight.dtype == torch.float32 else 0.02
        body = backbone(self._model)
        inputs = batch | without_cache(body)
        with torch.no_grad(), computing_in(self._model):
            for name in self.depths:
                switch_on(self._adapters, name)
                whole = body(**inputs)[0][inside].float()
                try:
                    with self.skipped(name, **batch):
                        skipping = body(**inputs)[0][inside].float()
                except Exception as error:  # of whatever kind: a layer of unknown layout was called in an unknown way
                    raise NotFrozen(f"the model cannot be run from its middle ({type(error).__name__}: {error})") from error
                # A comparison with NaN is false, so that NaN is refused.
                off, scale = (skipping - whole).abs().max().item(), whole.abs().max().item()
                if not off <= tolerance * scale:
                    raise NotFrozen(f"run from its middle, the model's hidden states differ by {off:.2g} of {scale:.2g}")

    def _keep(self, rows: Sequence[tuple[int, ...]]) -> None:
        missing = []
        for row in set(rows) - self._kept.keys():
            # What a decoder computes at a token depends on the tokens before it alone, so a row that goes on longer serves as
            # well (the reward model reads an answer that was cut, and an EOS after it).
            longer = next((states for other, states in self._kept.items() if other[: len(row)] == row), None)
            if longer is None:
                missing.append(row)
            else:
                self._kept[row] = {depth: states[: len(row)] for depth, states in longer.items()}
        missing.sort()
        for batch in micro_batches([len(row) for row in missing], self._batch_size, self._model.device):
            self._compute([missing[i] for i in batch])

    def _compute(self, rows: Sequence[tuple[int, ...]]) -> None:
        import torch

        device, width = self._model.device, max(map(len, rows))
        ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        depths = sorted({depth for depth in self.depths.values() if depth})
        seen: dict[int, torch.Tensor] = {}

        def reading(depth: int) -> Callable:
            def read(module: Any, inputs: Any, output: Any) -> None:
                self._tuple_of = len(output) if isinstance(output, tuple) else 0
                seen[depth] = output[0] if isinstance(output, tuple) else output

            return read

        # Of the adapters, only the one that begins highest is nowhere on the way.
        switch_on(self._adapters, self._deepest)
        hooks = [self._layers[depth - 1].register_forward_hook(reading(depth)) for depth in depths]
        body = backbone(self._model)
        try:
            # The reward model scores in inference mode, whose tensors no gradient can be computed from.
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                computing_in(self._model),
                self._replaced(dict.fromkeys(range(depths[-1], len(self._layers)), self._passing)),
            ):
                body(input_ids=ids, attention_mask=mask, **without_cache(body))
        finally:
            for hook in hooks:
                hook.remove()
        if seen.keys() != set(depths) or any(states.shape[:-1] != ids.shape for states in seen.values()):
            raise NotFrozen("its layers do not pass on states of shape (batch, tokens, hidden size)")
        for i, row in enumerate(rows):
            # Copies: a view would keep the padding in memory, too.
            self._kept[row] = {depth: states[i, : len(row)].clone() for depth, states in seen.items()}

    def _passing(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._returned(hidden_states)

    def _returned(self, states: torch.Tensor) -> Any:
        return (states, *[None] * (self._tuple_of - 1)) if self._tuple_of else states

    @contextmanager
    def _replaced(self, forwards: dict[int, Callable]) -> Iterator[None]:
        # An attribute of the layer itself hides its class's forward, and may itself have been set by others before.
        before = {i: vars(self._layers[i]).get("forward") for i in forwards}
        try:
            for i, forward in forwards.items():
                self._layers[i].forward = forward
            yield
        finally:
            for i, forward in before.items():
                del self._layers[i].forward
                if forward is not None:
                    self._layers[i].forward = forward


def _decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    from torch.nn import ModuleList

    count = model.config.get_text_config().num_hidden_layers
    lists = {name: m for name, m in model.named_modules() if isinstance(m, ModuleList) and len(m) == count}
    outer = [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise NotFrozen(f"it has {len(outer)} lists of {count} layers")
    return outer[0]


def _first_layer_of(model: PreTrainedModel, layers: torch.nn.ModuleList, adapter: str) -> int:
    """The first layer that the adapter has a parameter in; 0 where it has one that may work before the layers."""
    own = {id(p) for name, p in model.named_parameters() if adapter in name.split(".")}
    inside = {id(p): i for i, layer in enumerate(layers) for p in layer.parameters()}
    head = model.get_output_embeddings()
    after = {id(p) for p in head.parameters()} if head is not None else set()
    before = {id(p) for p in model.get_input_embeddings().parameters()}
    if any(p not in inside and (p not in after or p in before) for p in own):
        return 0
    return min((inside[p] for p in own if p in inside), default=len(layers))
