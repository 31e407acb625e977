"""Supervised fine-tuning, stage 1 of the user's document: cross-entropy on the assistant's tokens.

QLoRA (arXiv 2305.14314) when `load.quantization` is nf4, LoRA otherwise, all weights when `finetuning` is full. TRL's
SFTTrainer does the work; rows come tokenised, with labels, from `alignment.chat`, so the stop token is always trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from alignment.chat import IGNORE, training_example
from alignment.cpu import speed_up
from alignment.errors import UserError
from alignment.models import (
    Config,
    LoadSettings,
    LoraSettings,
    ModelFiles,
    load_causal_lm,
    load_tokenizer,
    lora_config,
    resolve_dtype,
    save_model,
)
from alignment.progress import SILENT, Log
from alignment.records import Conversation
from alignment.training import OptimSettings, Trained, length_grouped, run_trainer, trainer_arguments

CODE_VERSION = "1"


class SftConfig(Config):
    """Settings of the SFT stage."""

    finetuning: Literal["lora", "full"] = Field("lora", description="Train adapters over a frozen base, or all weights")
    lora: LoraSettings = Field(LoraSettings(), description="Adapter settings, used when finetuning is lora")
    load: LoadSettings = Field(LoadSettings(), description="How the base is loaded")
    optim: OptimSettings = Field(
        OptimSettings(epochs=1, learning_rate=2e-4, batch_size=8, micro_batch_size=2), description="Training settings"
    )
    max_length: int = Field(512, ge=16, description="Conversations longer than this many tokens are dropped and counted")


class NothingToTrain(UserError):
    """No row is left to train on; the message says how many were dropped and why."""


def train_sft(
    config: SftConfig,
    base: ModelFiles,
    train: Sequence[Conversation],
    heldout: Sequence[Conversation],
    *,
    work: Path,
    out: Path,
    log: Log = SILENT,
) -> tuple[Trained, dict[str, float]]:
    """Fine-tune `base` on `train`; the model goes to `out/model`, trainer checkpoints to `work`.

    Returns the training curves and final metrics: train/loss (mean over steps), heldout/loss (nats per assistant token)
    before and after, rows and dropped rows.
    """
    from datasets import Dataset
    from trl import SFTConfig as TrlConfig
    from trl import SFTTrainer

    speed_up()
    tokenizer = load_tokenizer(base.base, config.load.trust_remote_code)
    rows, dropped = _tokenise(tokenizer, train, config.max_length)
    held, _ = _tokenise(tokenizer, heldout, config.max_length)
    if not rows:
        raise NothingToTrain(
            f"all {len(train)} training conversations are longer than max_length {config.max_length} tokens. "
            "Remedy: raise max_length or shorten the data."
        )
    load = config.load
    if config.finetuning == "full":
        load = load.model_copy(update={"dtype": "float32"})  # bf16 weights lose small updates; autocast computes in bf16
    arguments = trainer_arguments(config.optim, work=work, dtype=config.load.dtype, max_length=config.max_length)
    model = load_causal_lm(base, load, trainable=config.finetuning == "full")
    lengths = [len(row["input_ids"]) for row in rows]

    class LengthGroupedSftTrainer(SFTTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return length_grouped(lengths, config.optim.batch_size, config.optim.seed)

    trainer = LengthGroupedSftTrainer(
        model=model,
        args=TrlConfig(**arguments),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(held) if held else None,
        peft_config=lora_config(config.lora, model, "CAUSAL_LM") if config.finetuning == "lora" else None,
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"] if held else float("nan")
    trained = run_trainer(trainer, work, log, "SFT")
    after = trainer.evaluate()["eval_loss"] if held else float("nan")
    save_model(trainer.model, tokenizer, out / "model", resolve_dtype(config.load.dtype))
    metrics = {
        "train/loss": trained.mean("loss"),
        "train/loss_last": trained.last("loss"),
        "train/rows": len(rows),
        "train/rows_dropped_too_long": dropped,
        "heldout/loss_before": before,
        "heldout/loss": after,
    }
    return trained, {k: v for k, v in metrics.items() if v == v}


def _tokenise(tokenizer, conversations: Sequence[Conversation], max_length: int) -> tuple[list[dict], int]:
    rows, dropped = [], 0
    for conversation in conversations:
        example = training_example(tokenizer, [m.model_dump() for m in conversation.messages])
        if len(example.input_ids) > max_length or all(label == IGNORE for label in example.labels):
            dropped += 1
        else:
            rows.append({"input_ids": example.input_ids, "labels": example.labels})
    return rows, dropped
