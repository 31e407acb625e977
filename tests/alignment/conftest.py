"""What the library's tests share: tiny real models, and small tools to train, to interrupt and to compare.

The models have random weights (`alignment.tiny_model`), so that everything runs in seconds without a network; the
trainers, tokenizers and checkpoints are the real ones.
"""

import os

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of a two-layer Llama."""
    from alignment.tiny_model import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory):
    """The folder of a two-layer GPT-2 with the same tokenizer."""
    from alignment.tiny_model import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "gpt2", architecture="gpt2")


@pytest.fixture(scope="session")
def other_base(tmp_path_factory):
    """The folder of a one-layer GPT-2 with another tokenizer: its ids, special tokens and chat template are its own."""
    import torch
    from test_any_base import bare_tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    from alignment.chat_templates import shipped_chat_template

    tokenizer = bare_tokenizer()
    tokenizer.chat_template = shipped_chat_template("plain").text
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=512, **ids))
    folder = tmp_path_factory.mktemp("other") / "gpt2"
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def float32():
    """Load settings under which equal computations give equal numbers on every machine."""
    from alignment.models import LoadSettings

    return LoadSettings(dtype="float32")


@pytest.fixture(scope="session")
def model(tiny_model, float32):
    """The tiny Llama in memory. Nobody may change its weights."""
    from alignment.models import ModelFiles, load_causal_lm

    return load_causal_lm(ModelFiles(tiny_model), float32)


@pytest.fixture
def tokenizer(tiny_model):
    """A fresh tokenizer: a test may give it another template or EOS."""
    from alignment.models import load_tokenizer

    return load_tokenizer(tiny_model)


ANSWERS = ("17", "42", "58", "93")


@pytest.fixture(scope="session")
def problems():
    """Sixteen problems, all with the same answer, one of the four that `four_answers` gives."""
    from alignment.records import Problem

    return [Problem(id=f"q{i}", prompt=f"Question {i}", answer=ANSWERS[1]) for i in range(16)]


@pytest.fixture(scope="session")
def fine_tuned(float32, tmp_path_factory):
    """Fine-tunes a model on the answers to problems; the folder of what was trained."""
    from alignment.records import Conversation, Message
    from alignment.rewards import problem_task
    from alignment.sft import SftConfig, train_sft
    from alignment.training import OptimSettings

    def run(start, problems, answers, finetuning, epochs, learning_rate):
        folder = tmp_path_factory.mktemp("fine_tuned")
        (folder / "work").mkdir()
        rows = [
            Conversation(
                id=f"{p.id}{answer}",
                messages=(
                    Message(role="user", content=problem_task(p).messages[0]["content"]),
                    Message(role="assistant", content=answer),
                ),
            )
            for p in problems
            for answer in answers
        ]
        optim = OptimSettings(epochs=epochs, learning_rate=learning_rate, batch_size=32, micro_batch_size=32)
        train_sft(SftConfig(finetuning=finetuning, load=float32, optim=optim), start, rows, [], work=folder / "work", out=folder)
        return folder / "model"

    return run


@pytest.fixture(scope="session")
def four_answers(tiny_model, problems, fine_tuned):
    """A full model that gives each of four answers to every problem equally often."""
    from alignment.models import ModelFiles

    return ModelFiles(fine_tuned(ModelFiles(tiny_model), problems, ANSWERS, "full", epochs=50, learning_rate=5e-3))


@pytest.fixture(scope="session")
def sft_adapter(four_answers, problems, fine_tuned):
    """An SFT adapter over `four_answers`, with dropout in its configuration: the usual start of a method."""
    from alignment.models import ModelFiles

    adapter = fine_tuned(four_answers, problems, ANSWERS[:2], "lora", epochs=2, learning_rate=1e-3)
    return ModelFiles(four_answers.base, adapter)


class Interrupted(BaseException):
    """Stands for a kill. Not an Exception, so that no `except Exception` can swallow it."""


@pytest.fixture(scope="session")
def interrupted():
    """The exception that `recording_log(until=...)` raises."""
    return Interrupted


@pytest.fixture(scope="session")
def recording_log():
    """Makes a `Log` and the list of (step, loss) it saw; with `until`, it dies when that step is logged."""
    from alignment.progress import Log

    def make(until=None):
        seen = []

        def metrics(step, values):
            if "loss" in values:
                seen.append((step, values["loss"]))
                if step == until:
                    raise Interrupted

        return Log(metrics=metrics), seen

    return make


@pytest.fixture(scope="session")
def largest_difference():
    """Largest absolute difference between the weights two model folders hold; they must hold the same tensors."""
    from safetensors.torch import load_file

    def compare(a, b):
        (name,) = {path.name for folder in (a, b) for path in folder.glob("*.safetensors")}
        left, right = load_file(a / name), load_file(b / name)
        assert left.keys() == right.keys()
        assert left
        return max((left[key] - right[key]).abs().max().item() for key in left)

    return compare
