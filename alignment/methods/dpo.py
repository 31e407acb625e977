"""Direct Preference Optimization (arXiv 2305.18290, equation 7), by TRL's DPOTrainer.

    loss = -log sigmoid(beta * (log pi(chosen)/ref(chosen) - log pi(rejected)/ref(rejected)))

The policy starts at, and is measured against, the SFT checkpoint, with one base in memory where adapters are trained:

- SFT checkpoint is an adapter: it is trained on, and TRL copies it as adapter `ref`;
- SFT checkpoint is a full model: a new adapter is trained over it (`lora`), the reference is the model without it;
- `finetuning: full`: all weights are trained, TRL keeps a second, frozen copy as the reference.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from alignment.chat import answer_ids
from alignment.context_length import check_length
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
from alignment.training import OptimSettings, Trained, length_grouped, run_trainer, trainer_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    human_pairs: int = Field(
        0,
        ge=0,
        description="Human comparisons that join the constitutional pairs: a seeded sample of those the reward model learns "
        "from, worked critiques left out. They keep the policy helpful where nothing is harmful",
    )
    finetuning: Literal["lora", "full"] = Field("lora", description="Train an adapter, or all weights of a full SFT model")
    lora: LoraSettings = Field(
        LoraSettings(r=64, alpha=16, dropout=0.0, target_modules=["attention"]),
        description="The new adapter, where the SFT checkpoint is a full model; an SFT adapter keeps its own shape",
    )
    load: LoadSettings = Field(LoadSettings(), description="How base and SFT adapter are loaded")
    optim: OptimSettings = Field(
        OptimSettings(epochs=1, learning_rate=5e-7, batch_size=16, micro_batch_size=2), description="Training settings"
    )
    max_length: int = Field(512, ge=16, description="Prompt and answer are cut after this many tokens")


def dpo_training_pairs(
    constitutional: Sequence[PreferencePair], human: Sequence[PreferencePair], config: DpoConfig
) -> list[PreferencePair]:
    """Constitutional pairs and `human_pairs` of the human ones, in a seeded order.

    The mixture is the paper's: its preference model learns harmlessness from the constitution and helpfulness from people.
    """
    rng = random.Random(config.optim.seed)
    pool = [pair for pair in human if pair.source == "human"]
    pairs = [*constitutional, *rng.sample(pool, min(config.human_pairs, len(pool)))]
    rng.shuffle(pairs)
    return pairs


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
    check_length(model, config.max_length, "max_length", "lower it")
    rows = [_tokenise(tokenizer, pair) for pair in pairs]
    lengths = [len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows]

    class TokenisedDpoTrainer(DPOTrainer):
        # TRL's own rendering also scores and trains what a template writes after EOS.
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def _get_train_sampler(self, train_dataset=None):
            return length_grouped(lengths, config.optim.batch_size, config.optim.seed)

    trainer = TokenisedDpoTrainer(
        model=model,
        peft_config=lora_config(config.lora, model, "CAUSAL_LM") if not full and sft.adapter is None else None,
        args=TrlConfig(
            **arguments,
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
        "train/pairs": len(pairs),
        "train/rewards_accuracy_last": trained.last("rewards/accuracies"),
        "train/rewards_margin_last": trained.last("rewards/margins"),
        "train/chosen_reward_last": trained.last("rewards/chosen"),
    }
    return trained, {k: v for k, v in metrics.items() if math.isfinite(v)}


def _tokenise(tokenizer: PreTrainedTokenizerBase, pair: PreferencePair) -> dict[str, list[int]]:
    prompt, chosen = answer_ids(tokenizer, pair.prompt_messages, pair.chosen)
    _, rejected = answer_ids(tokenizer, pair.prompt_messages, pair.rejected)
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
