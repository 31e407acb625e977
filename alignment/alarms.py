"""Alarms: the failures of alignment that look like success, decided from the numbers that a stage publishes.

`ALARMS` is the table: what is watched, on which assets, from which metrics, and what to do when it fires. An alarm decides
from metrics alone, so that it says the same of an artifact that was reused. A number that is missing fires the alarm: what
was not measured is no evidence that all is well; only an alarm about a measurement that a recipe may leave out (`optional`) is
silent without it. Failures that no metric shows are errors where they arise; docs/alarms.md lists both.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from alignment.models import Config
from alignment.reward import RELOAD_TOLERANCE

Severity = Literal["warn", "error"]
REWARD_MODELS = ("human_reward_model", "reward_model", "evaluator")


class AlarmConfig(Config):
    """Bounds of the alarms (stage `alarms` of a recipe). They decide no content: changing one recomputes nothing."""

    max_dropped_share: float = Field(
        0.5, gt=0, le=1, description="Share of training rows, pairs, prompts or tasks that may be dropped as too long"
    )
    min_eos_probability: float = Field(
        0.02, ge=0, lt=1, description="After SFT and SL-CAI: mean probability of EOS where a held-out demonstration ends"
    )
    min_eos_rate: float = Field(0.5, ge=0, le=1, description="Share of sampled answers that must end by themselves")
    max_chosen_reward_fall: float = Field(
        1.0, ge=0, description="DPO: the chosen answers' implicit reward may fall this far below 0 (beta x nats per answer)"
    )
    max_perplexity_ratio: float = Field(
        1.15, gt=1, description="DPO: perplexity on held-out demonstrations that counts as worse, against the SFT checkpoint's"
    )
    max_ratio_error: float = Field(
        0.01, gt=0, description="PPO: before the first update on a batch, no token's importance ratio may be farther from 1"
    )
    max_kl_per_answer: float = Field(30.0, gt=0, description="PPO: KL from the reference, in nats per answer")
    min_entropy: float = Field(0.01, ge=0, description="PPO, GRPO, RLOO: the policy's entropy in nats per token")
    max_kl_per_token: float = Field(2.0, gt=0, description="GRPO, RLOO: KL from the reference, in nats per token")
    max_zero_variance_groups: float = Field(
        0.8, gt=0, le=1, description="GRPO, RLOO: share of groups whose answers all have one reward; they teach nothing"
    )
    max_clipped_completions: float = Field(0.8, gt=0, le=1, description="GRPO, RLOO: share of completions cut at the token limit")
    max_length_share: float = Field(
        0.95, gt=0, le=1, description="GRPO, RLOO: mean completion length, as a share of the token limit"
    )
    min_reward_model_gain: float = Field(
        0.1, ge=0, description="Gain by the reward model that counts as risen (reward hacking: the evaluator sees none)"
    )
    max_length_ratio: float = Field(
        1.5, gt=1, description="A gain that comes with answers longer by this factor may be length alone"
    )
    max_share_no_violations: float = Field(
        0.9, gt=0, le=1, description="Share of critiques that may find nothing before the critic counts as blind"
    )
    min_share_compared: float = Field(
        0.5,
        ge=0,
        le=1,
        description="AI feedback: share of the prompts that must end in a comparison the judge could decide",
    )
    max_order_flips: float = Field(
        0.5, ge=0, le=1, description="AI feedback: share of comparisons that the order of the options may decide"
    )


@dataclass(frozen=True)
class Alarm:
    """What an alarm says of one artifact. `severity` error: going on is pointless; `reason`: the numbers and the remedy."""

    name: str
    severity: Severity
    fired: bool
    reason: str


Decide = Callable[..., tuple[bool, str]]


@dataclass(frozen=True)
class Watch:
    """One entry of the table.

    Attributes:
        name: the asset check's name.
        failure: the failure's number in docs/alarms.md.
        stages: assets it is attached to, by whole key or by the key's first part.
        severity: warn, or error where going on is pointless.
        needs: metrics it decides from.
        description: what holds while it is silent.
        remedy: what to do when it fires.
        decide: bounds, the needed metrics, in their order, and the settings -> (fired, the numbers).
        optional: silent, too, where the metrics do not exist.
        across: compares several assets, in a check of its own.
    """

    name: str
    failure: int
    stages: tuple[str, ...]
    severity: Severity
    needs: tuple[str, ...]
    description: str
    remedy: str
    decide: Decide
    optional: bool
    across: bool
    settings: tuple[str, ...]


ALARMS: dict[str, Watch] = {}


def watches(asset: str) -> list[Watch]:
    """The alarms attached to an asset (`aligned_policy/dpo`), in the order of the table."""
    return [w for w in ALARMS.values() if {asset, asset.split("/")[0]} & set(w.stages) and not w.across]


def sound(watch: Watch, metrics: Mapping[str, float], bounds: AlarmConfig) -> Alarm:
    """Decide one alarm from an artifact's metrics, and the settings that it compares them with, in the same mapping."""
    needs = (*watch.needs, *watch.settings)
    missing = [n for n in needs if not math.isfinite(metrics.get(n, math.nan))]
    if missing and watch.optional:
        return Alarm(watch.name, watch.severity, False, f"not measured here: {', '.join(missing)}")
    if missing:
        fired, numbers = True, f"cannot be decided, not measured: {', '.join(missing)}"
    else:
        fired, numbers = watch.decide(bounds, *(metrics[n] for n in needs))
    return Alarm(watch.name, watch.severity, fired, f"{numbers}. Remedy: {watch.remedy}" if fired else numbers)


def _watch(
    failure: int,
    stages: Sequence[str],
    needs: Sequence[str],
    remedy: str,
    severity: Severity = "warn",
    *,
    optional: bool = False,
    across: bool = False,
    settings: Sequence[str] = (),
) -> Callable[[Decide], Decide]:
    """Enter a function into the table: its name is the check's, its docstring the check's description."""

    def enter(decide: Decide) -> Decide:
        ALARMS[decide.__name__] = Watch(
            name=decide.__name__,
            failure=failure,
            stages=tuple(stages),
            severity=severity,
            needs=tuple(needs),
            description=" ".join(inspect.getdoc(decide).split()),
            remedy=remedy,
            decide=decide,
            optional=optional,
            across=across,
            settings=tuple(settings),
        )
        return decide

    return enter


# --- 1: no trainable token --------------------------------------------------------------------------------------------

_FINE_TUNED = ("sft_checkpoint", "aligned_policy/sl_cai")
_GROUPS = ("aligned_policy/grpo", "aligned_policy/rloo")


@_watch(
    1,
    _FINE_TUNED,
    ["train/rows", "train/loss"],
    "look at a few rows of the training data: each needs an assistant turn, and the chat template must end it with EOS.",
    "error",
)
def trainable_tokens(bounds: AlarmConfig, rows: float, loss: float) -> tuple[bool, str]:
    """There are rows, and their loss is a positive number; without a labelled token it would be 0 or none."""
    return rows < 1 or loss <= 0, f"{rows:.0f} rows, mean loss {loss:.4f}"


@_watch(
    1,
    ["sft_checkpoint"],
    ["heldout/loss_before", "heldout/loss"],
    "raise optim.learning_rate or optim.epochs; if the training loss falls all the same, lower them or add data.",
)
def heldout_loss_falls(bounds: AlarmConfig, before: float, after: float) -> tuple[bool, str]:
    """Fine-tuning lowers the loss on held-out demonstrations."""
    return after >= before, f"held-out loss {after:.3f} nats per token, {before:.3f} before"


@_watch(
    1,
    _FINE_TUNED,
    ["train/rows", "train/rows_dropped_too_long"],
    "raise max_length, or shorten the conversations.",
)
def rows_dropped(bounds: AlarmConfig, kept: float, dropped: float) -> tuple[bool, str]:
    """Most conversations fit into max_length and are trained on."""
    return _dropped(bounds, kept, dropped)


@_watch(
    1,
    (*REWARD_MODELS, "aligned_policy/dpo", "aligned_policy/kto", "aligned_policy/orpo"),
    ["train/pairs", "train/pairs_dropped_too_long"],
    "raise max_length, or shorten prompts and answers.",
)
def pairs_dropped(bounds: AlarmConfig, kept: float, dropped: float) -> tuple[bool, str]:
    """Most pairs fit into max_length (DPO, KTO, ORPO: their prompts do) and are trained on."""
    return _dropped(bounds, kept, dropped)


@_watch(
    1,
    ["aligned_policy/ppo"],
    ["train/prompts", "train/prompts_dropped_too_long"],
    "raise max_prompt_length, or shorten the prompts.",
)
def prompts_dropped(bounds: AlarmConfig, kept: float, dropped: float) -> tuple[bool, str]:
    """Most prompts fit into max_prompt_length and are answered in training."""
    return _dropped(bounds, kept, dropped)


@_watch(
    1,
    _GROUPS,
    ["train/tasks", "train/tasks_dropped_too_long"],
    "raise max_prompt_length, or shorten the tasks.",
)
def tasks_dropped(bounds: AlarmConfig, kept: float, dropped: float) -> tuple[bool, str]:
    """Most tasks fit into max_prompt_length and are answered in training."""
    return _dropped(bounds, kept, dropped)


def _dropped(bounds: AlarmConfig, kept: float, dropped: float) -> tuple[bool, str]:
    share = dropped / max(kept + dropped, 1)
    return share > bounds.max_dropped_share, f"{share:.0%} dropped as too long; at most {bounds.max_dropped_share:.0%}"


# --- 2: the stop token is not learnt ----------------------------------------------------------------------------------


@_watch(
    2,
    _FINE_TUNED,
    ["heldout/eos_probability"],
    "train longer; check that the chat template ends an assistant turn with the tokenizer's EOS and that pad is another token.",
)
def eos_is_learnt(bounds: AlarmConfig, probability: float) -> tuple[bool, str]:
    """Where a held-out demonstration ends, the fine-tuned model would end, too."""
    return (
        probability < bounds.min_eos_probability,
        f"probability of EOS {probability:.4f} where held-out answers end; at least {bounds.min_eos_probability:g}",
    )


@_watch(
    2,
    ["policy_report"],
    ["eos_rate/policy", "eos_rate/sft"],
    "if SFT's rate is low, train it longer or raise sampling.max_new_tokens; if only the policy's is, train the policy less.",
)
def answers_end(bounds: AlarmConfig, policy: float, sft: float) -> tuple[bool, str]:
    """The policy's answers, and the SFT checkpoint's, end by themselves."""
    return (
        min(policy, sft) < bounds.min_eos_rate,
        f"{policy:.0%} of the policy's and {sft:.0%} of SFT's answers end by themselves; at least {bounds.min_eos_rate:.0%}",
    )


# --- 3: a reward head lost --------------------------------------------------------------------------------------------


@_watch(
    3,
    REWARD_MODELS,
    ["reload/score_gap"],
    "the saved model is not the one that was measured: materialize it again with force, and do not use its scores.",
    "error",
)
def scores_survive_reload(bounds: AlarmConfig, gap: float) -> tuple[bool, str]:
    """The saved reward model, loaded anew, gives the scores it gave before it was saved."""
    return gap > RELOAD_TOLERANCE, f"scores moved by {gap:.5f} of their size; at most {RELOAD_TOLERANCE:g}"


# --- 5: DPO makes the chosen answers unlikely -------------------------------------------------------------------------


@_watch(
    5,
    ["aligned_policy/dpo"],
    ["train/rewards_margin_last", "train/chosen_reward_last"],
    "give sft_weight (RPO), raise beta, or lower optim.learning_rate or optim.epochs.",
)
def chosen_stays_likely(bounds: AlarmConfig, margin: float, chosen: float) -> tuple[bool, str]:
    """While the margin grows, the chosen answers do not become much less likely than the reference finds them."""
    return (
        margin > 0 and chosen < -bounds.max_chosen_reward_fall,
        f"margin {margin:+.3f}, reward of the chosen answers {chosen:+.3f}; may fall to {-bounds.max_chosen_reward_fall:g}",
    )


@_watch(
    5,
    ["policy_report/dpo"],
    ["policy/train/chosen_reward_last", "perplexity/policy", "perplexity/sft"],
    "do not use this policy: train it again with sft_weight, a higher beta or a lower learning rate.",
)
def likelihood_not_displaced(bounds: AlarmConfig, chosen: float, policy: float, sft: float) -> tuple[bool, str]:
    """No policy whose chosen answers became less likely also finds held-out demonstrations less likely."""
    return (
        chosen < 0 and policy > sft * bounds.max_perplexity_ratio,
        f"reward of the chosen answers {chosen:+.3f}, perplexity {policy:.2f} against {sft:.2f} of SFT; "
        f"a factor of {bounds.max_perplexity_ratio:g} counts as worse",
    )


# --- 6: PPO -----------------------------------------------------------------------------------------------------------


@_watch(
    6,
    ["aligned_policy/ppo"],
    ["train/ratio_first"],
    "sample and score in the same precision (load.dtype: float32), at the temperature that is trained, without dropout.",
)
def first_pass_ratio(bounds: AlarmConfig, ratio: float) -> tuple[bool, str]:
    """Before the first update on a batch, policy and sampler agree on every token: no importance ratio is off 1."""
    off = abs(ratio - 1)
    return (
        off > bounds.max_ratio_error,
        f"an importance ratio {off:.4f} off 1 on the first pass; at most {bounds.max_ratio_error:g}",
    )


@_watch(
    6,
    ["aligned_policy/ppo"],
    ["train/scores_first", "train/scores_last"],
    "raise the learning rate or the number of steps, lower the KL coefficient, or look whether the reward model tells answers "
    "apart.",
)
def reward_rises(bounds: AlarmConfig, first: float, last: float) -> tuple[bool, str]:
    """The reward that is maximised is higher at the end than at the start."""
    return last <= first, f"mean score {last:.3f} at the end, {first:.3f} at the start"


@_watch(
    6,
    ["aligned_policy/ppo"],
    ["train/kl_last"],
    "raise the KL coefficient, or lower the learning rate or the number of passes over a batch.",
)
def kl_per_answer(bounds: AlarmConfig, kl: float) -> tuple[bool, str]:
    """The policy stays near its reference."""
    return kl > bounds.max_kl_per_answer, f"KL {kl:.2f} nats per answer; at most {bounds.max_kl_per_answer:g}"


@_watch(
    6,
    ["aligned_policy/ppo"],
    ["train/eos_rate_last"],
    "raise the penalty for a missing EOS or the token limit; check first that the SFT checkpoint ends its answers.",
)
def rollouts_end(bounds: AlarmConfig, rate: float) -> tuple[bool, str]:
    """Answers sampled in training end by themselves."""
    return rate < bounds.min_eos_rate, f"{rate:.0%} of the last answers end by themselves; at least {bounds.min_eos_rate:.0%}"


@_watch(
    6,
    ["aligned_policy/ppo", "aligned_policy/grpo", "aligned_policy/rloo"],
    ["train/entropy_last"],
    "raise the temperature or the KL coefficient, lower the learning rate, or stop earlier.",
)
def policy_has_entropy(bounds: AlarmConfig, entropy: float) -> tuple[bool, str]:
    """The policy still has a choice; one that always says the same explores nothing."""
    return entropy < bounds.min_entropy, f"entropy {entropy:.4f} nats per token; at least {bounds.min_entropy:g}"


# --- 7: GRPO and RLOO -------------------------------------------------------------------------------------------------


@_watch(
    7,
    _GROUPS,
    ["train/zero_variance_groups_last"],
    "use prompts of medium difficulty, more answers per prompt, a higher temperature, or a finer reward.",
)
def groups_differ(bounds: AlarmConfig, share: float) -> tuple[bool, str]:
    """Answers to one prompt get different rewards; a group in which all are equal has no gradient."""
    return (
        share >= bounds.max_zero_variance_groups,
        f"{share:.0%} of the last groups have one reward; below {bounds.max_zero_variance_groups:.0%}",
    )


@_watch(7, _GROUPS, ["train/kl_last"], "raise beta, or lower the learning rate.")
def kl_per_token(bounds: AlarmConfig, kl: float) -> tuple[bool, str]:
    """The policy stays near its reference, also where beta is 0."""
    return kl > bounds.max_kl_per_token, f"KL {kl:.3f} nats per token; at most {bounds.max_kl_per_token:g}"


@_watch(
    7,
    _GROUPS,
    ["train/clipped_completions_last"],
    "raise the token limit, or train an SFT checkpoint that ends its answers.",
)
def completions_end(bounds: AlarmConfig, share: float) -> tuple[bool, str]:
    """Completions end before the token limit."""
    return (
        share > bounds.max_clipped_completions,
        f"{share:.0%} of the last completions were cut; at most {bounds.max_clipped_completions:.0%}",
    )


@_watch(
    7,
    _GROUPS,
    ["train/mean_length_last", "train/max_new_tokens"],
    "raise the token limit; if the length goes on climbing, the reward pays for length.",
)
def length_below_cap(bounds: AlarmConfig, length: float, limit: float) -> tuple[bool, str]:
    """The mean length does not climb to the token limit."""
    return (
        length > limit * bounds.max_length_share,
        f"mean length {length:.1f} of at most {limit:.0f} tokens; up to {bounds.max_length_share:.0%}",
    )


# --- 8: reward hacking ------------------------------------------------------------------------------------------------


@_watch(
    8,
    ["policy_report"],
    ["reward_model/gain", "evaluator/gain", "evaluator/gain_low", "evaluator/gain_high"],
    "read the generations; train less or closer to the reference, or give the reward model more and other pairs.",
)
def evaluator_agrees(bounds: AlarmConfig, gain: float, value: float, low: float, high: float) -> tuple[bool, str]:
    """Where the reward model that was trained against sees a gain, the evaluator, which was not, sees one, too."""
    return (
        gain > bounds.min_reward_model_gain and low <= 0,
        f"gain {gain:+.3f} by the reward model, {value:+.3f} [{low:+.3f}, {high:+.3f}] by the evaluator",
    )


# --- 9: length bias ---------------------------------------------------------------------------------------------------


@_watch(
    9,
    REWARD_MODELS,
    ["heldout/accuracy", "heldout/gain_over_length", "heldout/gain_over_length_low", "heldout/gain_over_length_high"],
    "give more pairs, pairs of similar length, more epochs or a larger base; until then its scores may be length alone.",
)
def better_than_length(bounds: AlarmConfig, accuracy: float, gain: float, low: float, high: float) -> tuple[bool, str]:
    """The scorer beats the better of 'longer wins' and 'shorter wins' on the same held-out pairs."""
    return low <= 0, f"accuracy {accuracy:.3f}, {gain:+.3f} [{low:+.3f}, {high:+.3f}] over the length baseline"


@_watch(
    9,
    ["policy_report"],
    ["evaluator/gain", "length/policy", "length/sft"],
    "read long answers beside short ones; look at the evaluator's gain over length, and train on pairs of similar length.",
)
def gain_is_not_length(bounds: AlarmConfig, gain: float, policy: float, sft: float) -> tuple[bool, str]:
    """A gain does not come with much longer answers."""
    return (
        gain > 0 and policy > sft * bounds.max_length_ratio,
        f"gain {gain:+.3f} with {policy:.1f} tokens against {sft:.1f}; a factor of {bounds.max_length_ratio:g} is suspicious",
    )


@_watch(
    9,
    ["ai_feedback"],
    ["position/order_flips", "position/bias", "position/first_chosen"],
    "use a larger judge; a choice that the order decides averages out to a label near 0.5, which teaches nothing.",
)
def judge_reads_the_answers(bounds: AlarmConfig, flips: float, bias: float, first: float) -> tuple[bool, str]:
    """What the judge chooses depends on the answers, not on which of them is shown first."""
    return (
        flips > bounds.max_order_flips,
        f"the order decides {flips:.0%} of the choices (at most {bounds.max_order_flips:.0%}) and moves a probability by "
        f"{bias:.2f}; the first option is chosen in {first:.0%}",
    )


@_watch(
    9,
    ["ai_feedback"],
    ["heldout/accuracy", "heldout/gain_over_length", "heldout/gain_over_length_low", "heldout/gain_over_length_high"],
    "use a better judge, or give AI feedback no weight (reward_model.ai_feedback_weight: 0).",
    optional=True,
)
def judge_beats_length(bounds: AlarmConfig, accuracy: float, gain: float, low: float, high: float) -> tuple[bool, str]:
    """The judge agrees with people more often than the better of 'longer wins' and 'shorter wins' does, on the same pairs."""
    return low <= 0, f"accuracy {accuracy:.3f}, {gain:+.3f} [{low:+.3f}, {high:+.3f}] over the length baseline"


# --- 10: critique and revise, AI feedback -----------------------------------------------------------------------------


@_watch(
    10,
    ["constitutional_preference_pairs"],
    ["share_kept", "pairs"],
    "see filtered/* for the reasons, and the table of revisions; raise revision.max_new_tokens where many are truncated, improve "
    "the critic, sample more candidates or relax filters.",
    "error",
    settings=["filters.min_share_kept"],
)
def share_kept(bounds: AlarmConfig, share: float, pairs: float, least: float) -> tuple[bool, str]:
    """Enough of the prompts end in a pair worth training on (filters.min_share_kept)."""
    return share < least, f"{share:.0%} of the prompts ended in a pair ({pairs:.0f}); at least {least:.0%} are asked for"


@_watch(
    10,
    ["constitutional_preference_pairs"],
    ["share_no_violations"],
    "set no_violation_threshold to 1 (always revise), teach the critic with more worked critiques, or use harder prompts.",
)
def critic_finds_something(bounds: AlarmConfig, share: float) -> tuple[bool, str]:
    """The critic finds something to mend in some answers."""
    return (
        share > bounds.max_share_no_violations,
        f"{share:.0%} of the critiques find nothing; at most {bounds.max_share_no_violations:.0%}",
    )


@_watch(
    10,
    ["ai_feedback"],
    ["share_compared", "prompts"],
    "see dropped/* for the reasons: raise answer.temperature for identical answers and answer.max_new_tokens for truncated ones, "
    "and use a judge whose option probabilities can be read.",
)
def share_compared(bounds: AlarmConfig, share: float, prompts: float) -> tuple[bool, str]:
    """Enough of the prompts end in two answers that the judge could compare; what it could not is no score."""
    return (
        share < bounds.min_share_compared,
        f"{share:.0%} of {prompts:.0f} prompts ended in a comparison; at least {bounds.min_share_compared:.0%}",
    )


# --- 11: leakage ------------------------------------------------------------------------------------------------------


@_watch(
    11,
    ["prompts"],
    ["leakage/heldout", "leakage/leaked"],
    "give all data stages the same heldout_fraction, and materialize them anew.",
    "error",
    across=True,
)
def nothing_leaks(bounds: AlarmConfig, heldout: float, leaked: float) -> tuple[bool, str]:
    """No held-out prompt, pair or demonstration is in any training data."""
    return leaked > 0, f"{leaked:.0f} of {heldout:.0f} held-out rows are in training data"
