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

from pydantic import Field

from alignment.chat import plain_text
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
from alignment.records import PreferencePair
from alignment.sft import NothingToTrain
from alignment.training import OptimSettings, Trained, run_trainer, trainer_arguments

CODE_VERSION = "1"


class DpoConfig(Config):
    """Settings of DPO; the defaults are those of the user's document."""

    beta: float = Field(0.1, gt=0, description="KL coefficient: higher stays closer to the SFT checkpoint")
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust", "exo_pair", "apo_zero", "sigmoid_norm"] = Field(
        "sigmoid", description="TRL's loss; sigmoid is the paper's"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Assumed share of flipped labels (cDPO)")
    sft_weight: float = Field(
        0.0, ge=0, description="Weight of the chosen answer's cross-entropy, added to the loss (RPO, arXiv 2404.19733)"
    )
    finetuning: Literal["lora", "full"] = Field("lora", description="Train an adapter, or all weights of a full SFT model")
    lora: LoraSettings = Field(
        LoraSettings(r=64, alpha=16, dropout=0.0, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
        description="The new adapter, where the SFT checkpoint is a full model; an SFT adapter keeps its own shape",
    )
    load: LoadSettings = Field(LoadSettings(), description="How base and SFT adapter are loaded")
    optim: OptimSettings = Field(
        OptimSettings(epochs=1, learning_rate=5e-7, batch_size=16, micro_batch_size=2), description="Training settings"
    )
    max_length: int = Field(512, ge=16, description="Prompt and answer are cut after this many tokens")


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

    if not pairs:
        raise NothingToTrain("there are no preference pairs. Remedy: look at the filter counts of the pairs asset.")
    speed_up()
    tokenizer = load_tokenizer(sft.base, config.load.trust_remote_code)
    load, full = config.load, config.finetuning == "full"
    if full and sft.adapter is not None:
        raise UserError(
            "aligned_policy/dpo.finetuning: full needs an SFT checkpoint that is a full model, and this one is an adapter. "
            "Remedy: set sft_checkpoint.finetuning to full, or this to lora."
        )
    if full:
        load = load.model_copy(update={"dtype": "float32"})  # bf16 weights lose small updates; autocast computes in bf16
    arguments = trainer_arguments(config.optim, work=work, dtype=config.load.dtype, max_length=config.max_length)
    losses = {config.loss_type: 1.0} | ({"sft": config.sft_weight} if config.sft_weight else {})
    model = load_causal_lm(sft, load, trainable=full or sft.adapter is not None)
    trainer = DPOTrainer(
        model=model,
        peft_config=lora_config(config.lora, model, "CAUSAL_LM") if not full and sft.adapter is None else None,
        args=TrlConfig(
            **arguments,
            beta=config.beta,
            loss_type=list(losses),
            loss_weights=list(losses.values()),
            label_smoothing=config.label_smoothing,
        ),
        train_dataset=Dataset.from_list(
            [
                {
                    "prompt": plain_text(tokenizer, p.prompt_messages),
                    "chosen": plain_text(tokenizer, [{"role": "assistant", "content": p.chosen}]),
                    "rejected": plain_text(tokenizer, [{"role": "assistant", "content": p.rejected}]),
                }
                for p in pairs
            ]
        ),
        processing_class=tokenizer,
    )
    trained = run_trainer(trainer, work, log, "DPO")
    save_model(trainer.model, tokenizer, out / "model", resolve_dtype(config.load.dtype))
    metrics = {
        "train/loss": trained.mean("loss"),
        "train/loss_last": trained.last("loss"),
        "train/pairs": len(pairs),
        "train/rewards_accuracy_last": trained.last("rewards/accuracies"),
        "train/rewards_margin_last": trained.last("rewards/margins"),
        "train/chosen_reward_last": trained.last("rewards/chosen"),
    }
    return trained, {k: v for k, v in metrics.items() if math.isfinite(v)}
