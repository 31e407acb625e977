"""A base model without chat template through real materializations: resolved with a template, then fine-tuned."""

import json
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="module")
def run(new_sandbox, tmp_path_factory):
    """`base_model` and `sft_checkpoint` over a small GPT-2 that was saved without template and pad token."""
    from transformers import AutoTokenizer

    from alignment.tiny_model import build_tiny_model

    source = build_tiny_model(tmp_path_factory.mktemp("source") / "gpt2", architecture="gpt2")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = tokenizer.pad_token = None
    (source / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(source)
    template = source.parent / "mine.jinja"
    template.write_text(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    base = {
        "source": "local",
        "name": str(source),
        "chat_template": str(template),
        "added_tokens": ["<|user|>", "<|assistant|>", "<|system|>"],
    }
    sandbox = new_sandbox("any_base")
    config = {"ops": {"base_model": {"config": base}}}
    sandbox.start_assets(["base_model", "sft_dataset", "sft_checkpoint"], config).finish()
    (resolved,), (trained,) = sandbox.artifacts("base_model"), sandbox.artifacts("sft_checkpoint")
    return SimpleNamespace(sandbox=sandbox, config=config, resolved=resolved, trained=trained)


def test_the_template_and_its_tokens_are_in_the_artifact(run):
    from alignment.models import load_tokenizer

    tokenizer = load_tokenizer(run.resolved / "model")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer("<|assistant|>", add_special_tokens=False)["input_ids"] == [260]
    assert json.loads((run.resolved / "model" / "config.json").read_text())["untrained_token_ids"] == [259, 260, 261]


def test_the_sft_adapter_brings_the_tokens_it_trained(run, float32_log_prob):
    from safetensors.torch import load_file

    weights = load_file(run.trained / "model" / "adapter_model.safetensors")
    assert [w.shape for name, w in weights.items() if "trainable_tokens" in name] == [(3, 64)]
    before, after = (float32_log_prob(run.resolved / "model", adapter) for adapter in (None, run.trained / "model"))
    assert after > before + 1


@pytest.fixture(scope="module")
def float32_log_prob():
    """How likely a model finds it to stop after an answer, in nats."""
    from alignment.likelihood import answer_log_probs
    from alignment.models import LoadSettings, ModelFiles, load_causal_lm, load_tokenizer

    def measure(base, adapter):
        model = load_causal_lm(ModelFiles(base, adapter), LoadSettings(dtype="float32"))
        question = [{"role": "user", "content": "What is the capital of France?"}]
        return answer_log_probs(model, load_tokenizer(base), [question], ["Paris is the capital of France."], 1, [True])[0]

    return measure
