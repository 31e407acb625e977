"""The CPU settings leave every number as it was."""

import pytest
import torch

from alignment.chat import training_example
from alignment.cpu import _score_labelled_positions_only

ANSWERS = ["Yes.", "No, it is not.", "x" * 40, "東京"]


@pytest.fixture
def trainer(tiny_model, float32, tokenizer, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from alignment.models import ModelFiles, load_causal_lm

    rows = []
    for i, answer in enumerate(ANSWERS):
        told = [{"role": "user", "content": "Why? " * (1 + 5 * i)}, {"role": "assistant", "content": answer}]
        example = training_example(tokenizer, told)
        rows.append({"input_ids": example.input_ids, "labels": example.labels})
    return SFTTrainer(
        model=load_causal_lm(ModelFiles(tiny_model), float32, trainable=True),
        args=SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, per_device_train_batch_size=4, bf16=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def loss_and_gradients(trainer):
    (batch,) = trainer.get_train_dataloader()
    asked = (batch["labels"] != -100).sum().item()
    assert 0 < asked < batch["labels"].numel() / 2  # most positions have no label: the two ways do differ
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


def test_scoring_labelled_positions_only_gives_the_same_loss_and_gradients(trainer, monkeypatch):
    from trl.kernels.chunked_logprob import _use_triton
    from trl.trainer import utils

    cpu = torch.device("cpu")
    monkeypatch.setattr(utils, "_use_triton", _use_triton)  # as TRL ships it, whatever ran before in this process
    assert not utils._use_triton(cpu)
    loss, gradients = loss_and_gradients(trainer)
    _score_labelled_positions_only()
    assert utils._use_triton(cpu)
    fast_loss, fast_gradients = loss_and_gradients(trainer)
    assert fast_loss == pytest.approx(loss, abs=1e-5)
    assert max((gradients[name] - fast_gradients[name]).abs().max().item() for name in gradients) < 1e-5
    assert max(g.abs().max().item() for g in gradients.values()) > 1e-3


def test_the_speed_up_is_in_force_where_it_applies():
    from trl.trainer import utils

    from alignment.cpu import speed_up

    if torch.cuda.is_available():
        pytest.skip("on a GPU both settings are left alone")
    speed_up()
    assert utils._use_triton(torch.device("cpu"))
