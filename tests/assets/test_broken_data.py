"""Broken input through real materializations: one failure that names the place, no retry, nothing published."""

import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets.data import human_preferences, prompts, sft_dataset
from resources.artifacts import ArtifactStore
from resources.dvc_data import DvcData
from resources.handle_io import HandleIOManager
from resources.tracking import MlflowTracking

ASSETS = {"sft_dataset": sft_dataset, "human_preferences": human_preferences, "prompts": prompts}

# Kind of data in the readers' table: the asset that reads it, and the setting that names the file.
READ_BY = {
    "conversations": ("sft_dataset", "demonstrations"),
    "critiques": ("sft_dataset", "critiques"),
    "preferences": ("human_preferences", "preferences"),
    "prompts": ("prompts", "prompts"),
}
READS = {
    "sft_dataset": ("demonstrations", "critiques"),
    "human_preferences": ("preferences", "critiques"),
    "prompts": ("prompts", "problems"),
}
# Of the kinds of broken input that `test_readers.py` holds against the readers, those that go through a whole asset here: what is
# shown here is the same for all of them, so that there are some of every format, every kind of data, and every way to be broken.
THROUGH_AN_ASSET = {
    "empty file",
    "csv with a header only",
    "parquet without rows",
    "unsupported suffix",
    "truncated gzip",
    "truncated parquet",
    "not utf-8",
    "bad json",
    "a key twice",
    "pretty-printed json",
    "duplicate ids",
    "wrong columns in parquet",
    "misspelt optional column",
    "one-sided pair",
    "nan",
    "empty answer",
    "lone surrogate",  # neither of these two fits into a database
    "nul character",
    "role out of order",
    "list written by str()",
    "identical answers",
    "transcripts of two prompts",
    "finding without a revision",
    "tags of a wrong type",
}


def _table() -> list[tuple]:
    path = Path(__file__).parents[1] / "alignment" / "test_readers.py"
    spec = importlib.util.spec_from_file_location("readers_table", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CASES


CASES = [case for case in _table() if case[0] in THROUGH_AN_ASSET]
GOOD_TALK = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good morning."}]}


Materialize = Callable[..., dg.ExecuteInProcessResult]


@pytest.fixture
def folder(tmp_path: Path, empty_database: Path) -> Path:
    storage = tmp_path / "storage"
    storage.mkdir()
    shutil.copy(empty_database, storage / "mlflow.db")
    return storage


@pytest.fixture
def tracking(folder: Path) -> MlflowTracking:
    return MlflowTracking(
        tracking_uri=f"sqlite:///{folder / 'mlflow.db'}",
        artifact_root=str(folder / "mlartifacts"),
        lock_folder=str(folder / "locks"),
    )


@pytest.fixture
def materialize(folder: Path, tracking: MlflowTracking, fresh_data: Path) -> Materialize:
    def run(asset: str, config: Mapping[str, Any], data_root: Path = fresh_data) -> dg.ExecuteInProcessResult:
        return dg.materialize(
            [ASSETS[asset]],
            instance=dg.DagsterInstance.ephemeral(),
            resources={
                "store": ArtifactStore(root=str(folder / "artifacts")),
                "io_manager": HandleIOManager(root=str(folder / "handles")),
                "dvc": DvcData(root=str(data_root)),
                "tracking": tracking,
            },
            run_config={"ops": {asset: {"config": dict(config)}}},
            raise_on_error=False,
        )

    return run


def settings(kind: str, path: Path) -> tuple[str, dict[str, Any]]:
    """The asset and its run configuration; what the broken file does not replace is good or empty."""
    asset, field = READ_BY[kind]
    config: dict[str, Any] = {other: [] for other in READS[asset]} | {field: [str(path)]}
    if kind == "critiques":
        good = path.with_name("good.jsonl")
        good.write_text(json.dumps(GOOD_TALK) + "\n", encoding="utf-8")
        config["demonstrations"] = [str(good)]
    return asset, config


def assert_one_clear_failure(done: dg.ExecuteInProcessResult, folder: Path, tracking: MlflowTracking) -> str:
    """The step failed once, with a description; nothing was published. Returns the description."""
    assert not done.success
    assert not [e for e in done.all_events if e.event_type_value in {"STEP_UP_FOR_RETRY", "STEP_RESTARTED"}]
    assert not [e for e in done.all_events if e.event_type_value == "ASSET_MATERIALIZATION"]
    (failure,) = done.get_step_failure_events()
    assert failure.step_failure_data.error.cls_name == "Failure"
    description = failure.step_failure_data.user_failure_data.description
    assert "\n" not in description

    runs = tracking.client().search_runs([tracking.experiment_id])
    (attempt,) = (run for run in runs if run.data.tags["alignment.level"] == "attempt")
    assert attempt.info.status == "FAILED"
    assert attempt.data.tags["alignment.error"] == description

    artifacts = folder / "artifacts"
    assert [p for p in artifacts.iterdir() if not p.name.startswith(".")] == []
    assert [p for p in (artifacts / ".work").rglob("*") if p.is_file()] == []
    assert not (folder / "handles").exists()
    return description


def test_what_goes_through_an_asset_is_of_every_kind_and_format():
    assert {case[0] for case in CASES} == THROUGH_AN_ASSET
    assert len(CASES) >= 20
    assert {case[1] for case in CASES} == set(READ_BY)
    assert {Path(case[2]).suffix for case in CASES} >= {".jsonl", ".gz", ".parquet", ".csv"}


@pytest.mark.parametrize(
    ("kind", "filename", "content", "line", "field", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_a_broken_file_fails_once_and_publishes_nothing(
    materialize, folder, tracking, tmp_path, kind, filename, content, line, field, words
):
    path = tmp_path / filename
    path.write_bytes(content)
    asset, config = settings(kind, path)
    description = assert_one_clear_failure(materialize(asset, config), folder, tracking)
    assert description.startswith(str(path))
    assert words in description
    assert "Remedy: " in description
    if line is not None:
        assert f", {'row' if filename.endswith('.parquet') else 'line'} {line}" in description
    if field is not None:
        assert f"field '{field}'" in description


@pytest.mark.parametrize("kind", READ_BY)
def test_a_file_that_does_not_exist(materialize, folder, tracking, tmp_path, kind):
    asset, config = settings(kind, tmp_path / "nowhere.jsonl")
    assert "nowhere.jsonl: no such file" in assert_one_clear_failure(materialize(asset, config), folder, tracking)


def test_a_file_in_data_that_is_not_the_pinned_version(materialize, folder, tracking, pulled):
    path = pulled / "data" / "prompts.jsonl"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content + b"\n")
    description = assert_one_clear_failure(materialize("prompts", {}, pulled), folder, tracking)
    assert description.startswith(
        "data/prompts.jsonl: differs from the version that data.dvc pins. Remedy: if you changed it, run `.venv/bin/dvc add data`"
    )


def test_a_file_in_data_that_is_not_pinned_at_all(materialize, folder, tracking, pulled):
    description = assert_one_clear_failure(materialize("prompts", {"prompts": ["data/promts.jsonl"]}, pulled), folder, tracking)
    assert description.startswith("data/promts.jsonl: is not part of the version that data.dvc pins")


def test_too_few_rows_for_a_split(materialize, folder, tracking, tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n", encoding="utf-8")
    done = materialize("human_preferences", {"preferences": [str(path)], "critiques": []})
    description = assert_one_clear_failure(done, folder, tracking)
    assert "leaves not a single" in description


def test_bad_rows_of_a_hub_data_set_are_skipped_and_counted(materialize, monkeypatch):
    import datasets
    from huggingface_hub import constants

    rows = [{"prompt": f"Question {n}?" if n else "", "tags": ["general"]} for n in range(40)]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, streaming: rows)
    done = materialize("prompts", {"prompts": ["someone/prompts"]})
    assert done.success
    (event,) = done.get_asset_materialization_events()
    assert event.materialization.metadata["rows/skipped"].value == 1


def test_after_the_mend_the_next_run_succeeds(materialize, folder, tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [json.dumps({"prompt": f"Question {n}?", "tags": ["general"]}) for n in range(40)]
    path.write_text("\n".join([*rows, "{"]), encoding="utf-8")
    assert not materialize("prompts", {"prompts": [str(path)]}).success
    path.write_text("\n".join(rows), encoding="utf-8")
    done = materialize("prompts", {"prompts": [str(path)]})
    assert done.success
    (event,) = done.get_asset_materialization_events()
    assert event.materialization.metadata["reused"].value is False
    assert event.materialization.metadata["rows/train"].value + event.materialization.metadata["rows/heldout"].value == 40
