"""`sft_checkpoint`: the base model fine-tuned on the SFT data set."""

import dagster as dg

from alignment.handles import Checkpoint, SftDataset
from alignment.readers import read_records
from alignment.records import Conversation
from alignment.sft import CODE_VERSION, SftConfig, train_sft
from assets.checks import alarm_specs
from assets.launch_config import launch_config
from assets.settings import dressed, recipe_config
from assets.stage import Outcome, Stage, Tools, checked_config, materialize
from resources.artifacts import ArtifactStore
from resources.dvc_data import DvcData
from resources.tracking import MlflowTracking

LaunchConfig = launch_config("sft_checkpoint", recipe_config("sft_checkpoint", SftConfig))


@dg.asset(check_specs=alarm_specs("sft_checkpoint"), **dressed("models", {"trl", "peft"}, gpu=True))
def sft_checkpoint(
    context: dg.AssetExecutionContext,
    config: LaunchConfig,  # type: ignore[valid-type]
    base_model: Checkpoint,
    sft_dataset: SftDataset,
    store: ArtifactStore,
    tracking: MlflowTracking,
    dvc: DvcData,
):
    """Supervised fine-tuning (LoRA, QLoRA or all weights), loss on assistant tokens only. Also the critic and the start
    of every policy."""

    def stage() -> Stage:
        settings = checked_config(SftConfig, config.model_dump())

        def compute(work, log) -> Outcome:
            rows = store.path(sft_dataset)
            trained, metrics = train_sft(
                settings,
                store.model_files(base_model),
                read_records(rows / "train.jsonl", Conversation),
                read_records(rows / "heldout.jsonl", Conversation),
                work=work.folder,
                out=work.out,
                log=log,
            )
            adapter_of = base_model if settings.finetuning == "lora" else None
            return Outcome(
                metrics=metrics,
                curves=trained.curves,
                curve_names=("loss", "mean_token_accuracy"),
                handle={"adapter_of": adapter_of},
            )

        return Stage(
            kind=Checkpoint,
            config=settings,
            code_version=CODE_VERSION,
            inputs={"base_model": base_model, "sft_dataset": sft_dataset},
            compute=compute,
            model_artifact=True,
        )

    return materialize(context, stage, Tools(store, tracking, dvc), force=config.force)
