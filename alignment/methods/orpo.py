"""Odds Ratio Preference Optimization (arXiv 2403.07691, equations 6 and 7), by TRL's ORPOTrainer.

    loss = NLL(chosen) - beta * log sigmoid(log(odds(chosen) / odds(rejected))),   odds = p / (1 - p)
    NLL(y) = -log p(y|x),   log p(y|x) = mean log-probability of the answer's tokens (equation 2)

A single stage from the base model: no SFT checkpoint, no reference. The chosen answers are all the demonstrations it sees,
which is why all human comparisons join by default.

Deviation from TRL, as in the paper: the NLL is that of the answer's tokens, where TRL takes prompt and template, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from alignment.chat import IGNORE
from alignment.context_length import check_length
from alignment.cpu import speed_up
from alignment.methods.pairs import PairsConfig, tokenised_pairs, with_room_for_an_answer
from alignment.models import (
    LoadSettings,
    LoraSettings,
    LoraWithoutDropout,
    ModelFiles,
    load_for_training,
    load_tokenizer,
    resolve_dtype,
    save_model,
)
from alignment.progress import SILENT, Log, quiet
from alignment.records import PreferencePair
from alignment.training import OptimSettings, Trained, length_grouped, run_trainer, trainer_arguments

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

CODE_VERSION = "2"


class OrpoConfig(PairsConfig):
    """Settings of ORPO."""

    beta: float = Field(0.1, gt=0, description="Weight of the odds ratio beside the chosen answer's NLL (the paper's lambda)")
    human_pairs: int = Field(
        -1,
        ge=-1,
        description="Human comparisons that join the constitutional pairs: a seeded sample of those the reward model learns "
        "from, worked critiques left out; -1 takes all. With the chosen constitutional answers they are all it is fine-tuned on",
    )
    lora: LoraWithoutDropout = Field(LoraSettings(dropout=0.0), description="The new adapter over the base model")
    load: LoadSettings = Field(LoadSettings(), description="How the base is loaded")
    optim: OptimSettings = Field(
        OptimSettings(epochs=1, learning_rate=8e-5, batch_size=8, micro_batch_size=2), description="Training settings"
    )


def train_orpo(
    config: OrpoConfig,
    base: ModelFiles,
    pairs: Sequence[PreferencePair],
    *,
    work: Path,
    out: Path,
    log: Log = SILENT,
) -> tuple[Trained, dict[str, float]]:
    """Train the base model on preference pairs; the policy goes to `out/model`. Returns curves and final metrics."""
    quiet()
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig as TrlConfig
    from trl.experimental.orpo import ORPOTrainer

    speed_up()
    tokenizer = load_tokenizer(base.base, config.load.trust_remote_code)
    kept = with_room_for_an_answer(tokenised_pairs(tokenizer, pairs), config.max_length)
    rows = [_columns("chosen", row, config.max_length) | _columns("rejected", row, config.max_length) for row in kept]
    lengths = [max(len(row["chosen_input_ids"]), len(row["rejected_input_ids"])) for row in rows]
    model, adapter = load_for_training(base, finetuning=config.finetuning, lora=config.lora, load=config.load)
    check_length(model, config.max_length, "max_length", "lower it")
    dtype = model.get_input_embeddings().weight.dtype

    class TokenisedOrpoTrainer(ORPOTrainer):
        def tokenize_row(self, feature, model=None):
            return feature

        def concatenated_forward(self, model, batch):
            chosen, rejected, chosen_logits, rejected_logits, _, *more = super().concatenated_forward(model, batch)
            return chosen, rejected, chosen_logits, rejected_logits, -chosen.mean(), *more

        def _get_train_sampler(self, train_dataset=None):
            return length_grouped(lengths, config.optim.batch_size, config.optim.seed)

    trainer = TokenisedOrpoTrainer(
        model=model,
        peft_config=adapter,
        args=trainer_arguments(
            TrlConfig,
            config.optim,
            work=work,
            dtype=config.load.dtype,
            max_length=config.max_length,
            beta=config.beta,
            remove_unused_columns=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    if config.load.quantization == "nf4":
        _undo_casting(trainer.model, dtype)
    trained = run_trainer(trainer, work, log, "ORPO")
    save_model(trainer.model, tokenizer, out / "model", resolve_dtype(config.load.dtype))
    metrics = {
        "train/loss": trained.mean("loss"),
        "train/loss_last": trained.last("loss"),
        "train/nll_last": trained.last("nll_loss"),
        "train/log_odds_last": trained.last("log_odds_chosen"),
        "train/pairs": len(kept),
        "train/pairs_dropped_too_long": len(pairs) - len(kept),
        "train/rewards_accuracy_last": trained.last("rewards/accuracies"),
        "train/rewards_margin_last": trained.last("rewards/margins"),
        "train/chosen_reward_last": trained.last("rewards/chosen"),
    }
    return trained, {k: v for k, v in metrics.items() if math.isfinite(v)}


def _columns(side: str, row: dict[str, list[int]], max_length: int) -> dict[str, list[int]]:
    """What TRL's collator takes for one side of a pair, cut to `max_length`."""
    ids = (row["prompt_ids"] + row[f"{side}_ids"])[:max_length]
    labels = ([IGNORE] * len(row["prompt_ids"]) + row[f"{side}_ids"])[:max_length]
    return {f"{side}_input_ids": ids, f"{side}_attention_mask": [1] * len(ids), f"{side}_labels": labels}


def _undo_casting(model: PreTrainedModel, dtype: torch.dtype) -> None:
    # TRL casts what of a quantised base is not in 4 bit (embeddings, norms, the vocabulary's head) to float32, and with it all
    # states between the layers. No other method trains so, and no later stage computes so.
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
