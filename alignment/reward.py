"""Reward models, stage 2 of the user's document: a scalar score for (prompt, response).

Bradley-Terry pairwise loss (arXiv 2203.02155, equation 1) with optional margin m (arXiv 2307.09288, equation 2, where it
depends on the pair; here it is one constant) and optional centering (arXiv 2312.09244):

    loss = -log sigmoid(r_chosen - r_rejected - m) + c * (r_chosen + r_rejected)^2

Pairs may carry a weight w and a soft label p, the probability that `chosen` is better (AI feedback, arXiv 2212.08073, section
4.1). With d = r_chosen - r_rejected their loss is the cross-entropy, and p = 1, w = 1 is the loss above:

    loss = w * (-p log sigmoid(d) - (1 - p) log sigmoid(-d)) + c * (r_chosen + r_rejected)^2

TRL's RewardTrainer does the work on rows tokenised by `alignment.chat`. The score head is saved with the adapter, and a
freshly loaded model is compared with the trained one before anything is published: a reward head lost on save would
otherwise go unnoticed. `calibration.json` beside the weights maps rewards to helpfulness from 1 to 10
(`alignment.calibration`, `alignment.scorer`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from alignment.calibration import Calibration, fit, write_calibration
from alignment.chat import conversation_ids
from alignment.context_length import check_length, position_limit
from alignment.cpu import speed_up
from alignment.fingerprint import layout
from alignment.models import (
    Config,
    LoadSettings,
    LoraSettings,
    LoraWithoutDropout,
    ModelFiles,
    load_reward_model,
    load_tokenizer,
    lora_config,
    resolve_dtype,
    save_model,
    without_cache,
)
from alignment.prefixes import Prefixes
from alignment.progress import SILENT, Log, Progress
from alignment.records import PreferencePair, WeightedPair
from alignment.sft import NothingToTrain
from alignment.statistics import Interval, paired_bootstrap, wilson
from alignment.training import OptimSettings, Trained, free_memory, length_grouped, run_trainer, trainer_arguments

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CODE_VERSION = "3"
# Largest change of a score by saving and loading, over 1 + the largest score: far above rounding, far below another head.
RELOAD_TOLERANCE = 0.02
_BATCHES_READ_TOGETHER = 8  # within so many batches, what texts begin with in common is read once
SOFT = ("label", "weight")  # columns of the training rows where any pair has a soft label or a weight


class RewardConfig(Config):
    """Settings of a reward model (`reward_model`, `human_reward_model` and `evaluator` alike)."""

    finetuning: Literal["lora", "full"] = Field("lora", description="Train adapters over a frozen base, or all weights")
    lora: LoraWithoutDropout = Field(LoraSettings(dropout=0.0), description="Adapter settings, used when finetuning is lora")
    load: LoadSettings = Field(LoadSettings(), description="How the base is loaded")
    optim: OptimSettings = Field(
        OptimSettings(epochs=1, learning_rate=1e-5, batch_size=8, micro_batch_size=8), description="Training settings"
    )
    max_length: int = Field(512, ge=16, description="Pairs with a longer conversation (tokens) are dropped and counted")
    center_rewards_coefficient: float = Field(
        0.01,
        ge=0,
        description="Weight of the mean squared sum of both rewards, which keeps scores around zero; 0 is off",
    )
    margin: float = Field(
        0.0, ge=0, description="The chosen answer's reward is to exceed the rejected one's by this before the loss is content"
    )
    constitutional_share: float = Field(
        1.0, ge=0, le=1, description="Share of the constitutional pairs that join the human ones (reward_model only)"
    )
    score_batch_size: int = Field(32, ge=1, **layout("Conversations scored at once after training"))


class RewardMixConfig(RewardConfig):
    """Settings of `reward_model`, which learns from people, critique-and-revise and AI feedback at once.

    A weight multiplies the loss of each pair of its kind; at 0 the kind takes no part.
    """

    human_weight: float = Field(1.0, ge=0, description="Weight of a human pair in the loss")
    constitutional_weight: float = Field(1.0, ge=0, description="Weight of a constitutional pair in the loss")
    ai_feedback_weight: float = Field(
        0.0, ge=0, description="Weight of an AI comparison (soft label) in the loss; 0: ai_feedback takes no part"
    )
    ai_feedback_share: float = Field(1.0, ge=0, le=1, description="Share of the AI comparisons that join the other pairs")


class EvaluatorConfig(RewardConfig):
    """Settings of `evaluator`, which has a seed of its own: what two heads drawn alike have in common is no second opinion."""

    optim: OptimSettings = Field(
        OptimSettings(epochs=1, learning_rate=1e-5, batch_size=8, micro_batch_size=8, seed=1), description="Training settings"
    )


class HeadLost(RuntimeError):
    """The saved reward model, loaded anew, does not give the scores it gave before it was saved."""


def train_reward_model(
    config: RewardConfig,
    base: ModelFiles,
    train: Sequence[PreferencePair],
    heldout: Sequence[PreferencePair],
    *,
    work: Path,
    out: Path,
    log: Log = SILENT,
) -> tuple[Trained, dict[str, float], list[dict]]:
    """Train a scorer on `train`; the model goes to `out/model`. Returns curves, final metrics, and a table of held-out pairs.

    Metrics: heldout/accuracy with its 95 % Wilson interval, the length-only baselines beside it, and
    heldout/gain_over_length (accuracy minus the better baseline, both measured on the same pairs) with a 95 %
    paired-bootstrap interval, and heldout/helpfulness_* on the scale from 1 to 10.
    """
    from datasets import Dataset
    from trl import RewardConfig as TrlConfig
    from trl import RewardTrainer

    if not train:
        raise NothingToTrain("there are no training pairs. Remedy: add some, or give those that there are a weight and a share.")
    speed_up()
    tokenizer = load_tokenizer(base.base, config.load.trust_remote_code)
    fitting = [(pair, row) for pair in train if (row := _tokenise(tokenizer, pair, config.max_length)) is not None]
    rows = [row for _, row in fitting]
    if not rows:
        raise NothingToTrain(
            f"none of {len(train)} training pairs fits max_length {config.max_length} tokens. "
            "Remedy: raise max_length, or give shorter pairs."
        )
    load = config.load
    if config.finetuning == "full":
        load = load.model_copy(update={"dtype": "float32"})
    model = load_reward_model(base, load, tokenizer=tokenizer, trainable=config.finetuning == "full", seed=config.optim.seed)
    check_length(model, config.max_length, "max_length", "lower it")
    limit = position_limit(model)
    readable = [pair for pair in heldout if _tokenise(tokenizer, pair, limit) is not None]
    lengths = [max(map(len, row.values())) for row in rows]
    columns = _loss_columns([pair for pair, _ in fitting], config.margin)

    class LengthGroupedRewardTrainer(RewardTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return length_grouped(lengths, config.optim.batch_size, config.optim.seed)

        def _set_signature_columns_if_needed(self):
            super()._set_signature_columns_if_needed()
            self._signature_columns = list(dict.fromkeys([*self._signature_columns, *SOFT]))

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels, weights = (inputs.pop(name, None) for name in SOFT)
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            if labels is not None:
                chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
                loss = pairwise_loss(chosen, rejected, labels, weights, config.margin, config.center_rewards_coefficient)
            return (loss, outputs) if return_outputs else loss

    trainer = LengthGroupedRewardTrainer(
        model=model,
        args=trainer_arguments(
            TrlConfig,
            config.optim,
            work=work,
            dtype=config.load.dtype,
            max_length=config.max_length,
            center_rewards_coefficient=config.center_rewards_coefficient or None,
        ),
        train_dataset=Dataset.from_list([row | column for row, column in zip(rows, columns, strict=True)]),
        peft_config=lora_config(config.lora, model, "SEQ_CLS") if config.finetuning == "lora" else None,
        processing_class=tokenizer,
    )
    trainer.data_collator = _with_loss_columns(trainer.data_collator)
    trained = run_trainer(trainer, work, log, "reward model")
    # accelerate wraps the model's forward in autocast for training; later stages score without it, so it comes off here.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    save_model(model, tokenizer, out / "model", resolve_dtype(config.load.dtype))
    probe = (readable or train)[:4]
    expected = score_pairs(model, tokenizer, probe, config.score_batch_size)
    # From here on the model is the one that later stages will load. The one in memory, with all that training needed, makes room.
    del trainer, model
    free_memory()
    model, gap = _reload(config, base, out, tokenizer, probe, expected)
    chosen, rejected = score_pairs(model, tokenizer, readable, config.score_batch_size, log)
    calibration = _calibrate(config, model, tokenizer, train, chosen, rejected, log)
    write_calibration(calibration, out / "model")
    metrics = {
        "train/loss": trained.mean("loss"),
        "train/accuracy_last": trained.last("accuracy"),
        "train/pairs": len(rows),
        "train/pairs_dropped_too_long": len(train) - len(rows),
        "train/pairs_soft": sum(isinstance(pair, WeightedPair) and pair.label < 1 for pair, _ in fitting),
        "reload/score_gap": gap,
        "calibration/location": calibration.location,
        "calibration/scale": calibration.scale,
        "heldout/pairs_dropped_too_long": len(heldout) - len(readable),
        **accuracy_metrics(readable, chosen, rejected),
    }
    rated = [[calibration.helpfulness(reward) for reward in rewards] for rewards in (chosen, rejected)]
    if readable:
        metrics["heldout/helpfulness_chosen"], metrics["heldout/helpfulness_rejected"] = (sum(r) / len(r) for r in rated)
    table = [
        {
            "prompt": p.prompt,
            "chosen": p.chosen,
            "rejected": p.rejected,
            "reward_chosen": c,
            "reward_rejected": r,
            "helpfulness_chosen": hc,
            "helpfulness_rejected": hr,
        }
        for p, c, r, hc, hr in zip(readable, chosen, rejected, *rated, strict=True)
    ]
    return trained, {k: v for k, v in metrics.items() if math.isfinite(v)}, table


def pairwise_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    margin: float = 0.0,
    centering: float = 0.0,
) -> torch.Tensor:
    """The mean loss of pairs with soft labels: a scalar.

    Args:
        chosen, rejected: (B,) rewards.
        labels: (B,) probabilities that `chosen` is better.
        weights: (B,) each pair's weight. They are not normalised, so that the size of a micro-batch changes nothing.
        margin: taken off the difference of rewards where the label is 1; a pair that may be the other way round has none.
        centering: weight of the mean squared sum of both rewards, which pairs share alike.
    """
    from torch.nn.functional import logsigmoid

    difference = chosen - rejected - margin * (labels == 1)
    loss = (-weights * (labels * logsigmoid(difference) + (1 - labels) * logsigmoid(-difference))).mean()
    return loss + centering * ((chosen + rejected) ** 2).mean() if centering else loss


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[dict[str, str]]],
    batch_size: int,
    log: Log = SILENT,
    what: str = "scoring",
) -> list[float]:
    """The scalar reward of each finished conversation (it ends with an assistant turn), in order."""
    import torch

    ids = [conversation_ids(tokenizer, messages) for messages in conversations]
    check_length(model, max(map(len, ids), default=0), "a conversation to score", "leave it out, or shorten it")
    alike = sorted(range(len(ids)), key=ids.__getitem__)  # answers to one prompt side by side
    scores: dict[int, float] = {}
    progress = Progress(log, what, len(ids))
    model.eval()
    pad = tokenizer.pad_token_id
    for first in range(0, len(alike), _BATCHES_READ_TOGETHER * batch_size):
        near = alike[first : first + _BATCHES_READ_TOGETHER * batch_size]
        with torch.inference_mode():
            read = Prefixes(model)
            if batch_size > 1:  # one at a time, a score depends on no other row, to the last bit
                read = read.with_beginnings_of([ids[i] for i in near], pad, batch_size)
            order = sorted(near, key=lambda i: len(ids[i]) - read.length_of(ids[i]))
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                batch = read.open([ids[i] for i in rows], pad, room=None, left=False, least=1)
                logits = model(**without_cache(model) | batch.inputs()).logits
                scores |= dict(zip(rows, logits.float().squeeze(-1).tolist(), strict=True))
                progress.advance(len(rows))
    return [scores[i] for i in range(len(ids))]


def score_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    batch_size: int,
    log: Log = SILENT,
) -> tuple[list[float], list[float]]:
    """Rewards of the chosen and of the rejected answers, in the order of the pairs."""
    conversations = [[*p.prompt_messages, {"role": "assistant", "content": p.chosen}] for p in pairs]
    conversations += [[*p.prompt_messages, {"role": "assistant", "content": p.rejected}] for p in pairs]
    scores = score(model, tokenizer, conversations, batch_size, log)
    return scores[: len(pairs)], scores[len(pairs) :]


def accuracy_metrics(pairs: Sequence[PreferencePair], chosen: Sequence[float], rejected: Sequence[float]) -> dict[str, float]:
    """Pairwise accuracy beside what a judge would reach that looks at the answers' length alone.

    Ties count as half. `gain_over_length` is measured against whichever baseline, longer or shorter wins, is better on
    these very pairs, which favours the baseline.
    """
    if not pairs:
        return {}
    right = [_win(c, r) for c, r in zip(chosen, rejected, strict=True)]
    longer = [_win(len(p.chosen), len(p.rejected)) for p in pairs]
    baseline = longer if sum(longer) * 2 >= len(longer) else [1 - x for x in longer]
    accuracy: Interval = wilson(sum(right), len(right))
    gain = paired_bootstrap(right, baseline)
    return {
        "heldout/pairs": len(pairs),
        "heldout/accuracy": accuracy.value,
        "heldout/accuracy_low": accuracy.low,
        "heldout/accuracy_high": accuracy.high,
        "heldout/accuracy_longer_wins": sum(longer) / len(longer),
        "heldout/accuracy_shorter_wins": 1 - sum(longer) / len(longer),
        "heldout/gain_over_length": gain.value,
        "heldout/gain_over_length_low": gain.low,
        "heldout/gain_over_length_high": gain.high,
        "heldout/margin": sum(c - r for c, r in zip(chosen, rejected, strict=True)) / len(pairs),
    }


def reward_training_pairs(
    human: Sequence[PreferencePair],
    constitutional: Sequence[PreferencePair],
    config: RewardMixConfig,
    feedback: Sequence[WeightedPair] = (),
) -> list[PreferencePair]:
    """Human pairs, and the configured shares of the constitutional ones and of AI feedback, in a seeded order.

    Where every weight is 1 and AI feedback takes no part, pairs come back as they are; else with their weight.

    Raises:
        NothingToTrain: constitutional pairs are to take part, and there are none.
    """
    if not constitutional and config.constitutional_share and config.constitutional_weight:
        raise NothingToTrain(
            "there are no constitutional pairs. Remedy: look at the filter counts of the pairs asset, "
            "or set constitutional_weight: 0."
        )
    rng = random.Random(config.optim.seed)
    chosen = rng.sample(list(constitutional), round(len(constitutional) * config.constitutional_share))
    compared = rng.sample(list(feedback), round(len(feedback) * config.ai_feedback_share)) if config.ai_feedback_weight else []
    pairs = [
        *_weighted(human, config.human_weight),
        *_weighted(chosen, config.constitutional_weight),
        *_weighted(compared, config.ai_feedback_weight),
    ]
    rng.shuffle(pairs)
    return pairs


def _weighted(pairs: Sequence[PreferencePair], weight: float) -> list[PreferencePair]:
    if weight == 1:
        return list(pairs)
    return [WeightedPair(**{**p.model_dump(), "weight": weight}) for p in pairs] if weight else []


def _win(a: float, b: float) -> float:
    return 1.0 if a > b else 0.5 if a == b else 0.0


def _tokenise(tokenizer, pair: PreferencePair, max_length: float) -> dict[str, list[int]] | None:
    row = {
        f"{name}_ids": conversation_ids(tokenizer, [*pair.prompt_messages, {"role": "assistant", "content": answer}])
        for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected))
    }
    return row if max(map(len, row.values())) <= max_length else None


def _loss_columns(pairs: Sequence[PreferencePair], margin: float) -> list[dict[str, float]]:
    # Without soft labels and weights the loss is TRL's own, margin included.
    if any(isinstance(p, WeightedPair) for p in pairs):
        return [{name: getattr(p, name, 1.0) for name in SOFT} for p in pairs]
    return [{"margin": margin} if margin else {} for _ in pairs]


def _with_loss_columns(collate: Callable[[list[dict]], dict]) -> Callable[[list[dict]], dict]:
    import torch

    def collate_all(rows: list[Mapping]) -> dict:
        return collate(rows) | {name: torch.tensor([row[name] for row in rows]) for name in SOFT if name in rows[0]}

    return collate_all


def _calibrate(config, model, tokenizer, train, chosen, rejected, log) -> Calibration:
    fitted_on = "heldout" if chosen else "train"
    if not chosen:
        chosen, rejected = score_pairs(model, tokenizer, train, config.score_batch_size, log)
    location, scale = fit(chosen, rejected)
    return Calibration(
        location=location,
        scale=scale,
        pairs=len(chosen),
        fitted_on=fitted_on,
        dtype=str(resolve_dtype(config.load.dtype)).removeprefix("torch."),
        quantization=config.load.quantization,
    )


def _reload(config, base, out, tokenizer, pairs, expected) -> tuple[PreTrainedModel, float]:
    """The saved model, loaded anew, and the largest change of a score, over 1 + the largest score.

    Args:
        expected: what `score_pairs` gave for the trained model.

    Raises:
        HeadLost: the change is more than rounding.
    """
    # The same pairs in the same batch, so that nothing but the loading can differ; a head that is not in the files is drawn
    # from another seed than the trained one was.
    files = ModelFiles(base.base, out / "model") if config.finetuning == "lora" else ModelFiles(out / "model")
    fresh = load_reward_model(files, config.load, tokenizer=tokenizer, seed=config.optim.seed + 1)
    again = score_pairs(fresh, tokenizer, pairs, config.score_batch_size)
    before, after = ([*chosen, *rejected] for chosen, rejected in (expected, again))
    gap = max(abs(a - b) for a, b in zip(after, before, strict=True))
    relative = gap / (1 + max(abs(b) for b in before))
    if not relative <= RELOAD_TOLERANCE:
        raise HeadLost(
            f"scores changed by up to {gap:.3f} when the saved reward model was loaded again, so its score head was not saved. "
            "Remedy: use the pinned versions of peft and transformers, and report it."
        )
    return fresh, relative
