"""What every gradient-based stage shares: optimiser settings, trainer arguments, resuming, and the loss curve.

Resuming is exact: N steps equal N/2 steps, a kill, and the rest, because the trainer's checkpoints hold optimiser,
schedule, random states and data position, and a checkpoint that a kill cut short is never used.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field, model_validator

from alignment.added_tokens import complete_wrappers
from alignment.fingerprint import layout
from alignment.models import Config, resolve_dtype
from alignment.progress import Log, last_complete_checkpoint, trainer_callback

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer, TrainingArguments

A = TypeVar("A", bound="TrainingArguments")


class OptimSettings(Config):
    """One pass of gradient descent: how long, how fast, in what batches."""

    epochs: float = Field(1.0, gt=0, description="Passes over the training rows")
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate of AdamW")
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "cosine", description="Shape of the learning rate after warm-up; constant has none, and warmup_ratio is then to be 0"
    )
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="Share of the steps in which the learning rate rises from 0")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm")
    batch_size: int = Field(8, ge=1, description="Rows per optimiser step")
    micro_batch_size: int = Field(
        8, ge=1, **layout("Rows in memory at once; batch_size / micro_batch_size steps are accumulated")
    )
    gradient_checkpointing: bool = Field(
        False, **layout("Recompute activations in the backward pass: less memory, about 20-30 % slower")
    )
    save_every: int = Field(20, ge=1, **layout("Optimiser steps between checkpoints that a killed run resumes from"))
    log_every: int = Field(1, ge=1, **layout("Optimiser steps between points of the loss curve"))
    seed: int = Field(0, ge=0, description="Seed of the data order, dropout and fresh weights")

    @model_validator(mode="after")
    def _settings_that_fit_together(self) -> OptimSettings:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of micro_batch_size {self.micro_batch_size}")
        if self.save_every % self.log_every:
            raise ValueError(f"save_every {self.save_every} must be a multiple of log_every {self.log_every}")
        if self.scheduler == "constant" and self.warmup_ratio:
            raise ValueError(
                f"scheduler constant has no warm-up, and warmup_ratio is {self.warmup_ratio}; "
                "choose constant_with_warmup, or set warmup_ratio to 0"
            )
        return self


@dataclass(frozen=True)
class Trained:
    """What training leaves besides the model: the curve by metric name as (step, value), and its summary."""

    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    steps: int = 0

    def mean(self, name: str) -> float:
        """Mean of a metric over all steps, those before a resume included; NaN if it was never logged."""
        points = self.curves.get(name, [])
        return sum(v for _, v in points) / len(points) if points else float("nan")

    def first(self, name: str) -> float:
        """The metric's first logged value; NaN if it was never logged."""
        return self.curves[name][0][1] if self.curves.get(name) else float("nan")

    def last(self, name: str) -> float:
        """The metric's last logged value; NaN if it was never logged."""
        return self.curves[name][-1][1] if self.curves.get(name) else float("nan")


def trainer_arguments(kind: type[A], optim: OptimSettings, *, work: Path, dtype: Any, **own: Any) -> A:
    """TRL's config class `kind`, filled with what all trainers have in common and with a trainer's `own` settings."""
    import torch

    resolved = resolve_dtype(dtype)
    common = {
        "output_dir": str(work / "trainer"),
        "num_train_epochs": optim.epochs,
        "learning_rate": optim.learning_rate,
        "lr_scheduler_type": optim.scheduler,
        "warmup_steps": optim.warmup_ratio,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm,
        "per_device_train_batch_size": optim.micro_batch_size,
        "per_device_eval_batch_size": optim.micro_batch_size,
        "gradient_accumulation_steps": optim.batch_size // optim.micro_batch_size,
        "gradient_checkpointing": optim.gradient_checkpointing,
        "save_strategy": "steps",
        "save_steps": optim.save_every,
        "save_total_limit": 2,
        "logging_steps": optim.log_every,
        "logging_nan_inf_filter": False,
        "seed": optim.seed,
        "data_seed": optim.seed,
        "bf16": resolved == torch.bfloat16,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
    }
    arguments = kind(**common | own)
    # A process trains on one device. transformers would take all GPUs that it sees, by DataParallel, which TRL refuses.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def length_grouped(lengths: Sequence[int], batch_size: int, seed: int) -> Any:
    """A sampler that batches rows of similar length, in an order that epoch and seed alone decide.

    transformers' own takes its order from the global random state, which a resumed run restores too late: from the second
    epoch on it would see other batches.
    """
    import torch
    from transformers.trainer_pt_utils import LengthGroupedSampler

    class PerEpoch(LengthGroupedSampler):
        def set_epoch(self, epoch: int) -> None:
            self.generator.manual_seed(seed + 1_000_003 * epoch)

    sampler = PerEpoch(batch_size, lengths=list(lengths), generator=torch.Generator())
    sampler.set_epoch(0)
    return sampler


def run_trainer(trainer: Trainer, work: Path, log: Log, what: str) -> Trained:
    """Train to the end, from the last complete checkpoint in `work` if there is one."""
    from peft.helpers import disable_input_dtype_casting
    from transformers import PrinterCallback

    complete_wrappers(trainer.model)
    _undo_rounding(trainer.model)
    _end_at_the_last_step(trainer)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(trainer_callback(log, what))
    resume = last_complete_checkpoint(work / "trainer")
    _drop_incomplete(work / "trainer", keep=resume)
    with disable_input_dtype_casting(trainer.model, active=trainer.args.bf16):
        # Under autocast PEFT's own cast of every input to float32 is undone at once, and costs a tenth of the step.
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in trainer.state.log_history:
        for name, value in _numbers(entry).items():
            curves.setdefault(name, []).append((entry["step"], value))
    return Trained(curves, trainer.state.global_step)


def free_memory() -> None:
    """Give back what nobody refers to any more: a trainer and its model refer to each other, which only a collection ends."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _undo_rounding(model: PreTrainedModel) -> None:
    # Over a quantised base TRL turns all that is trained into bfloat16. There a step below 1/512 of a weight rounds to nothing:
    # all of them, at the learning rates of DPO. Autocast computes in 16 bit without that.
    for parameter in model.parameters():
        if parameter.requires_grad and hasattr(model, "peft_config"):
            parameter.data = parameter.data.float()


def _end_at_the_last_step(trainer: Trainer) -> None:
    # transformers looks whether it was the last step only after one: resumed from a checkpoint of the last step, within an epoch
    # (`epochs` 1.5), it would make one more.
    run_epoch = trainer._run_epoch

    def run_what_is_left(*args: Any, **kwargs: Any) -> None:
        if trainer.state.global_step < trainer.state.max_steps:
            run_epoch(*args, **kwargs)

    trainer._run_epoch = run_what_is_left


def _drop_incomplete(folder: Path, keep: Path | None) -> None:
    for path in folder.glob("checkpoint-*"):
        if keep is None or int(path.name.split("-")[1]) > int(keep.name.split("-")[1]):
            shutil.rmtree(path)


def _numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    return {
        k: float(v)
        for k, v in entry.items()
        if isinstance(v, int | float) and k not in {"step", "epoch"} and not k.startswith("train_") and k != "total_flos"
    }
