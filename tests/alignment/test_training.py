"""What all trainers share: one device, whatever the machine has, and settings of which none is ignored."""

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from alignment.models import ModelFiles, load_causal_lm
from alignment.progress import quiet
from alignment.records import Conversation, Message
from alignment.sft import SftConfig, train_sft
from alignment.training import OptimSettings, trainer_arguments

# --- Settings ---------------------------------------------------------------------------------------------------------


def test_a_warm_up_that_the_scheduler_does_not_have_is_refused():
    message = "scheduler constant has no warm-up, and warmup_ratio is 0.1; choose constant_with_warmup, or set warmup_ratio to 0"
    with pytest.raises(ValidationError, match=message):
        OptimSettings(scheduler="constant", warmup_ratio=0.1)
    for scheduler, ratio in (("constant", 0.0), ("constant_with_warmup", 0.1), ("linear", 0.0)):
        assert OptimSettings(scheduler=scheduler, warmup_ratio=ratio).warmup_ratio == ratio


# --- One device -------------------------------------------------------------------------------------------------------


def trl_config(name):
    quiet()
    import trl
    from trl.experimental import orpo

    return orpo.ORPOConfig if name == "ORPO" else getattr(trl, f"{name}Config")


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Makes the arguments of a trainer on a machine with two GPUs, as far as transformers can tell."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    optim = OptimSettings(batch_size=8, micro_batch_size=8)
    return lambda name: trainer_arguments(trl_config(name), optim, work=tmp_path, dtype="float32", use_cpu=False)


@pytest.mark.parametrize("name", ["SFT", "Reward", "DPO", "KTO", "ORPO", "GRPO", "RLOO"])
def test_a_trainer_takes_one_of_two_gpus(arguments, tmp_path, name):
    assert trl_config(name)(output_dir=str(tmp_path), bf16=False, use_cpu=False).n_gpu == 2  # what transformers would do
    assert arguments(name).n_gpu == 1
    assert arguments(name).train_batch_size == 8


def test_a_trainer_starts_on_a_machine_with_two_gpus(arguments, tiny_model, float32, tokenizer):
    from datasets import Dataset
    from trl import SFTTrainer

    model = load_causal_lm(ModelFiles(tiny_model), float32, trainable=True)
    rows = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 8)
    trainer = SFTTrainer(model=model, args=arguments("SFT"), train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.model_wrapped is trainer.model  # not in DataParallel


# --- What the optimiser is told ---------------------------------------------------------------------------------------

LEARNING_RATE = 1e-2


@pytest.fixture(scope="module")
def one_step(tiny_model, float32, tmp_path_factory):
    """The weights by name before, and after one optimiser step on all of them."""

    def run(**settings):
        folder = tmp_path_factory.mktemp("one_step")
        (folder / "work").mkdir()
        optim = {"scheduler": "constant", "warmup_ratio": 0.0, "batch_size": 2, "micro_batch_size": 2}
        optim = OptimSettings(**optim | {"learning_rate": LEARNING_RATE} | settings)
        talks = [
            Conversation(id=a, messages=(Message(role="user", content="Why?"), Message(role="assistant", content=a)))
            for a in "ab"
        ]
        config = SftConfig(finetuning="full", load=float32, optim=optim)
        trained, _ = train_sft(config, ModelFiles(tiny_model), talks, [], work=folder / "work", out=folder)
        assert trained.steps == 1
        return load_file(tiny_model / "model.safetensors"), load_file(folder / "model" / "model.safetensors")

    return run


def test_weight_decay_takes_its_share_of_every_matrix(one_step):
    # Decoupled (AdamW): the step along the gradient is the same, and the weight shrinks by learning rate x decay.
    before, plain = one_step(weight_decay=0.0)
    _, decayed = one_step(weight_decay=5.0)
    for name, weight in before.items():
        shrunk = LEARNING_RATE * 5.0 * weight if weight.ndim > 1 else torch.zeros_like(weight)  # norms are left alone
        torch.testing.assert_close(plain[name] - decayed[name], shrunk, atol=1e-5, rtol=0)
    assert max((plain[name] - decayed[name]).abs().max() for name in before) > 1e-3


def test_gradients_are_clipped_to_their_norm(one_step):
    # Adam's step is the learning rate, however long the gradient is, unless it is far below Adam's epsilon (1e-8).
    before, plain = one_step()
    _, clipped = one_step(max_grad_norm=1e-12)
    assert max((plain[name] - before[name]).abs().max() for name in before) > 0.9 * LEARNING_RATE
    assert max((clipped[name] - before[name]).abs().max() for name in before) < 1e-3 * LEARNING_RATE
