"""Loading: what must never be loaded as it is, and adapters that answer the same merged or beside their base."""

import json
import shutil
import sys

import pytest
import torch

from alignment.chat import TemplateError
from alignment.errors import UserError
from alignment.models import (
    LoadSettings,
    LoraSettings,
    ModelFiles,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
    lora_config,
    resolve_dtype,
    save_model,
)
from alignment.progress import Log
from resources.model_sources import BaseModelConfig, ModelSourceError, fetch_model, resolve_source

TEXT = "<|im_start|>user\nHow long do eggs boil?<|im_end|>\n<|im_start|>assistant\nSeven minutes."


@pytest.fixture(scope="module")
def adapter(tiny_model, float32, tmp_path_factory):
    """An adapter that changes much: its matrices are random."""
    from peft import get_peft_model

    torch.manual_seed(0)
    base = load_causal_lm(ModelFiles(tiny_model), float32)
    settings = LoraSettings(r=4, alpha=32, dropout=0.0, target_modules=["all-linear"])
    model = get_peft_model(base, lora_config(settings, base, "CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    folder = tmp_path_factory.mktemp("adapter")
    save_model(model, load_tokenizer(tiny_model), folder)
    return ModelFiles(tiny_model, folder)


def logits(model, tokenizer):
    ids = tokenizer(TEXT, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
    with torch.inference_mode():
        return model(input_ids=ids).logits.float().cpu()


@pytest.mark.parametrize(("dtype", "share"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_an_adapter_merged_into_32_or_16_bit_answers_as_beside_its_base(adapter, tokenizer, dtype, share):
    settings = LoadSettings(dtype=dtype)
    merged, beside = load_causal_lm(adapter, settings), load_causal_lm(adapter, settings, trainable=True).eval()
    assert not hasattr(merged, "peft_config")
    assert hasattr(beside, "peft_config")
    without = logits(load_causal_lm(ModelFiles(adapter.base), settings), tokenizer)
    effect = (logits(beside, tokenizer) - without).abs().max()
    assert effect > 0.1
    assert (logits(merged, tokenizer) - logits(beside, tokenizer)).abs().max() < share * effect


def test_an_adapter_is_never_merged_into_a_4_bit_base(adapter, tokenizer):
    # Merging would round the sum to 4 bit again, and the answers would be those of another model.
    pytest.importorskip("bitsandbytes")
    nf4 = LoadSettings(dtype="float32", quantization="nf4")
    sampled = load_causal_lm(adapter, nf4)
    trained = load_causal_lm(adapter, nf4, trainable=True).eval()
    assert hasattr(sampled, "peft_config")
    assert [n for n, _ in sampled.named_parameters() if "lora_" in n]
    assert torch.equal(logits(sampled, tokenizer), logits(trained, tokenizer))
    merged = logits(sampled.merge_and_unload(), tokenizer)
    assert (merged - logits(trained, tokenizer)).abs().max() > 1e-2  # what would go wrong


# --- Tokenizers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tiny_model, tmp_path):
    """A copy of the tiny model whose tokenizer a function changed."""

    def make(change, of=tiny_model):
        from transformers import AutoTokenizer

        folder = tmp_path / "damaged"
        shutil.copytree(of, folder)
        (folder / "chat_template.jinja").unlink()
        tokenizer = AutoTokenizer.from_pretrained(str(of))
        change(tokenizer)
        tokenizer.save_pretrained(str(folder))
        return folder

    return make


def test_a_pad_token_that_is_eos_is_refused(damaged):
    folder = damaged(lambda t: setattr(t, "pad_token", t.eos_token))
    with pytest.raises(UserError, match=r"pad token '<\|im_end\|>' must exist and differ from EOS.*Remedy"):
        load_tokenizer(folder)


def test_a_missing_chat_template_is_refused(damaged, tiny_gpt2):
    folder = damaged(lambda t: setattr(t, "chat_template", None), of=tiny_gpt2)
    with pytest.raises(UserError, match=r"no chat template.*Remedy: name one in the recipe \(base_model\.chat_template: "):
        load_tokenizer(folder)


def no_eos(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "")


def other_opening(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "### ")


@pytest.mark.parametrize("change", [no_eos, other_opening])
def test_a_reward_model_does_not_score_texts_of_another_template(damaged, tiny_model, float32, tokenizer, change):
    folder = damaged(change)
    with pytest.raises(TemplateError, match=r"was trained on texts that another chat template or tokenizer rendered.*Remedy"):
        load_reward_model(ModelFiles(tiny_model, folder), float32, tokenizer=tokenizer)
    own = load_tokenizer(folder)
    assert load_reward_model(ModelFiles(folder), float32, tokenizer=own).config.num_labels == 1


# --- What a machine and an architecture have --------------------------------------------------------------------------


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_that_a_gpu_only_emulates_is_not_taken_and_not_given(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert resolve_dtype("float32") == torch.float32
    assert resolve_dtype("auto") == (torch.bfloat16 if native else torch.float32)
    if native:
        assert resolve_dtype("bfloat16") == torch.bfloat16
    else:
        with pytest.raises(UserError, match=r"load\.dtype: bfloat16: this GPU \(Tesla T4\) only emulates it.*Remedy.*auto"):
            resolve_dtype("bfloat16")


@pytest.mark.parametrize("architecture", ["gemma2", "llama"])
def test_the_attention_kernel_is_one_that_the_architecture_has(tiny_model, tokenizer, tmp_path, architecture):
    folder = tiny_model
    if architecture == "gemma2":
        from transformers import Gemma2Config, Gemma2ForCausalLM

        size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = Gemma2Config(vocab_size=len(tokenizer), num_key_value_heads=1, head_dim=16, **size)
        folder = tmp_path / "gemma2"
        Gemma2ForCausalLM(config).save_pretrained(folder)
    model = load_causal_lm(ModelFiles(folder), LoadSettings(dtype="float32"))
    assert model.config._attn_implementation == {"gemma2": "eager", "llama": "sdpa"}[architecture]


# --- Reward models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_score_head_computes_in_float32_whatever_its_base_does(tiny_model, tokenizer, dtype):
    scorer = load_reward_model(ModelFiles(tiny_model), LoadSettings(dtype=dtype), tokenizer=tokenizer, seed=3)
    assert scorer.get_input_embeddings().weight.dtype == getattr(torch, dtype)
    ids = tokenizer(TEXT, add_special_tokens=False, return_tensors="pt")["input_ids"].to(scorer.device)
    with torch.no_grad():
        states = scorer.model(ids)[0][:, -1]
        scores = [scorer(ids).logits]
        with torch.autocast(scorer.device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            scores.append(scorer(ids).logits)
    assert states.dtype == getattr(torch, dtype)
    assert {s.dtype for s in scores} == {torch.float32}
    torch.testing.assert_close(scores[0], (states.float() @ scorer.score.weight.T).detach(), rtol=1e-5, atol=1e-6)


# --- Code that comes with a model -------------------------------------------------------------------------------------


@pytest.fixture
def with_code(tiny_model, tmp_path, monkeypatch):
    """The tiny model under an architecture that only its own code knows, and the file that this code writes when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder, trace = tmp_path / "with_code", tmp_path / "trace"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {
        "model_type": "of_its_own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "own.py").write_text(
        f"""
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({str(trace)!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "of_its_own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
""",
        encoding="utf-8",
    )
    return folder, trace


def test_code_that_comes_with_a_model_is_not_run_unless_the_settings_say_so(with_code, tiny_model, tokenizer):
    folder, trace = with_code
    with pytest.raises(ValueError, match=r"(?s)custom code.*trust_remote_code"):
        load_causal_lm(ModelFiles(folder), LoadSettings(dtype="float32"))
    assert not trace.exists()
    trusted = load_causal_lm(ModelFiles(folder), LoadSettings(dtype="float32", trust_remote_code=True))
    assert trace.exists()
    assert type(trusted).__name__ == "OwnForCausalLM"
    plain = load_causal_lm(ModelFiles(tiny_model), LoadSettings(dtype="float32"))
    assert torch.equal(logits(trusted, tokenizer), logits(plain, tokenizer))


def test_a_base_model_with_code_is_refused_with_the_setting_that_would_run_it(with_code, tmp_path):
    folder, trace = with_code

    def fetch(out, **settings):
        config = BaseModelConfig(source="local", name=str(folder), **settings)
        return fetch_model(config, resolve_source(config), out, Log())

    with pytest.raises(ModelSourceError, match=r"needs code of its own.*not run.*Remedy: .*base_model\.trust_remote_code"):
        fetch(tmp_path / "refused")
    assert not trace.exists()
    fetched = tmp_path / "fetched"
    assert fetch(fetched, trust_remote_code=True)["parameters"] > 0
    assert trace.exists()
    trusted = load_causal_lm(ModelFiles(fetched), LoadSettings(dtype="float32", trust_remote_code=True))
    assert type(trusted).__name__ == "OwnForCausalLM"
