"""Generated data through real materializations: versioned when published and when reused, inherited by what it trains."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from alignment.datasets import write_jsonl
from alignment.handles import Checkpoint, PolicyReport, PreferenceDataset, RewardModel
from alignment.models import Config
from alignment.records import PreferencePair
from assets.stage import Outcome, Stage, Tools, materialize
from resources.artifacts import ArtifactStore
from resources.dvc_data import DvcData, folder_md5
from resources.handle_io import HandleIOManager
from resources.tracking import MlflowTracking

FILES = ("pairs.jsonl", "rounds.jsonl")
CONTENT = {"chosen": "first"}  # what the pairs asset writes


class NoSettings(Config):
    """Nothing to set."""


def stage_asset(name: str, kind: type, write: Callable[[Path], dict[str, Any]], inputs: dict[str, type], **settings: Any):
    """An asset `name[general]` whose computation is `write`."""

    @dg.asset(
        name=name,
        partitions_def=dg.StaticPartitionsDefinition(["general"]),
        ins={given: dg.AssetIn() for given in inputs},
        required_resource_keys={"store", "tracking", "dvc"},
    )
    def _asset(context: dg.AssetExecutionContext, **given: Any) -> dg.MaterializeResult:
        tools = Tools(context.resources.store, context.resources.tracking, context.resources.dvc)

        def stage() -> Stage:
            def compute(work, log) -> Outcome:
                return Outcome(handle=write(work.out))

            return Stage(kind=kind, config=NoSettings(), code_version="1", inputs=given, compute=compute, **settings)

        return materialize(context, stage, tools, force="force" in context.run.tags)

    return _asset


def write_pairs(out: Path) -> dict[str, Any]:
    write_jsonl(out / "pairs.jsonl", [PreferencePair(id="1", prompt="Hello", chosen=CONTENT["chosen"], rejected="worse")])
    (out / "rounds.jsonl").write_text("{}\n")
    return {}


def write_model(out: Path) -> dict[str, Any]:
    (out / "model").mkdir()
    (out / "model" / "weights").write_text("1")
    return {}


def write_report(out: Path) -> dict[str, Any]:
    policy = Checkpoint(asset="policy", fingerprint="0" * 64, mlflow_run_id="0")
    return {"method": "ppo", "policy": policy}


PAIRS = stage_asset("pairs", PreferenceDataset, write_pairs, {}, versioned=FILES)
SCORER = stage_asset("scorer", RewardModel, write_model, {"pairs": PreferenceDataset}, model_artifact=True)
POLICY = stage_asset("policy", Checkpoint, write_model, {"scorer": RewardModel}, model_artifact=True)
REPORT = stage_asset("report", PolicyReport, write_report, {"policy": Checkpoint})
ASSETS = [PAIRS, SCORER, POLICY, REPORT]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    """A DVC repository with `data/`, and a fresh MLflow database, to be copied: making one takes seconds."""
    from dvc.repo import Repo

    root = tmp_path_factory.mktemp("template") / "project"
    (root / "data").mkdir(parents=True)
    Repo.init(str(root), no_scm=True).close()
    (root / ".dvc" / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    (root / "data" / "prompts.jsonl").write_text("{}\n")
    with Repo(str(root)) as repo:
        repo.add(str(root / "data"))
    shutil.copy(empty_database, root / "mlflow.db")
    return root


class World:
    """One project: materializes the assets and says what MLflow recorded."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tracking = MlflowTracking(
            tracking_uri=f"sqlite:///{root / 'mlflow.db'}",
            artifact_root=str(root / "mlartifacts"),
            lock_folder=str(root / "locks"),
        )

    def run(self, *assets: Any, **tags: str) -> dict[str, Any]:
        """Materialize; returns the handles by asset."""
        done = dg.materialize(
            ASSETS,
            selection=list(assets or ASSETS),
            partition_key="general",
            instance=dg.DagsterInstance.ephemeral(),
            resources={
                "store": ArtifactStore(root=str(self.root / "artifacts")),
                "io_manager": HandleIOManager(root=str(self.root / "handles")),
                "dvc": DvcData(root=str(self.root)),
                "tracking": self.tracking,
            },
            tags=tags,
        )
        self.metadata = {
            e.asset_key.to_user_string(): {k: v.value for k, v in e.materialization.metadata.items()}
            for e in done.get_asset_materialization_events()
        }
        return {a.key.to_user_string(): done.output_for_node(a.key.to_user_string()) for a in assets or ASSETS}

    def attempt(self, asset: str) -> Any:
        """The newest MLflow run of an asset."""
        runs = self.tracking.client().search_runs([self.tracking.experiment_id], order_by=["attributes.start_time ASC"])
        return [run for run in runs if run.data.tags.get("dagster.asset_key") == asset][-1]

    def inputs(self, asset: str) -> list[tuple[str, str, str]]:
        """Name, digest and context of the data sets that an asset's newest MLflow run has as inputs."""
        found = self.attempt(asset).inputs.dataset_inputs
        return [(i.dataset.name, i.dataset.digest, i.tags[0].value) for i in found]

    def folder(self, handle: Any) -> Path:
        return self.root / "artifacts" / handle.asset / handle.fingerprint


@pytest.fixture
def world(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setitem(CONTENT, "chosen", "first")
    return World(shutil.copytree(template, tmp_path / "project"))


def test_the_pointer_is_in_the_project_and_in_mlflow(world):
    pairs = world.run(PAIRS)["pairs"]
    md5 = folder_md5(world.folder(pairs), FILES)
    pointer = f"generated/pairs/general/{md5[:12]}.dvc"
    (data,) = pairs.generated
    assert (data.name, data.pointer, data.md5, data.rows) == ("pairs", pointer, md5, 1)
    assert yaml.safe_load((world.root / pointer).read_text())["outs"][0]["md5"] == f"{md5}.dir"
    run = world.attempt("pairs")
    logged = world.root / "mlartifacts" / run.info.run_id / "artifacts" / "dvc" / f"{md5[:12]}.dvc"
    assert logged.read_text() == (world.root / pointer).read_text()
    assert (run.data.tags["dvc.generated_md5"], run.data.tags["dvc.pointer"]) == (md5, pointer)
    assert world.inputs("pairs") == [("pairs", f"dvc-{md5}", "generated")]
    assert world.metadata["pairs"]["dvc_pointer"] == pointer


def test_whatever_trains_on_it_has_it_as_input_also_through_a_reward_model(world):
    handles = world.run()
    md5 = handles["pairs"].generated[0].md5
    assert world.inputs("scorer") == world.inputs("policy") == [("pairs", f"dvc-{md5}", "training")]
    assert world.inputs("report") == []  # it measures, it does not learn
    assert {handle.generated for handle in handles.values()} == {handles["pairs"].generated}
    assert "dvc_pointer" not in world.metadata["policy"]


def test_reused_artifacts_say_the_same_again(world):
    first = world.run()
    assert world.run() == first
    assert all(metadata["reused"] for metadata in world.metadata.values())
    digest = f"dvc-{first['pairs'].generated[0].md5}"
    contexts = {"pairs": "generated", "scorer": "training", "policy": "training"}
    for asset, context in contexts.items():
        assert world.inputs(asset) == [("pairs", digest, context)]


def test_reusing_pairs_brings_a_lost_version_back(world):
    pairs = world.run(PAIRS)["pairs"]
    for folder in ("generated", ".dvc/cache"):
        shutil.rmtree(world.root / folder)
    world.run(PAIRS)
    assert world.metadata["pairs"]["reused"]
    pointer = world.root / pairs.generated[0].pointer
    shutil.rmtree(pointer.with_suffix(""))
    from dvc.cli import main

    assert main(["--cd", str(world.root), "checkout", str(pointer)]) == 0
    for name in FILES:
        assert (pointer.with_suffix("") / name).read_bytes() == (world.folder(pairs) / name).read_bytes()


def test_a_policy_keeps_the_version_it_was_trained_on_when_pairs_are_made_anew(world):
    before = world.run()
    CONTENT["chosen"] = "second"  # as sampling on another machine might give
    pairs = world.run(PAIRS, force="true")["pairs"]
    assert pairs.generated[0].md5 != before["pairs"].generated[0].md5
    assert len(list((world.root / "generated" / "pairs" / "general").glob("*.dvc"))) == 2
    after = world.run(SCORER)["scorer"]
    assert world.metadata["scorer"]["reused"]
    assert after.generated == before["pairs"].generated
    assert world.inputs("scorer") == [("pairs", f"dvc-{before['pairs'].generated[0].md5}", "training")]


def test_pairs_published_by_older_code_get_their_version_when_they_are_reused(world):
    pairs = world.run(PAIRS)["pairs"]
    record = world.folder(pairs) / "artifact.json"
    content = json.loads(record.read_text())
    del content["handle"]["generated"]
    record.write_text(json.dumps(content))
    shutil.rmtree(world.root / "generated")
    assert world.run(PAIRS)["pairs"] == pairs
    assert (world.root / pairs.generated[0].pointer).exists()
