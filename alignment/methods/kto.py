"""Kahneman-Tversky Optimization (arXiv 2402.01306, equation 8), by TRL's KTOTrainer.

    loss = mean of  desirable_weight   * (1 - sigmoid(beta * (r - z0)))  over desirable answers,
                    undesirable_weight * (1 - sigmoid(beta * (z0 - r)))  over undesirable ones
    r  = log pi(y|x) / ref(y|x)
    z0 = max(0, mean of log pi(y'|x) / ref(y'|x)),  y' the answer to another prompt of the batch, no gradient

Answers are judged one by one: each pair gives a desirable and an undesirable one. Policy and reference start as in
`dpo`. As in TRL, every epoch sees the same batches, since the mismatched answers y' are those of the batch.

Deviation: z0 is taken over the whole batch of an optimiser step, as in the paper, where TRL takes it over the part of it
that is in memory at once; the layout of a batch does not change the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, model_validator

from alignment.context_length import check_length
from alignment.cpu import speed_up
from alignment.methods.pairs import PairsConfig, tokenised_pairs, with_room_for_an_answer
from alignment.models import ModelFiles, load_for_training, load_tokenizer, resolve_dtype, save_model
from alignment.progress import SILENT, Log
from alignment.records import PreferencePair
from alignment.training import Trained, length_grouped, run_trainer, trainer_arguments

CODE_VERSION = "2"


class KtoConfig(PairsConfig):
    """Settings of KTO."""

    desirable_weight: float = Field(1.0, ge=0, description="Weight of desirable answers (the paper's lambda_D)")
    undesirable_weight: float = Field(1.0, ge=0, description="Weight of undesirable answers (the paper's lambda_U)")

    @model_validator(mode="after")
    def _more_than_one_answer_at_once(self) -> KtoConfig:
        if self.optim.micro_batch_size < 2:
            raise ValueError("optim.micro_batch_size must be at least 2: TRL refuses KTO with one answer in memory")
        return self


def train_kto(
    config: KtoConfig,
    sft: ModelFiles,
    pairs: Sequence[PreferencePair],
    *,
    work: Path,
    out: Path,
    log: Log = SILENT,
) -> tuple[Trained, dict[str, float]]:
    """Train the SFT checkpoint on both answers of every pair; the policy goes to `out/model`. Returns curves and metrics."""
    from datasets import Dataset
    from trl import KTOConfig as TrlConfig
    from trl import KTOTrainer

    speed_up()
    tokenizer = load_tokenizer(sft.base, config.load.trust_remote_code)
    kept = with_room_for_an_answer(tokenised_pairs(tokenizer, pairs), config.max_length)
    rows = judged_answers(kept, config.optim.batch_size, config.optim.seed)
    model, adapter = load_for_training(sft, finetuning=config.finetuning, lora=config.lora, load=config.load)
    check_length(model, config.max_length, "max_length", "lower it")

    class WholeBatchKtoTrainer(KTOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def get_batch_samples(self, epoch_iterator, num_batches, device):
            # Once per optimiser step: all of its micro-batches, before the first of them is trained on.
            samples, count = super().get_batch_samples(epoch_iterator, num_batches, device)
            log_ratios = []
            for batch in map(self._prepare_inputs, samples):
                log_ratios += (super()._compute_kl_logps(self.model, batch) - batch["ref_KL_logps"]).tolist()
            self.z0 = sum(log_ratios) / max(len(log_ratios), 1)
            return samples, count

        def _compute_kl_logps(self, model, batch):
            return batch["ref_KL_logps"] + self.z0  # TRL subtracts the reference, takes the mean, and cuts it off at 0

    trainer = WholeBatchKtoTrainer(
        model=model,
        peft_config=adapter,
        args=trainer_arguments(
            TrlConfig,
            config.optim,
            work=work,
            dtype=config.load.dtype,
            max_length=config.max_length,
            beta=config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
            precompute_ref_log_probs=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trained = run_trainer(trainer, work, log, "KTO")
    save_model(trainer.model, tokenizer, out / "model", resolve_dtype(config.load.dtype))
    metrics = {
        "train/loss": trained.mean("loss"),
        "train/loss_last": trained.last("loss"),
        "train/pairs": len(kept),
        "train/pairs_dropped_too_long": len(pairs) - len(kept),
        "train/rewards_margin_last": trained.last("rewards/margins"),
        "train/chosen_reward_last": trained.last("rewards/chosen"),
        "train/rejected_reward_last": trained.last("rewards/rejected"),
        "train/kl_last": trained.last("kl"),
        "train/entropy_last": trained.last("entropy"),
    }
    return trained, {k: v for k, v in metrics.items() if math.isfinite(v)}


def judged_answers(pairs: Sequence[dict[str, list[int]]], batch_size: int, seed: int) -> list[dict]:
    """Both answers of every pair with their label, in batches of similar length, each with a mismatched answer (y').

    Within a batch the answers are handed on by the fewest places at which nobody gets an answer to the own prompt.
    """
    rows = [
        {"prompt_ids": pair["prompt_ids"], "completion_ids": pair[f"{side}_ids"], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    lengths = [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows]
    rows = [rows[i] for i in length_grouped(lengths, batch_size, seed)]
    out = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        prompts = [row["prompt_ids"] for row in batch]
        shifts = (n for n in range(1, len(batch)) if all(a != b for a, b in zip(prompts, _shifted(prompts, n), strict=True)))
        mismatched = _shifted([row["completion_ids"] for row in batch], next(shifts, 1))
        out += [{**row, "KL_completion_ids": other} for row, other in zip(batch, mismatched, strict=True)]
    return out


def _shifted(items: list, places: int) -> list:
    return [items[i - places] for i in range(len(items))]
