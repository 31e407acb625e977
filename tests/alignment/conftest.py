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
