"""Handles: what one stage passes to the next. Small, typed, JSON; weights and tables stay in the artifact store.

A handle names its artifact by fingerprint, never by "latest" or by a file's name, and says which MLflow run made it.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class GeneratedData(BaseModel):
    """A data set that the pipeline generated, at one version that DVC can restore."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="Key of the asset that generated it")
    pointer: str = Field(description="DVC pointer that restores it, relative to the folder of data.dvc")
    md5: str = Field(description="Version: what DVC knows the files by, as one data set")
    rows: int = Field(description="Pairs or comparisons in it")


class DataSource(BaseModel):
    """A file, or a data set of the Hub, at the version that a data set was read from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="The file's name without its ending")
    source: str = Field(description="Path as the recipe gives it, or Hub id")
    md5: str = Field(description="md5 of the file, by which DVC knows it; of a Hub id, that of its name")
    rows: int = Field(description="Rows in it; 0 where they were not counted")


class Handle(BaseModel):
    """Base of all handles."""

    # NaN is written as NaN: a metric that does not exist, such as a mean over nothing, must come back as it went.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    asset: str = Field(description="Asset key, slashes between parts")
    fingerprint: str = Field(description="sha256 of everything that decided the content")
    partition: str | None = Field(None, description="Constitution, for assets partitioned by it")
    mlflow_run_id: str = Field(description="MLflow run that computed (not merely reused) the artifact")
    metrics: dict[str, float] = Field(default_factory=dict, description="Final metrics of the run that computed it")
    facts: dict[str, Any] = Field(default_factory=dict, description="Counts and settings later stages or people need")
    dvc_md5: str | None = Field(None, description="Version of `data/` it was made of, by its md5; older artifacts do not say")
    sources: tuple[DataSource, ...] = Field((), description="What a data set was read from; empty for all else")
    generated: tuple[GeneratedData, ...] = Field(
        (), description="Generated data it is, or was made of, directly or through others"
    )


class SftDataset(Handle):
    """Conversations for supervised fine-tuning: `train.jsonl`, `heldout.jsonl`."""

    kind: Literal["sft_dataset"] = "sft_dataset"


class PreferenceDataset(Handle):
    """Preference pairs. Human ones in `reward_train.jsonl`, `evaluator_train.jsonl`, `heldout.jsonl`; constitutional
    ones in `pairs.jsonl` with every round in `rounds.jsonl`; those of AI feedback in `comparisons.jsonl`, with soft labels."""

    kind: Literal["preference_dataset"] = "preference_dataset"


class Revisions(Handle):
    """Prompts taken through critique and revise for people to read: `revisions.jsonl`, every round in `rounds.jsonl`."""

    kind: Literal["revisions"] = "revisions"


class PromptSet(Handle):
    """Prompts with tags (`train.jsonl`, `heldout.jsonl`) and problems with answers (`problems_train.jsonl`,
    `problems_heldout.jsonl`)."""

    kind: Literal["prompt_set"] = "prompt_set"


class Checkpoint(Handle):
    """A language model in `model/`: a full model (`adapter_of` is None) or a LoRA adapter over another checkpoint."""

    kind: Literal["checkpoint"] = "checkpoint"
    adapter_of: "Checkpoint | None" = Field(None, description="The full model a LoRA adapter in `model/` belongs to")


class RewardModel(Handle):
    """A scalar scorer in `model/`: a LoRA adapter with score head over `adapter_of`, or a full sequence classifier."""

    kind: Literal["reward_model"] = "reward_model"
    adapter_of: Checkpoint | None = Field(None, description="The full model the adapter belongs to")


class SftReport(Handle):
    """What the SFT checkpoint answers to held-out prompts, which policies are compared with: `measured.json`,
    `generations.jsonl`."""

    kind: Literal["sft_report"] = "sft_report"


class PolicyReport(Handle):
    """A policy measured against the SFT checkpoint on held-out prompts: `report.json`, `generations.jsonl`."""

    kind: Literal["policy_report"] = "policy_report"
    method: str = Field(description="Alignment method of the measured policy")
    policy: Checkpoint = Field(description="The measured policy")


class Champion(Handle):
    """The promotion decision: `decision.json` says rule by rule why."""

    kind: Literal["champion"] = "champion"
    method: str | None = Field(None, description="Method of the best candidate, None when no report existed")
    promoted: bool = Field(description="Whether the candidate passed every rule and now carries the champion alias")
    policy: Checkpoint | None = Field(None, description="The candidate")


AnyHandle = Annotated[
    SftDataset | PreferenceDataset | Revisions | PromptSet | Checkpoint | RewardModel | SftReport | PolicyReport | Champion,
    Field(discriminator="kind"),
]
_ADAPTER: TypeAdapter[AnyHandle] = TypeAdapter(AnyHandle)


def parse_handle(text: str) -> AnyHandle:
    """The handle in a JSON text, its class chosen by `kind`."""
    return _ADAPTER.validate_json(text)
