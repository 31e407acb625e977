"""Direct Preference Optimization (arXiv 2305.18290, equation 7), by TRL's DPOTrainer.

    loss = -log sigmoid(beta * (log pi(chosen)/ref(chosen) - log pi(rejected)/ref(rejected)))

The policy starts at, and is measured against, the SFT checkpoint, with one base in memory where adapters are trained:

- SFT checkpoint is an adapter: it is trained on, and TRL copies it as adapter `ref`;
- SFT checkpoint is a full model: a new adapter is trained over it (`lora`), the reference is the model without it;
- `finetuning: full`: all weights are trained, TRL keeps a second, frozen copy as the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from alignment.context_length import check_length
from alignment.cpu import speed_up
from alignment.methods.pairs import PairsConfig, tokenised_pairs, with_room_for_an_answer
from alignment.models import ModelFiles, load_for_training, load_tokenizer, resolve_dtype, save_model
from alignment.progress import SILENT, Log
from alignment.records import PreferencePair
from alignment.training import Trained, length_grouped, run_trainer, trainer_arguments

CODE_VERSION = "2"


class DpoConfig(PairsConfig):
    """Settings of DPO."""

    loss_type: Literal["sigmoid", "hinge", "ipo", "robust", "exo_pair", "apo_zero", "sigmoid_norm"] = Field(
        "sigmoid", description="TRL's loss; sigmoid is the paper's"
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="Assumed share of flipped labels, in the losses robust and exo_pair; others have no place for it",
    )
    sft_weight: float = Field(
        0.0, ge=0, description="Weight of the chosen answer's cross-entropy, added to the loss (RPO, arXiv 2404.19733)"
    )

    @model_validator(mode="after")
    def _smoothing_where_it_is_read(self) -> DpoConfig:
        if self.label_smoothing and self.loss_type not in {"robust", "exo_pair"}:
            raise ValueError(
                f"label_smoothing is ignored by loss_type {self.loss_type}; choose robust or exo_pair, or set it to 0"
            )
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ValueError("loss_type exo_pair needs a label_smoothing above 0")
        return self


def train_dpo(
    config: DpoConfig,
    sft: ModelFiles,
    pairs: Sequence[PreferencePair],
    *,
    work: Path,
    out: Path,
    log: Log = SILENT,
) -> tuple[Trained, dict[str, float]]:
    """Train the SFT checkpoint on preference pairs; the policy goes to `out/model`. Returns curves and final metrics.

    The final metrics say what the alarms need: the margin's growth and whether the chosen answers became less likely.
    """
    from datasets import Dataset
    from trl import DPOConfig as TrlConfig
    from trl import DPOTrainer

    speed_up()
    tokenizer = load_tokenizer(sft.base, config.load.trust_remote_code)
    rows = with_room_for_an_answer(tokenised_pairs(tokenizer, pairs), config.max_length)
    lengths = [len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows]
    model, adapter = load_for_training(sft, finetuning=config.finetuning, lora=config.lora, load=config.load)
    check_length(model, config.max_length, "max_length", "lower it")
    losses = {config.loss_type: 1.0} | ({"sft": config.sft_weight} if config.sft_weight else {})

    class TokenisedDpoTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def _get_train_sampler(self, train_dataset=None):
            return length_grouped(lengths, config.optim.batch_size, config.optim.seed)

    trainer = TokenisedDpoTrainer(
        model=model,
        peft_config=adapter,
        args=trainer_arguments(
            TrlConfig,
            config.optim,
            work=work,
            dtype=config.load.dtype,
            max_length=config.max_length,
            beta=config.beta,
            loss_type=list(losses),
            loss_weights=list(losses.values()),
            label_smoothing=config.label_smoothing,
            precompute_ref_log_probs=True,  # it never changes: once over the data instead of once an epoch
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trained = run_trainer(trainer, work, log, "DPO")
    save_model(trainer.model, tokenizer, out / "model", resolve_dtype(config.load.dtype))
    metrics = {
        "train/loss": trained.mean("loss"),
        "train/loss_last": trained.last("loss"),
        "train/pairs": len(rows),
        "train/pairs_dropped_too_long": len(pairs) - len(rows),
        "train/rewards_accuracy_last": trained.last("rewards/accuracies"),
        "train/rewards_margin_last": trained.last("rewards/margins"),
        "train/chosen_reward_last": trained.last("rewards/chosen"),
    }
    return trained, {k: v for k, v in metrics.items() if math.isfinite(v)}
