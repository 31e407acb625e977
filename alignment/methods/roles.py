"""PPO's four roles - policy, reference, critic, reward model - on one loaded base, or as a model each.

RLHF is said to need four models in memory. With adapters it needs one: whichever roles stand on the same base become
adapters of one loaded model, with a small head where they need one, and a role is played by switching its adapter on.
A role that cannot share gets a model of its own: a reward model over another base, or weights that are all trained.

Reference and policy are computed in exactly the same way, so that before the first step their difference is exactly 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.added_tokens import rows_for_another_adapter
from alignment.errors import UserError
from alignment.likelihood import next_token_logits, only_projects
from alignment.models import (
    LoadSettings,
    LoraSettings,
    ModelFiles,
    backbone,
    load_causal_lm,
    load_for_training,
    load_reward_model,
    lora_config,
    resolve_dtype,
    without_cache,
)

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from alignment.methods.frozen_layers import FrozenLayers

POLICY, REFERENCE, CRITIC, REWARD = "default", "reference", "critic", "reward"


@dataclass
class Sequences:
    """A batch of right-padded texts, and which of their tokens are asked for.

    Attributes:
        input_ids, attention_mask: (B, T).
        wanted: (B, T - 1), true at t where token t + 1 was sampled. N is the number of true entries.
        targets: (N,), the sampled tokens, row by row.
        counts: sampled tokens per row; they sum to N.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    wanted: torch.Tensor
    targets: torch.Tensor
    counts: list[int]

    @classmethod
    def of(cls, rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int, device: Any) -> Sequences:
        """From (prompt ids, sampled ids) of each row."""
        import torch

        width = max(len(p) + len(a) for p, a in rows)
        ids = torch.full((len(rows), width), pad)
        mask = torch.zeros_like(ids)
        wanted = torch.zeros((len(rows), width - 1), dtype=torch.bool)
        for i, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            ids[i, :end] = torch.tensor([*prompt, *answer])
            mask[i, :end] = 1
            wanted[i, len(prompt) - 1 : end - 1] = True
        targets = ids[:, 1:][wanted]
        return cls(ids.to(device), mask.to(device), wanted.to(device), targets.to(device), [len(a) for _, a in rows])

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What a model's forward takes."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


def micro_batches(lengths: Sequence[int], most: int, device: torch.device) -> list[list[int]]:
    """Cut rows into batches of up to `most` neighbours in length, shortest first, so that least is computed in all.

    A batch costs its rows times its longest row, and something for being a pass of its own. A CPU takes as long for a padded
    token as for a real one and needs few rows to be busy, so rows of very different lengths go apart there; an accelerator gets
    as few batches as possible.

    Args:
        lengths: tokens per row.

    Returns:
        Row numbers, batch by batch.
    """
    a_pass = _PASS_ON_CPU if device.type == "cpu" else _PASS_ELSEWHERE
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    best, start_of = [0], [0]  # of the first n rows: what they cost, and where their last batch starts
    for end in range(1, len(order) + 1):
        costs = {i: best[i] + a_pass + (end - i) * lengths[order[end - 1]] for i in range(max(end - most, 0), end)}
        start = min(costs, key=costs.__getitem__)
        best.append(costs[start])
        start_of.append(start)
    out, end = [], len(order)
    while end:
        out.append(order[start_of[end] : end])
        end = start_of[end]
    return out[::-1]


# In tokens. The CPU's is about what a pass of a 135M model loses to Python and to smaller matrices.
_PASS_ON_CPU, _PASS_ELSEWHERE = 32, 1_000_000


class LanguageRole:
    """A causal language model: the policy or the reference."""

    def __init__(
        self,
        model: PreTrainedModel,
        adapters: PeftModel | None,
        name: str,
        dtype: torch.dtype,
        *,
        without_adapter: bool = False,
    ) -> None:
        self._model, self._adapters, self.name, self._bare = model, adapters, name, without_adapter
        self._dtype = dtype
        self._plain: bool | None = None
        self.frozen: FrozenLayers | None = None

    def log_probs(
        self, batch: Sequences, temperature: float, *, entropy: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(N,) log-probabilities of the sampled tokens, in float32 nats, under the distribution that was sampled from, the
        softmax of logits / temperature. Where no gradient is computed, (N,) entropies of that distribution in nats, too, unless
        `entropy` is false."""
        import torch

        with self.active(), computing_in(self._model, self._dtype):
            if self._plain is None:
                with torch.no_grad():
                    self._plain = only_projects(self._model, {k: v[:1] for k, v in batch.inputs.items()})
            with _skipped(self.frozen, self.name, batch.inputs):
                logits = next_token_logits(self._model, batch.inputs, batch.wanted, self._plain)
        with torch.autocast(logits.device.type, enabled=False):
            all_log_probs = (logits / temperature).log_softmax(-1)
            of_all = -(all_log_probs.exp() * all_log_probs).sum(-1) if entropy and not torch.is_grad_enabled() else None
            return all_log_probs.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1), of_all

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        """The model with this role's adapter switched on."""
        if self._adapters is None:
            yield self._model
            return
        switch_on(self._adapters, self.name)
        with self._adapters.disable_adapter() if self._bare else nullcontext():
            yield self._model

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that training moves, by name."""
        if self._adapters is None:
            return dict(self._model.named_parameters())
        return adapter_parameters(self._adapters, self.name)

    @contextmanager
    def sampling(self) -> Iterator[PreTrainedModel]:
        """The model in the form that is fastest to sample from, while it lasts: a full one as it computes in training; adapter
        weights in the base's precision or, where that is 32 bit, added to the base's. (In 16 bit the sum would round: not quite
        the policy that learns would answer.)"""
        import torch

        if self._adapters is None:
            with computing_in(self._model, self._dtype):
                yield self._model
            return
        with self.active() as model:
            dtype = model.get_input_embeddings().weight.dtype
            kept = {}
            if dtype != torch.float32:
                kept = {p: p.data for p in self.trainable().values()}
            try:
                for parameter, data in kept.items():
                    parameter.data = data.to(dtype)
                with _merged(self._adapters, self.name):
                    yield model
            finally:
                for parameter, data in kept.items():
                    parameter.data = data


class CriticRole:
    """A value per sampled token: a backbone and a linear head without bias."""

    def __init__(self, model: PreTrainedModel, adapters: PeftModel | None, head: torch.Tensor, dtype: torch.dtype) -> None:
        import torch

        self._model, self._adapters, self._dtype = model, adapters, dtype
        self.head = torch.nn.Parameter(head.detach().float().clone().to(model.device))  # (1, hidden size)
        self.frozen: FrozenLayers | None = None

    def values(self, batch: Sequences) -> torch.Tensor:
        """(N,) float32: the return expected before each sampled token is drawn."""
        import torch

        if self._adapters is not None:
            switch_on(self._adapters, CRITIC)
        with computing_in(self._model, self._dtype), _skipped(self.frozen, CRITIC, batch.inputs):
            body = backbone(self._model)
            states = body(**batch.inputs, **without_cache(body))[0][:, :-1][batch.wanted]
        with torch.autocast(states.device.type, enabled=False):
            return (states.float() @ self.head.T).squeeze(-1)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that training moves, by name; the value head is among them."""
        if self._adapters is not None:
            return adapter_parameters(self._adapters, CRITIC) | {"head": self.head}
        return {n: p for n, p in backbone(self._model).named_parameters() if p.requires_grad} | {"head": self.head}


class SharedScorer:
    """The reward model as an adapter of the shared base, with the forward of a sequence classifier: `logits` (B, 1)."""

    def __init__(self, model: PreTrainedModel, adapters: PeftModel, head: torch.Tensor) -> None:
        self._model, self._adapters, self._head = model, adapters, head.float().to(model.device)
        self.frozen: FrozenLayers | None = None

    @property
    def device(self) -> torch.device:
        """Where inputs belong."""
        return self._model.device

    def eval(self) -> None:
        """Nothing to do: the shared model is never in training mode."""

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        """Scores at the last token of each row."""
        import torch
        from transformers.modeling_outputs import SequenceClassifierOutputWithPast

        switch_on(self._adapters, REWARD)
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        with _skipped(self.frozen, REWARD, batch):
            body = backbone(self._model)
            states = body(**batch, **without_cache(body))[0]
        last = states[torch.arange(len(states), device=states.device), attention_mask.sum(1) - 1]
        return SequenceClassifierOutputWithPast(logits=last.float() @ self._head.T)


@dataclass
class Roles:
    """The four roles. `scorer` is anything `alignment.reward.score` takes, None where no reward model is used."""

    policy: LanguageRole
    reference: LanguageRole
    critic: CriticRole
    scorer: Any
    policy_model: PreTrainedModel
    """What is saved: a PEFT model whose adapter `default` is the policy's, or the full model."""

    on_shared_base: list[tuple[str, LanguageRole | CriticRole | SharedScorer]]
    """Roles on `policy_model`, each with the name of the adapter that plays it; none where each role has a model of its own."""

    def start_from(self, frozen: FrozenLayers | None) -> None:
        """Let the roles on the shared base skip the layers whose states `frozen` keeps; None: they compute all layers."""
        for _, role in self.on_shared_base:
            role.frozen = frozen


def make_roles(
    sft: ModelFiles,
    reward: ModelFiles | None,
    load: LoadSettings,
    *,
    lora: LoraSettings,
    full: bool,
    share_base: bool,
    critic_from_reward: bool,
    reward_tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
) -> Roles:
    """Load the roles of a PPO run.

    Args:
        sft: the policy before training, and the reference.
        reward: the reward model, None where no reward function uses one.
        lora: the policy's new adapter where `sft` is a full model, and the critic's where it has no adapter to start from.
        full: train all weights of policy and critic; each role then is a model of its own.
        share_base: roles that stand on the same base share it. False gives each a model of its own (for comparison).
        critic_from_reward: the critic starts as a copy of the reward model, head included, and else from the SFT checkpoint with
            a head of zeros.

    Raises:
        UserError: all weights are to be trained of a checkpoint that is an adapter.
    """
    from_reward = critic_from_reward and reward is not None
    shared = share_base and not full
    dtype = resolve_dtype(load.dtype)
    policy_model, adapter = load_for_training(sft, finetuning="full" if full else "lora", lora=lora, load=load)
    scorer_load = load
    if full:
        load = load.model_copy(update={"dtype": "float32"})  # as the policy
    if adapter is not None:
        policy_model = _new_adapter(policy_model, adapter, seed)
    policy_model.eval()  # no dropout: the ratio between two passes is to measure the update alone
    inner = policy_model if full else policy_model.get_base_model()
    peft = None if full else policy_model
    policy = LanguageRole(inner, peft, POLICY, dtype)
    if shared and sft.adapter is not None:
        _add_adapter(peft, sft.adapter, REFERENCE)
        reference = LanguageRole(inner, peft, REFERENCE, dtype)
    elif shared:
        reference = LanguageRole(inner, peft, POLICY, dtype, without_adapter=True)
    else:
        # Not merged: merging rounds, and the difference between policy and reference is to begin at exactly 0.
        other = load_causal_lm(sft, load, trainable=sft.adapter is not None).eval().requires_grad_(False)
        if sft.adapter is None:
            reference = LanguageRole(other, None, POLICY, dtype)
        else:
            reference = LanguageRole(other.get_base_model(), other, POLICY, dtype)
    on_shared = shared and reward is not None and reward.adapter is not None and reward.base == sft.base
    scorer, head = None, None
    if on_shared:
        head = _add_adapter(peft, reward.adapter, REWARD)
        scorer = SharedScorer(inner, peft, head)
    elif reward is not None:
        scorer = load_reward_model(reward, scorer_load, tokenizer=reward_tokenizer).requires_grad_(False)
    if on_shared and from_reward:
        _add_adapter(peft, reward.adapter, CRITIC, trainable=True)
        critic = CriticRole(inner, peft, head, dtype)
    elif shared:
        start = sft.adapter
        if from_reward:
            raise UserError(
                "aligned_policy/ppo.critic_start: the reward model stands on another base than the policy, and the critic shares "
                "the policy's. Remedy: set critic_start to sft, or share_base to false."
            )
        if start is not None:
            _add_adapter(peft, start, CRITIC, trainable=True)
        else:
            peft.add_adapter(CRITIC, lora_config(lora, inner, "CAUSAL_LM"))
        critic = CriticRole(inner, peft, _zeros(inner), dtype)
    else:
        critic = _own_critic(sft, reward if from_reward else None, load, reward_tokenizer, full, lora, dtype)
    policy_model.eval()  # new adapters come in training mode, and adding a frozen one freezes the active one
    if peft is not None:
        peft.set_adapter(POLICY)
    played = [(POLICY, policy), (reference.name, reference), (CRITIC, critic), (REWARD, scorer if on_shared else None)]
    on_base = [(name, role) for name, role in played if shared and role is not None]
    return Roles(policy, reference, critic, scorer, policy_model, on_base)


def switch_on(adapters: PeftModel, name: str) -> None:
    """Make `name` the one active adapter. Gradients are asked for where training moves weights, and nowhere else."""
    if adapters.active_adapter != name:
        adapters.set_adapter(name, inference_mode=name not in (POLICY, CRITIC))


def adapter_parameters(adapters: PeftModel, name: str) -> dict[str, torch.nn.Parameter]:
    """The parameters of one adapter, by name."""
    switch_on(adapters, name)
    return {n: p for n, p in adapters.named_parameters() if p.requires_grad}


def _skipped(frozen: FrozenLayers | None, name: str, batch: dict[str, torch.Tensor]) -> AbstractContextManager[None]:
    return nullcontext() if frozen is None else frozen.skipped(name, **batch)


@contextmanager
def computing_in(model: PreTrainedModel, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Autocast to `dtype` (the base's, if none is given) where that is 16 bit; what is trained keeps float32 weights."""
    import torch
    from peft.helpers import disable_input_dtype_casting

    dtype = dtype or model.get_input_embeddings().weight.dtype
    half = dtype != torch.float32
    # Under autocast PEFT's own cast of every input to float32 would be undone at once.
    with torch.autocast(model.device.type, dtype=dtype if half else None, enabled=half), disable_input_dtype_casting(model, half):
        yield


@contextmanager
def _merged(adapters: PeftModel, name: str) -> Iterator[None]:
    # Not PEFT's own merging: that subtracts the adapter again in the end, which leaves a rounded base. Here the base's matrices
    # are put back as they were. They alone are in float32; 4-bit and 16-bit ones are left as they are.
    import torch
    from peft.tuners.lora import LoraLayer
    from transformers.pytorch_utils import Conv1D

    layers = [
        layer
        for layer in adapters.modules()
        if isinstance(layer, LoraLayer)
        and name in layer.lora_A
        and name not in layer.lora_variant
        and not layer.lora_bias[name]
        and isinstance(layer.get_base_layer(), (torch.nn.Linear, Conv1D))
        and layer.get_base_layer().weight.dtype == torch.float32
    ]
    before = [layer.get_base_layer().weight.data for layer in layers]
    try:
        for layer, weight in zip(layers, before, strict=True):
            with torch.no_grad():
                layer.get_base_layer().weight.data = weight + layer.get_delta_weight(name)
            layer.merged_adapters.append(name)
        yield
    finally:
        for layer, weight in zip(layers, before, strict=True):
            layer.get_base_layer().weight.data = weight
            if name in layer.merged_adapters:
                layer.merged_adapters.remove(name)


def _new_adapter(model: PreTrainedModel, config: Any, seed: int) -> PeftModel:
    import torch
    from peft import get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(model, config)


def _add_adapter(peft: PeftModel, folder: Path, name: str, *, trainable: bool = False) -> torch.Tensor | None:
    """Put a saved adapter beside the policy's. Returns the (1, hidden size) score head saved with it, if any."""
    from peft import LoraConfig, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    config = LoraConfig.from_pretrained(str(folder))
    config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, not trainable
    weights = load_peft_weights(str(folder), device="cpu")
    heads = [key for key in weights if key.endswith("score.weight")]
    head = weights.pop(heads[0]) if heads else None
    dtype = peft.get_base_model().get_input_embeddings().weight.dtype
    rows_for_another_adapter(peft, config, weights)
    peft.add_adapter(name, config)
    if not trainable:
        # Frozen: the precision it is computed in anyway.
        for key, parameter in peft.named_parameters():
            if f".{name}." in key:
                parameter.data = parameter.data.to(dtype)
    result = set_peft_model_state_dict(peft, weights, adapter_name=name)
    if result.unexpected_keys:
        raise UserError(f"{folder}: its adapter does not fit the base model: unknown weights {result.unexpected_keys[:2]}.")
    return head


def _own_critic(sft, reward, load, tokenizer, full, lora, dtype) -> CriticRole:
    from peft import get_peft_model

    # Of a full model, LoRA trains a new adapter, made below; its own weights may then be in 4 bit.
    trainable = full or (reward or sft).adapter is not None
    if reward is not None:
        model = load_reward_model(reward, load, tokenizer=tokenizer, trainable=trainable)
        inner = model.get_base_model() if hasattr(model, "peft_config") else model
        score = inner.score
        head = (score.modules_to_save["default"] if hasattr(score, "modules_to_save") else score).weight
    else:
        model = load_causal_lm(sft, load, trainable=trainable)
        inner = model.get_base_model() if hasattr(model, "peft_config") else model
        head = _zeros(inner)
    if not full and not hasattr(model, "peft_config"):
        adapter = lora_config(lora, inner, "CAUSAL_LM")
        adapter.task_type = None  # a classifier generates nothing
        model = get_peft_model(inner, adapter)
    model.eval()
    return CriticRole(inner, None, head, dtype)


def _zeros(model: PreTrainedModel) -> torch.Tensor:
    import torch

    return torch.zeros(1, model.config.get_text_config().hidden_size)
