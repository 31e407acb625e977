"""The artifact store: whole or not at all, one builder, resumable after a kill, broken artifacts found."""

import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from alignment.handles import Checkpoint, PromptSet, RewardModel
from resources import artifacts
from resources.artifacts import ArtifactRecord, ArtifactStore, CorruptArtifact, Work, file_hashes

DIGEST = "ab" * 32


def open_store(folder: Path) -> ArtifactStore:
    return ArtifactStore(root=str(folder)).process_config_and_initialize()


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return open_store(tmp_path)


def record(work: Work, handle: Any = None) -> ArtifactRecord:
    handle = handle or PromptSet(asset="prompts", fingerprint=DIGEST, mlflow_run_id="r1", metrics={"rows": 2.0})
    return ArtifactRecord(
        handle=handle.model_dump(mode="json"),
        config={"seed": 0},
        code_version="1",
        inputs={},
        files=file_hashes(work.out),
        versions={"python": "3"},
        git_commit=None,
        dvc_md5=None,
        mlflow_run_id=handle.mlflow_run_id,
        dagster_run_id="d1",
        seconds=0.1,
        peak_memory_gb=0.1,
    )


def publish(store: ArtifactStore, asset: str = "prompts", handle: Any = None) -> Path:
    with store.building(asset, DIGEST) as work:
        (work.out / "part").mkdir()
        (work.out / "part" / "train.jsonl").write_text("one\n")
        (work.out / "heldout.jsonl").write_text("two\n")
        work.publish(record(work, handle))
    return Path(store.root) / asset / DIGEST


def test_what_was_published_is_found_again(store):
    assert store.find("prompts", DIGEST) is None
    folder = publish(store)
    handle = store.find("prompts", DIGEST)
    assert handle == PromptSet(asset="prompts", fingerprint=DIGEST, mlflow_run_id="r1", metrics={"rows": 2.0})
    assert store.path(handle) == folder
    assert sorted(p.name for p in folder.iterdir()) == ["artifact.json", "heldout.jsonl", "part"]
    assert sorted(store.record("prompts", DIGEST).files) == ["heldout.jsonl", "part/train.jsonl"]
    assert store.find("prompts", "cd" * 32) is None
    assert store.find("other", DIGEST) is None


def test_a_reader_sees_nothing_until_the_rename_and_everything_after_it(store, monkeypatch):
    seen: dict[str, Any] = {}
    rename = os.rename

    def spy(source, target):
        reader = open_store(Path(store.root))
        seen["before"] = reader.find("prompts", DIGEST)
        # What is renamed is already complete: record and every file it lists.
        complete = ArtifactRecord.model_validate_json((Path(source) / "artifact.json").read_text())
        seen["complete"] = complete.files == {k: v for k, v in file_hashes(source).items() if k != "artifact.json"}
        rename(source, target)
        seen["after"] = reader.find("prompts", DIGEST)

    monkeypatch.setattr(artifacts.os, "rename", spy)
    publish(store)
    assert seen["before"] is None
    assert seen["complete"]
    assert seen["after"].fingerprint == DIGEST


def test_a_published_artifact_leaves_no_work_folder_and_is_not_built_again(store):
    publish(store)
    assert [p for p in (Path(store.root) / ".work").rglob("*") if p.is_file()] == []
    with store.building("prompts", DIGEST) as work:
        assert work is None


def test_a_failed_build_publishes_nothing(store):
    with pytest.raises(ZeroDivisionError), store.building("prompts", DIGEST) as work:
        (work.out / "train.jsonl").write_text("half")
        1 / 0  # noqa: B018
    assert store.find("prompts", DIGEST) is None
    with store.building("prompts", DIGEST) as work:
        assert list(work.out.iterdir()) == []


def _build_and_die(root: Path) -> None:
    with open_store(root).building("prompts", DIGEST) as work:
        (work.folder / "checkpoint").write_text("half way")
        (work.out / "train.jsonl").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_after_kill_9_the_work_folder_is_kept_and_half_written_output_is_not(store, processes):
    process = processes.Process(target=_build_and_die, args=(Path(store.root),))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert store.find("prompts", DIGEST) is None
    with store.building("prompts", DIGEST) as work:
        assert work.resumed
        assert (work.folder / "checkpoint").read_text() == "half way"
        assert list(work.out.iterdir()) == []
        work.publish(record(work))
    assert store.find("prompts", DIGEST) is not None
    assert not work.folder.exists()


def test_a_first_build_is_not_called_resumed(store):
    with store.building("prompts", DIGEST) as work:
        assert not work.resumed


def _build(root: Path, barrier: Any, results: Any) -> None:
    store = open_store(root)
    barrier.wait(60)
    with store.building("prompts", DIGEST) as work:
        if work is None:
            results.put("reused")
        else:
            time.sleep(0.5)
            (work.out / "train.jsonl").write_text(str(os.getpid()))
            work.publish(record(work))
            results.put("built")


def test_of_several_processes_one_builds_and_the_others_reuse(store, processes):
    barrier, results = processes.Barrier(3), processes.Queue()
    started = [processes.Process(target=_build, args=(Path(store.root), barrier, results)) for _ in range(3)]
    for process in started:
        process.start()
    assert sorted(results.get(timeout=200) for _ in started) == ["built", "reused", "reused"]
    for process in started:
        process.join(60)
    assert store.find("prompts", DIGEST) is not None


def _take_over(root: Path, results: Any) -> None:
    with open_store(root).building("prompts", DIGEST) as work:
        results.put((work.resumed, (work.folder / "checkpoint").read_text()))
        work.publish(record(work))


def test_who_waits_for_a_builder_that_is_killed_takes_over_from_its_checkpoint(store, processes):
    results, root = processes.Queue(), Path(store.root)
    with store.building("prompts", DIGEST) as work:
        waiting = processes.Process(target=_take_over, args=(root, results))
        waiting.start()
        (work.folder / "checkpoint").write_text("half way")
        time.sleep(0.5)
        assert results.empty()
    assert results.get(timeout=200) == (True, "half way")
    waiting.join(60)
    assert store.find("prompts", DIGEST) is not None


def test_other_artifacts_are_built_meanwhile(store):
    with store.building("prompts", DIGEST), store.building("sft_dataset", DIGEST) as other:
        assert other is not None


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: (f / "heldout.jsonl").unlink(), "heldout.jsonl"),
        (lambda f: (f / "heldout.jsonl").write_text("shorter"), "heldout.jsonl"),
        (lambda f: (f / "part" / "train.jsonl").unlink(), "train.jsonl"),
        (lambda f: (f / "artifact.json").unlink(), "artifact.json"),
        (lambda f: (f / "artifact.json").write_text("{"), "artifact.json"),
        (lambda f: (f / "artifact.json").write_bytes(b"\xff"), "artifact.json"),
        (lambda f: (f / "artifact.json").write_text("{}"), "artifact.json"),
    ],
    ids=["missing", "truncated", "missing in a folder", "no record", "broken record", "not text", "empty record"],
)
def test_a_damaged_artifact_is_refused_with_file_and_remedy(store, damage, named):
    folder = publish(store)
    damage(folder)
    with pytest.raises(CorruptArtifact) as caught:
        store.find("prompts", DIGEST)
    assert named in str(caught.value)
    assert f"Remedy: delete {folder} and materialize prompts again" in str(caught.value)


def test_a_record_whose_handle_cannot_be_read_is_a_corrupt_artifact(store):
    folder = publish(store)
    text = (folder / "artifact.json").read_text().replace('"prompt_set"', '"kind_of_an_older_version"')
    (folder / "artifact.json").write_text(text)
    with pytest.raises(CorruptArtifact, match="Remedy"):
        store.find("prompts", DIGEST)


def test_a_metric_that_is_not_a_number_can_be_read_back(store):
    handle = PromptSet(asset="prompts", fingerprint=DIGEST, mlflow_run_id="r1", metrics={"perplexity": math.nan})
    publish(store, handle=handle)
    assert math.isnan(store.find("prompts", DIGEST).metrics["perplexity"])


def test_discard_moves_the_artifact_aside_whole(store):
    folder = publish(store)
    files = file_hashes(folder)
    store.discard("prompts", DIGEST, asked_by="run")
    assert store.find("prompts", DIGEST) is None
    assert file_hashes(Path(store.root) / ".replaced" / "prompts" / DIGEST) == files
    publish(store)
    store.discard("prompts", DIGEST, asked_by="second run")  # a second time replaces what the first put aside
    assert store.find("prompts", DIGEST) is None
    store.discard("prompts", DIGEST, asked_by="third run")  # nothing there: nothing to do
    assert file_hashes(Path(store.root) / ".replaced" / "prompts" / DIGEST) == files


def test_discard_drops_what_a_killed_step_left_so_that_force_starts_from_zero(store):
    with pytest.raises(ZeroDivisionError), store.building("prompts", DIGEST) as work:
        (work.folder / "checkpoint").write_text("half way")
        1 / 0  # noqa: B018
    store.discard("prompts", DIGEST, asked_by="run")
    with store.building("prompts", DIGEST) as work:
        assert not work.resumed


def test_the_same_run_discards_once_so_that_a_retry_resumes_and_keeps_what_was_published(store):
    publish(store)
    said = []
    for attempt in range(2):
        store.discard("prompts", DIGEST, asked_by="run", say=said.append)
        with pytest.raises(ZeroDivisionError), store.building("prompts", DIGEST) as work:
            assert work.resumed == (attempt == 1)
            1 / 0  # noqa: B018
    publish(store)
    store.discard("prompts", DIGEST, asked_by="run", say=said.append)  # publishing was not the step's last act
    assert store.find("prompts", DIGEST) is not None
    assert said == ["force: computing prompts anew"]
    store.discard("prompts", DIGEST, asked_by="another run", say=said.append)
    assert store.find("prompts", DIGEST) is None


def _discard(root: Path, begun: Any) -> None:
    store = open_store(root)
    begun.set()
    store.discard("prompts", DIGEST, asked_by="run")


def test_discard_does_not_pull_the_work_folder_from_under_another_process(store, processes):
    begun = processes.Event()
    with store.building("prompts", DIGEST) as work:
        process = processes.Process(target=_discard, args=(Path(store.root), begun))
        process.start()
        assert begun.wait(200)
        process.join(0.5)
        assert process.exitcode is None  # it waits
        (work.out / "train.jsonl").write_text("one")
        work.publish(record(work))
    process.join(60)
    assert process.exitcode == 0
    assert store.find("prompts", DIGEST) is None


def test_model_files_of_full_models_adapters_and_reward_models(store, tmp_path):
    base = Checkpoint(asset="base_model", fingerprint="b" * 64, mlflow_run_id="r")
    adapter = Checkpoint(asset="sft_checkpoint", fingerprint="c" * 64, mlflow_run_id="r", adapter_of=base)
    scorer = RewardModel(asset="reward_model", fingerprint="d" * 64, mlflow_run_id="r", adapter_of=base)
    full = tmp_path.resolve() / "base_model" / ("b" * 64) / "model"
    assert (store.model_files(base).base, store.model_files(base).adapter) == (full, None)
    assert store.model_files(adapter).base == store.model_files(scorer).base == full
    assert store.model_files(adapter).adapter == tmp_path.resolve() / "sft_checkpoint" / ("c" * 64) / "model"
    assert store.model_files(scorer).adapter == tmp_path.resolve() / "reward_model" / ("d" * 64) / "model"
