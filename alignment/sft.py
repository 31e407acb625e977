"""Supervised fine-tuning, stage 1 of the user's document: cross-entropy on the assistant's tokens.

QLoRA (arXiv 2305.14314) when `load.quantization` is nf4, LoRA otherwise, all weights when `finetuning` is full. TRL's
SFTTrainer does the work; rows come tokenised, with labels, from `alignment.chat`, so the stop token is always trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from alignment.chat import IGNORE, training_examples
from alignment.context_length import check_length
from alignment.cpu import speed_up
from alignment.errors import UserError
from alignment.likelihood import label_and_last_log_probs, label_log_probs
from alignment.models import (
    Config,
    LoadSettings,
    LoraSettings,
    ModelFiles,
    load_for_training,
    load_tokenizer,
    resolve_dtype,
    save_model,
)
from alignment.progress import SILENT, Log
from alignment.records import Conversation
from alignment.training import OptimSettings, Trained, length_grouped, run_trainer, trainer_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CODE_VERSION = "2"


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
    start: ModelFiles,
    train: Sequence[Conversation],
    heldout: Sequence[Conversation],
    *,
    work: Path,
    out: Path,
    log: Log = SILENT,
    what: str = "SFT",
) -> tuple[Trained, dict[str, float]]:
    """Fine-tune `start` on `train`; the model goes to `out/model`, trainer checkpoints to `work`.

    A start that is an adapter is trained on; over a full model a new adapter is trained, or all weights are.
    Returns the training curves and final metrics: train/loss (mean over steps), heldout/loss (nats per assistant token)
    before and after, heldout/eos_probability, rows and dropped rows.
    """
    from datasets import Dataset
    from trl import SFTConfig as TrlConfig
    from trl import SFTTrainer

    speed_up()
    tokenizer = load_tokenizer(start.base, config.load.trust_remote_code)
    rows, dropped = _tokenise(tokenizer, train, config.max_length)
    held, _ = _tokenise(tokenizer, heldout, config.max_length)
    if not rows:
        raise NothingToTrain(
            f"all {len(train)} training conversations are longer than max_length {config.max_length} tokens, or have no token to "
            "train on. Remedy: raise max_length or shorten the data; give each an assistant turn."
        )
    model, adapter = load_for_training(start, finetuning=config.finetuning, lora=config.lora, load=config.load)
    check_length(model, config.max_length, "max_length", "lower it")
    lengths = [len(row["input_ids"]) for row in rows]

    class LengthGroupedSftTrainer(SFTTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return length_grouped(lengths, config.optim.batch_size, config.optim.seed)

    trainer = LengthGroupedSftTrainer(
        model=model,
        args=trainer_arguments(TrlConfig, config.optim, work=work, dtype=config.load.dtype, max_length=config.max_length),
        train_dataset=Dataset.from_list(rows),
        peft_config=adapter,
        processing_class=tokenizer,
    )
    before = nats_per_token(trainer.model, tokenizer, held, config.optim.micro_batch_size)
    trained = run_trainer(trainer, work, log, what)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    after, stops = loss_and_eos_probability(model, tokenizer, held, config.optim.micro_batch_size)
    save_model(model, tokenizer, out / "model", resolve_dtype(config.load.dtype))
    metrics = {
        "train/loss": trained.mean("loss"),
        "train/loss_last": trained.last("loss"),
        "train/rows": len(rows),
        "train/rows_dropped_too_long": dropped,
        "heldout/loss_before": before,
        "heldout/loss": after,
        "heldout/eos_probability": stops,
    }
    return trained, {k: v for k, v in metrics.items() if v == v}


def nats_per_token(model, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict], batch_size: int) -> float:
    """Mean negative log-likelihood of the labelled tokens of `rows`, in nats; NaN without rows.

    Over all tokens, and so the same however they are batched; a trainer's own `eval_loss` is a mean over batches.
    """
    return loss_and_eos_probability(model, tokenizer, rows, batch_size)[0]


_ROWS_FOR_EOS = 64  # enough to tell a learnt stop token from one that is not


def loss_and_eos_probability(
    model, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict], batch_size: int
) -> tuple[float, float]:
    """`nats_per_token` of `rows`, and the mean probability that the model ends where the last answer of one of the first 64 rows
    ends; NaN without rows.

    A model that never learnt its stop token gives a probability of about 0: its answers run on to the token limit.
    """
    if not rows:
        return float("nan"), float("nan")
    read = label_and_last_log_probs(model, tokenizer, [(row["input_ids"], row["labels"]) for row in rows], batch_size)
    loss = -sum(total for total, _ in read) / sum(label != IGNORE for row in rows for label in row["labels"][1:])
    eos = tokenizer.eos_token_id
    asked = list(zip(rows, read, strict=True))[:_ROWS_FOR_EOS]
    ends = [last for row, (_, last) in asked if row["labels"][-1] == eos]
    # Labels in which the stop token was forgotten do not tell; these rows are read again, with one.
    endless = [row["input_ids"][:-1] for row, _ in asked if row["labels"][-1] != eos]
    ends += label_log_probs(model, tokenizer, [([*ids, eos], [IGNORE] * len(ids) + [eos]) for ids in endless], batch_size)
    return loss, sum(map(math.exp, ends)) / len(ends)


def _tokenise(tokenizer, conversations: Sequence[Conversation], max_length: int) -> tuple[list[dict], int]:
    rows, dropped = [], 0
    for conversation in conversations:
        for example in training_examples(tokenizer, [m.model_dump() for m in conversation.messages]):
            if len(example.input_ids) > max_length or all(label == IGNORE for label in example.labels[1:]):
                dropped += 1
            else:
                rows.append({"input_ids": example.input_ids, "labels": example.labels})
    return rows, dropped
