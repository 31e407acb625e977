"""What all trainers share: one device, whatever the machine has, and settings of which none is ignored."""

import pytest
import torch
from pydantic import ValidationError

from alignment.models import ModelFiles, load_causal_lm
from alignment.progress import quiet
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
