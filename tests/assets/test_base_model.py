"""A base model without chat template through real materializations: resolved with a template, then fine-tuned."""

import json
import shutil
from types import SimpleNamespace

import dagster as dg
import pytest

from assets.base_model import base_model
from assets.data import sft_dataset
from assets.sft import sft_checkpoint
from resources.artifacts import ArtifactStore
from resources.dvc_data import DvcData
from resources.handle_io import HandleIOManager
from resources.tracking import MlflowTracking


@pytest.fixture(scope="module")
def run(tmp_path_factory, fresh_data, empty_database):
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
    storage = tmp_path_factory.mktemp("any_base")
    shutil.copy(empty_database, storage / "mlflow.db")
    done = dg.materialize(
        [base_model, sft_dataset, sft_checkpoint],
        instance=dg.DagsterInstance.ephemeral(),
        resources={
            "store": ArtifactStore(root=str(storage / "artifacts")),
            "io_manager": HandleIOManager(root=str(storage / "handles")),
            "dvc": DvcData(root=str(fresh_data)),
            "tracking": MlflowTracking(
                tracking_uri=f"sqlite:///{storage / 'mlflow.db'}",
                artifact_root=str(storage / "mlartifacts"),
                lock_folder=str(storage / "locks"),
            ),
        },
        run_config={"ops": {"base_model": {"config": base}}},
    )
    assert done.success
    (resolved,), (trained,) = ((storage / "artifacts" / asset).iterdir() for asset in ("base_model", "sft_checkpoint"))
    return SimpleNamespace(resolved=resolved, trained=trained)


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
