"""The curated data: `sft_dataset`, `human_preferences`, `prompts`, read at the version that `data.dvc` pins.

Reading, deduplicating and splitting is in `alignment.datasets`; here each configured source is resolved to a file and a
version (DVC's md5 for files in `data/`, a content hash for others, the id itself for the Hub).
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import dagster as dg

from alignment.datasets import (
    CODE_VERSION,
    HumanPreferencesConfig,
    PromptsConfig,
    SftDatasetConfig,
    build_human_preferences,
    build_prompts,
    build_sft_dataset,
)
from alignment.handles import DataSource, Handle, PreferenceDataset, PromptSet, SftDataset
from alignment.models import Config
from assets.launch_config import launch_config
from assets.settings import dressed, recipe_config
from assets.stage import Outcome, Stage, Tools, checked_config, materialize
from resources.artifacts import ArtifactStore
from resources.dvc_data import DvcData
from resources.tracking import MlflowTracking

DATA = dg.AssetKey("data")

data = dg.AssetSpec(
    DATA,
    group_name="data",
    kinds={"dvc"},
    owners=["team:alignment"],
    description="The curated files in `data/`, pinned by `data.dvc`. A sensor watches the pin and starts a run when it changes.",
)


def data_asset(
    name: str,
    kind: type[Handle],
    config_class: type[Config],
    sources: tuple[str, ...],
    build: Callable,
    description: str,
) -> dg.AssetsDefinition:
    """One data-set asset. `sources` names the configuration fields that list files."""
    LaunchConfig = launch_config(name, recipe_config(name, config_class))

    @dg.asset(name=name, deps=[DATA], description=description, **dressed("data", {"dvc", "pandas"}))
    def _asset(
        context: dg.AssetExecutionContext,
        config: LaunchConfig,  # type: ignore[valid-type]
        store: ArtifactStore,
        tracking: MlflowTracking,
        dvc: DvcData,
    ) -> dg.MaterializeResult:
        def stage() -> Stage:
            settings = checked_config(config_class, config.model_dump())
            names = [source for field in sources for source in getattr(settings, field)]
            resolved = resolve_sources(dvc, names)

            def compute(work, log) -> Outcome:
                counts = build(settings, {n: str(path) for n, (path, _) in resolved.items()}, work.out, log=log)
                for key, value in counts.items():
                    log.say(f"{key}: {value:g}")
                preview = first_rows(work.out)
                return Outcome(metrics=counts, tables={"rows": preview}, facts={"files": names})

            return Stage(
                kind=kind,
                config=settings,
                code_version=CODE_VERSION,
                inputs={},
                versions={n: version for n, (_, version) in resolved.items()},
                data=[
                    DataSource(name=Path(n).stem, source=n, md5=version, rows=_rows(path))
                    for n, (path, version) in resolved.items()
                ],
                compute=compute,
            )

        return materialize(context, stage, Tools(store, tracking, dvc), force=config.force)

    return _asset


def resolve_sources(dvc: DvcData, names: list[str]) -> dict[str, tuple[Path | str, str]]:
    """Where each configured source is and its version. Files in `data/` must be exactly what `data.dvc` pins."""
    ours = [n for n in names if n.startswith("data/")]
    pinned = dvc.checkout([n.removeprefix("data/") for n in ours])
    out: dict[str, tuple[Path | str, str]] = {}
    for name in names:
        if name in ours:
            out[name] = pinned[name.removeprefix("data/")]
        elif (path := Path(name).expanduser()).is_file():
            with path.open("rb") as file:
                out[name] = (path, hashlib.file_digest(file, "md5").hexdigest())
        else:
            out[name] = (name, hashlib.md5(name.encode()).hexdigest())
    return out


def first_rows(folder: Path, count: int = 8) -> list[dict[str, str]]:
    """The first lines of each file that was written, for a look in MLflow."""
    rows = []
    for path in sorted(folder.glob("*.jsonl")):
        with path.open(encoding="utf-8") as file:
            rows += [{"file": path.name, "row": line.strip()[:2000]} for line, _ in zip(file, range(count), strict=False)]
    return rows


def _rows(path: Path | str) -> int:
    if not isinstance(path, Path) or path.suffix != ".jsonl":
        return 0
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


sft_dataset = data_asset(
    "sft_dataset",
    SftDataset,
    SftDatasetConfig,
    ("demonstrations", "critiques"),
    build_sft_dataset,
    "Conversations for supervised fine-tuning: demonstrations and worked critiques, deduplicated and split by prompt.",
)
human_preferences = data_asset(
    "human_preferences",
    PreferenceDataset,
    HumanPreferencesConfig,
    ("preferences", "critiques"),
    build_human_preferences,
    "Human comparisons (preferences, and worked critiques: revision over answer), split by prompt into reward training, "
    "evaluator training and held-out.",
)
prompts = data_asset(
    "prompts",
    PromptSet,
    PromptsConfig,
    ("prompts", "problems"),
    build_prompts,
    "Prompts with tags and problems with answers: train for critique-and-revise and reinforcement learning, held-out for the "
    "reports.",
)
