"""From an asset's settings to whoever answers: the SFT checkpoint, the base model under it, or an endpoint."""

from collections.abc import Mapping
from pathlib import Path

from alignment.critic import Answerer, AnswererSettings, LocalAnswerer
from alignment.critique import CritiqueConfig, Judge, reward_judge
from alignment.errors import UserError
from alignment.handles import Checkpoint, RewardModel
from alignment.models import LoadSettings
from resources.artifacts import ArtifactStore
from resources.endpoint import EndpointAnswerer
from resources.paths import answers


def answerers(
    roles: Mapping[str, AnswererSettings], checkpoint: Checkpoint, store: ArtifactStore, load: LoadSettings, work: Path
) -> dict[str, Answerer]:
    """An answerer per role. A local model that several roles share is loaded once.

    Args:
        checkpoint: the SFT checkpoint; it knows the base model that its adapter belongs to.
        work: the step's work folder; what each role's endpoint was paid for is written to it.

    Raises:
        UserError: the base model is asked for, and the checkpoint is no adapter over one.
    """
    local: dict[str, Answerer] = {}
    out: dict[str, Answerer] = {}
    for role, settings in roles.items():
        if settings.kind == "endpoint":
            out[role] = EndpointAnswerer(settings, answers(), ledger=work / f"paid_{role}.jsonl")
            continue
        if settings.source not in local:
            local[settings.source] = _local(settings, checkpoint, store, load)
        out[role] = local[settings.source]
    return out


def who_revises(
    config: CritiqueConfig, checkpoint: Checkpoint, reward_model: RewardModel, store: ArtifactStore, work: Path
) -> tuple[Answerer, Answerer, Judge]:
    """Sampler, critic and judge of critique-and-revise."""
    from alignment.models import load_reward_model, load_tokenizer

    who = answerers({"sampler": config.sampler, "critic": config.critic}, checkpoint, store, config.load, work)
    tokenizer = load_tokenizer(store.model_files(checkpoint).base, config.load.trust_remote_code)
    scorer = load_reward_model(store.model_files(reward_model), config.load, tokenizer=tokenizer)
    return who["sampler"], who["critic"], reward_judge(scorer, tokenizer, config.score_batch_size)


def _local(settings: AnswererSettings, checkpoint: Checkpoint, store: ArtifactStore, load: LoadSettings) -> Answerer:
    from alignment.models import load_causal_lm, load_tokenizer

    handle = checkpoint
    if settings.source == "base_model":
        if checkpoint.adapter_of is None:
            raise UserError(
                "source: base_model cannot be told from an SFT checkpoint that was fine-tuned in full. Remedy: set source to "
                "sft_checkpoint, or sft_checkpoint.finetuning to lora."
            )
        handle = checkpoint.adapter_of
    files = store.model_files(handle)
    tokenizer = load_tokenizer(files.base, load.trust_remote_code)
    return LocalAnswerer(load_causal_lm(files, load), tokenizer, identity=handle.fingerprint)
