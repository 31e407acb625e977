"""MLflow as the contract wants it: one parent per Dagster run, one child per attempt, whatever dies or runs at once."""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from resources.paths import is_database, mlflow_ui, tracking_uri
from resources.tracking import LEVEL, ROOT_RUN, DataInput, MlflowTracking, StepInfo, flatten

PARAMS = {"optim": {"seed": 0, "learning_rate": 1e-4}, "wide": {f"key{i}": i for i in range(120)}, "long": "x" * 5000}
STEPS = 30


def open_tracking(folder: Path) -> MlflowTracking:
    return MlflowTracking(
        tracking_uri=f"sqlite:///{folder / 'mlflow.db'}",
        artifact_root=str(folder / "mlartifacts"),
        lock_folder=str(folder / "locks"),
    ).process_config_and_initialize()


@pytest.fixture
def tracking(tmp_path: Path, empty_database: Path) -> MlflowTracking:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return open_tracking(tmp_path)


def step(asset: str, retry: int = 0, run: str = "run-1", root: str = "run-1", partition: str | None = None) -> StepInfo:
    return StepInfo(
        run_id=run,
        root_run_id=root,
        job="alignment",
        asset=asset,
        partition=partition,
        retry_number=retry,
        run_url=f"http://127.0.0.1:3000/runs/{run}",
    )


def runs(tracking: MlflowTracking, level: str) -> list[Any]:
    found = tracking.client().search_runs([tracking.experiment_id], order_by=["attributes.start_time ASC"])
    return [run for run in found if run.data.tags["alignment.level"] == level]


def parent(tracking: MlflowTracking) -> Any:
    (run,) = runs(tracking, "run")
    return run


def fail(tracking: MlflowTracking, info: StepInfo) -> None:
    with pytest.raises(ZeroDivisionError), tracking.attempt(info, {}):
        1 / 0  # noqa: B018


def succeed(tracking: MlflowTracking, info: StepInfo) -> str:
    with tracking.attempt(info, {}) as attempt:
        return attempt.run_id


# --- several processes ------------------------------------------------------------------------------------------------


def _log_one_asset(folder: Path, asset: str, barrier: Any) -> None:
    barrier.wait(60)
    info = step(asset, partition="general")
    with open_tracking(folder).attempt(info, {"alignment.fingerprint": f"print of {asset}"}) as attempt:
        attempt.params(PARAMS)
        attempt.inputs([DataInput(asset, f"data/{asset}.jsonl", "0" * 32, 7)])
        for number in range(STEPS):
            attempt.metrics(number, {"loss": 1 / (1 + number), "grad_norm": float(number)})
        attempt.final({"loss": 0.25})
        attempt.tags({"alignment.reused": "false"})


def test_four_processes_on_a_fresh_database_share_one_parent(tmp_path, processes):
    assets = ["base_model", "sft_dataset", "human_preferences", "prompts"]
    barrier = processes.Barrier(len(assets))
    started = [processes.Process(target=_log_one_asset, args=(tmp_path, asset, barrier)) for asset in assets]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0] * len(assets)

    tracking = open_tracking(tmp_path)
    above = parent(tracking)
    assert above.info.status == "FINISHED"
    assert above.info.run_name == "alignment[general]"
    children = {run.data.tags["dagster.asset_key"]: run for run in runs(tracking, "attempt")}
    assert sorted(children) == sorted(assets)
    assert len(runs(tracking, "attempt")) == len(assets)
    flat = {key: str(value) for key, value in flatten(PARAMS).items()}
    for asset, child in children.items():
        assert child.info.status == "FINISHED"
        assert child.info.run_name == f"{asset}[general]"
        assert child.data.params == flat
        expected = {
            "mlflow.parentRunId": above.info.run_id,
            "dagster.run_id": "run-1",
            "dagster.root_run_id": "run-1",
            "dagster.partition": "general",
            "dagster.retry_number": "0",
            "dagster.run_url": "http://127.0.0.1:3000/runs/run-1",
            "alignment.fingerprint": f"print of {asset}",
            "alignment.reused": "false",
        }
        assert expected.items() <= child.data.tags.items()
        assert child.data.metrics["final/loss"] == 0.25
        for name, value in (("loss", lambda n: 1 / (1 + n)), ("grad_norm", float)):
            history = tracking.client().get_metric_history(child.info.run_id, name)
            assert {m.step: m.value for m in history} == {n: value(n) for n in range(STEPS)}
        assert [i.dataset.name for i in child.inputs.dataset_inputs] == [asset]


@pytest.mark.parametrize(("later", "ours_stays"), [(-5, False), (5, True)])
def test_of_two_parents_made_on_two_hosts_at_once_the_older_stays(tracking, monkeypatch, later, ours_stays):
    made = []

    def meanwhile(seconds: float) -> None:
        ours = parent(tracking)
        began, tags = ours.info.start_time + later, {name: ours.data.tags[name] for name in (ROOT_RUN, LEVEL)}
        other = tracking.client().create_run(tracking.experiment_id, start_time=began, tags=tags)
        made.extend([ours.info.run_id, other.info.run_id])

    monkeypatch.setattr(MlflowTracking, "_on_one_host", lambda self: False)
    monkeypatch.setattr("resources.tracking.time", SimpleNamespace(sleep=meanwhile, time=time.time))
    child = succeed(tracking, step("prompts"))
    ours, other = made
    assert tracking.client().get_run(child).data.tags["mlflow.parentRunId"] == (ours if ours_stays else other)
    assert tracking.client().get_run(ours).info.lifecycle_stage == ("active" if ours_stays else "deleted")


def _attempt_and_die(folder: Path, info: StepInfo) -> None:
    with open_tracking(folder).attempt(info, {}) as attempt:
        attempt.metrics(3, {"loss": 0.5})
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_attempt_is_closed_by_its_successor(tracking, tmp_path, processes):
    process = processes.Process(target=_attempt_and_die, args=(tmp_path, step("sft_checkpoint")))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert [run.info.status for run in runs(tracking, "attempt")] == ["RUNNING"]
    with tracking.attempt(step("prompts"), {}):
        # Another asset's attempt says nothing about this one, which may still be alive.
        killed, *_ = runs(tracking, "attempt")
        assert killed.info.status == "RUNNING"
    assert parent(tracking).info.status == "RUNNING"
    with tracking.attempt(step("sft_checkpoint", retry=1), {}):
        by_id = {run.info.run_id: run.info for run in runs(tracking, "attempt")}
        assert by_id[killed.info.run_id].status == "KILLED"
        assert by_id[killed.info.run_id].end_time is not None
        assert parent(tracking).info.status == "RUNNING"
    assert sorted(run.info.status for run in runs(tracking, "attempt")) == ["FINISHED", "FINISHED", "KILLED"]
    assert parent(tracking).info.status == "FINISHED"


def _attempt_and_wait(folder: Path, info: StepInfo, begun: Any, end: Any) -> None:
    with open_tracking(folder).attempt(info, {}):
        begun.set()
        end.wait(120)


def test_an_attempt_of_a_run_that_died_as_a_whole_is_closed_by_the_next_run(tracking, tmp_path, processes):
    succeed(tracking, step("prompts"))
    process = processes.Process(target=_attempt_and_die, args=(tmp_path, step("sft_checkpoint")))
    process.start()
    process.join(60)
    with tracking.attempt(step("sft_checkpoint", run="run-2", root="run-2"), {}):
        by_run = {run.data.tags["dagster.run_id"]: run.info for run in runs(tracking, "run")}
        assert {run: info.status for run, info in by_run.items()} == {"run-1": "FAILED", "run-2": "RUNNING"}
    found = [run.info.status for run in runs(tracking, "attempt") if run.data.tags["dagster.asset_key"] == "sft_checkpoint"]
    assert found == ["KILLED", "FINISHED"]
    assert list((tmp_path / "locks" / "attempts").iterdir()) == []


def test_an_attempt_that_is_alive_in_another_process_is_left_alone(tracking, tmp_path, processes):
    begun, end = processes.Event(), processes.Event()
    process = processes.Process(target=_attempt_and_wait, args=(tmp_path, step("sft_checkpoint"), begun, end))
    process.start()
    assert begun.wait(60)
    for run in ("run-1", "run-2"):  # a re-execution of the same run, and another run
        with tracking.attempt(step("sft_checkpoint", run=f"{run} again", root=run), {}):
            assert next(r.info.status for r in runs(tracking, "attempt")) == "RUNNING"
    end.set()
    process.join(60)
    assert [run.info.status for run in runs(tracking, "attempt")] == ["FINISHED"] * 3
    assert {run.info.status for run in runs(tracking, "run")} == {"FINISHED"}


def test_attempts_at_the_same_asset_in_one_thread_are_both_alive(tracking):
    with tracking.attempt(step("prompts"), {}), tracking.attempt(step("prompts", run="run-2", root="run-2"), {}):
        assert [run.info.status for run in runs(tracking, "attempt")] == ["RUNNING"] * 2
    assert [run.info.status for run in runs(tracking, "attempt")] == ["FINISHED"] * 2


def test_an_attempt_whose_lock_is_not_here_may_be_alive_on_another_machine(tracking, tmp_path, processes):
    process = processes.Process(target=_attempt_and_die, args=(tmp_path, step("sft_checkpoint")))
    process.start()
    process.join(60)
    shutil.rmtree(tmp_path / "locks" / "attempts")
    succeed(tracking, step("sft_checkpoint", run="run-2", root="run-2"))
    assert [run.info.status for run in runs(tracking, "attempt")] == ["RUNNING", "FINISHED"]


# --- statuses ---------------------------------------------------------------------------------------------------------


def test_a_failure_marks_child_and_parent_and_a_later_success_mends_the_parent(tracking):
    succeed(tracking, step("prompts"))
    assert parent(tracking).info.status == "FINISHED"
    fail(tracking, step("base_model"))
    assert parent(tracking).info.status == "FAILED"
    succeed(tracking, step("sft_dataset"))
    assert parent(tracking).info.status == "FAILED"  # another asset's success mends nothing
    fail(tracking, step("base_model", retry=1))
    assert parent(tracking).info.status == "FAILED"
    with tracking.attempt(step("base_model", retry=2), {}):
        assert parent(tracking).info.status == "RUNNING"
    assert parent(tracking).info.status == "FINISHED"
    attempts = [run for run in runs(tracking, "attempt") if run.data.tags["dagster.asset_key"] == "base_model"]
    assert [run.info.status for run in attempts] == ["FAILED", "FAILED", "FINISHED"]
    assert [run.data.tags["dagster.retry_number"] for run in attempts] == ["0", "1", "2"]


def test_the_parent_runs_while_any_child_does(tracking):
    with tracking.attempt(step("evaluator"), {}):
        succeed(tracking, step("prompts"))
        assert parent(tracking).info.status == "RUNNING"
        fail(tracking, step("base_model"))
        assert parent(tracking).info.status == "RUNNING"
    assert parent(tracking).info.status == "FAILED"


def test_an_interrupt_ends_the_attempt_too(tracking):
    with pytest.raises(KeyboardInterrupt), tracking.attempt(step("prompts"), {}):
        raise KeyboardInterrupt
    assert [run.info.status for run in runs(tracking, "attempt")] == ["FAILED"]


def test_a_re_execution_joins_the_parent_of_the_run_it_repeats(tracking):
    fail(tracking, step("base_model"))
    succeed(tracking, step("base_model", run="run-2", root="run-1"))
    above = parent(tracking)
    assert above.info.status == "FINISHED"
    assert above.data.tags["dagster.run_id"] == "run-1"
    children = runs(tracking, "attempt")
    assert [run.data.tags["dagster.run_id"] for run in children] == ["run-1", "run-2"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {above.info.run_id}
    succeed(tracking, step("base_model", run="run-3", root="run-3"))
    assert len(runs(tracking, "run")) == 2


# --- what is logged ---------------------------------------------------------------------------------------------------


def test_data_sets_carry_the_md5_that_dvc_knows_them_by(tracking):
    md5 = "0123456789abcdef0123456789abcdef"
    with tracking.attempt(step("sft_dataset"), {}) as attempt:
        attempt.inputs([DataInput("demonstrations", "data/demonstrations.jsonl", md5, 160)])
        attempt.inputs([])
    (logged,) = runs(tracking, "attempt")[0].inputs.dataset_inputs
    assert (logged.dataset.name, logged.dataset.digest) == ("demonstrations", f"dvc-{md5}")
    assert logged.dataset.source == '{"path": "data/demonstrations.jsonl"}'
    assert logged.dataset.profile == '{"num_rows": 160}'
    assert [(t.key, t.value) for t in logged.tags] == [("mlflow.data.context", "training")]


def test_a_data_set_whose_path_needs_escaping_has_a_source_that_is_json(tracking):
    with tracking.attempt(step("sft_dataset"), {}) as attempt:
        attempt.inputs([DataInput("odd", 'C:\\data\\my "best" rows.jsonl', "0" * 32, 1)])
    (logged,) = runs(tracking, "attempt")[0].inputs.dataset_inputs
    assert json.loads(logged.dataset.source) == {"path": 'C:\\data\\my "best" rows.jsonl'}


def test_files_folders_and_tables_become_artifacts_below_the_artifact_root(tracking, tmp_path):
    model = tmp_path / "made" / "model"
    model.mkdir(parents=True)
    (model / "weights.safetensors").write_bytes(b"\0" * 8)
    picture = tmp_path / "made" / "curve.png"
    picture.write_bytes(b"png")
    with tracking.attempt(step("sft_checkpoint"), {}) as attempt:
        attempt.folder(model, "model")
        attempt.file(picture, "plots")
        attempt.table([{"prompt": "Why?", "sft": "é"}, {"prompt": "How?", "sft": "So."}], "generations")
        attempt.table([], "empty")
    root = tmp_path / "mlartifacts" / attempt.run_id / "artifacts"
    files = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    assert files == ["generations.json", "model/weights.safetensors", "plots/curve.png"]
    table = json.loads((root / "generations.json").read_text(encoding="utf-8"))
    assert table == {"columns": ["prompt", "sft"], "data": [["Why?", "é"], ["How?", "So."]]}
    (run,) = runs(tracking, "attempt")
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "generations.json", "type": "table"}]


def test_no_run_is_ever_active_globally(tracking):
    import mlflow

    with tracking.attempt(step("evaluator"), {}), tracking.attempt(step("prompts"), {}) as inner:
        assert mlflow.active_run() is None
        inner.metrics(1, {"loss": 1.0})
    outer, inner_run = (
        next(run for run in runs(tracking, "attempt") if run.data.tags["dagster.asset_key"] == asset)
        for asset in ("evaluator", "prompts")
    )
    assert outer.data.metrics == {}
    assert inner_run.data.metrics == {"loss": 1.0}


@pytest.mark.parametrize("root", ["", "s3://bucket/folder"])
def test_artifacts_go_where_they_are_told_beside_any_database(tmp_path, empty_database, root):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    tracking = MlflowTracking(
        tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}",
        artifact_root=root or str(tmp_path / "here"),
        lock_folder=str(tmp_path / "locks"),
    ).process_config_and_initialize()
    location = tracking.client().get_experiment(tracking.experiment_id).artifact_location
    assert location == (root or (tmp_path / "here").as_uri())


@pytest.mark.parametrize(
    ("uri", "database"),
    [
        ("sqlite:////tmp/mlflow.db", True),
        ("postgresql+psycopg2://user@host/mlflow", True),
        ("mysql+pymysql://user@host/mlflow", True),
        ("http://host:5000", False),
        ("https://host/mlflow", False),
        ("databricks", False),
    ],
)
def test_a_database_needs_a_server_of_ours_and_a_server_does_not(uri, database, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.delenv("MLFLOW_UI_URL", raising=False)
    assert is_database(tracking_uri()) == database
    assert mlflow_ui(own="http://here:1") == ("http://here:1" if database else uri)
    monkeypatch.setenv("MLFLOW_UI_URL", "http://seen-from-outside")
    assert mlflow_ui() == "http://seen-from-outside"


@pytest.mark.parametrize("variable", ["MLFLOW_TRACKING_URI", "MLFLOW_UI_URL"])
def test_the_address_that_is_shown_has_no_password(variable, monkeypatch):
    monkeypatch.delenv("MLFLOW_UI_URL", raising=False)
    monkeypatch.setenv(variable, "https://someone:p@ss@host:8080/mlflow")
    assert mlflow_ui() == "https://host:8080/mlflow"


def test_flatten_joins_keys_and_keeps_lists():
    assert flatten({"a": {"b": {"c": 1}}, "d": [1, 2], "e": {}}) == {"a.b.c": 1, "d": [1, 2]}


# --- the registry -----------------------------------------------------------------------------------------------------


@pytest.fixture
def policies(tracking: MlflowTracking, tmp_path: Path) -> Iterator[list[str]]:
    """Two runs, each with a `model/` artifact."""
    ids = []
    for number in range(2):
        model = tmp_path / f"policy{number}"
        model.mkdir()
        (model / "adapter_model.safetensors").write_bytes(bytes([number]))
        with tracking.attempt(replace(step("aligned_policy/dpo"), retry_number=number), {}) as attempt:
            attempt.folder(model, "model")
        ids.append(attempt.run_id)
    return ids


def register(
    tracking: MlflowTracking,
    run_id: str,
    fingerprint: str,
    *,
    promoted: bool,
    of: str = "general",
    decision: str | None = None,
    **where: Any,
) -> str:
    """A decision of its own unless one is named."""
    decision = decision or f"{'yes' if promoted else 'no'} {fingerprint}"
    where = {"model": Path("unused"), "attempt": "unused", **where}
    version, _ = tracking.register(of, run_id, fingerprint, decision=decision, promoted=promoted, description="dpo", **where)
    return version


def aliases(tracking: MlflowTracking, of: str = "general") -> dict[str, str]:
    return {k: str(v) for k, v in tracking.client().get_registered_model(f"aligned-policy-{of}").aliases.items()}


def test_promotion_moves_the_champion_and_refusal_leaves_it(tracking, policies):
    assert register(tracking, policies[0], "one", promoted=False) == "1"
    assert aliases(tracking) == {"challenger": "1"}
    assert register(tracking, policies[0], "one", promoted=True) == "1"
    assert aliases(tracking) == {"challenger": "1", "champion": "1"}
    assert register(tracking, policies[1], "two", promoted=False) == "2"
    assert aliases(tracking) == {"challenger": "2", "champion": "1"}
    assert register(tracking, policies[1], "two", promoted=True) == "2"
    assert aliases(tracking) == {"challenger": "2", "champion": "2"}


def test_registering_again_adds_no_version(tracking, policies):
    for _ in range(3):
        register(tracking, policies[0], "one", promoted=True)
    (version,) = tracking.client().search_model_versions("name = 'aligned-policy-general'")
    assert version.run_id == policies[0]
    assert version.source == f"runs:/{policies[0]}/model"
    assert version.tags["alignment.fingerprint"] == "one"
    assert version.description == "dpo"


def test_an_alias_moved_back_by_hand_stays_until_there_is_a_new_decision(tracking, policies):
    register(tracking, policies[0], "one", promoted=True, decision="first")
    register(tracking, policies[1], "two", promoted=True, decision="second")
    tracking.client().set_registered_model_alias("aligned-policy-general", "champion", "1")
    # The decision is reused, as in a weekly run that finds nothing new.
    assert register(tracking, policies[1], "two", promoted=True, decision="second") == "2"
    assert aliases(tracking) == {"challenger": "2", "champion": "1"}
    register(tracking, policies[1], "two", promoted=True, decision="third")
    assert aliases(tracking) == {"challenger": "2", "champion": "2"}


def test_a_decision_that_comes_back_after_another_is_carried_out_again(tracking, policies):
    register(tracking, policies[0], "one", promoted=True, decision="first")
    register(tracking, policies[1], "two", promoted=True, decision="second")
    # Somebody put the data back as they were.
    register(tracking, policies[0], "one", promoted=True, decision="first")
    assert aliases(tracking) == {"challenger": "1", "champion": "1"}


def test_the_last_decision_is_carried_out_again_on_request(tracking, policies):
    register(tracking, policies[0], "one", promoted=True, decision="first")
    register(tracking, policies[1], "two", promoted=True, decision="second")
    tracking.client().set_registered_model_alias("aligned-policy-general", "champion", "1")
    register(tracking, policies[1], "two", promoted=True, decision="second", again=True)
    assert aliases(tracking) == {"challenger": "2", "champion": "2"}


def test_what_a_kill_left_undone_is_done(tracking, policies, monkeypatch):
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(tracking.client()), "set_registered_model_alias", killed)
        with pytest.raises(KeyboardInterrupt):
            register(tracking, policies[0], "one", promoted=True, decision="first")
    assert aliases(tracking) == {}
    assert register(tracking, policies[0], "one", promoted=True, decision="first") == "1"
    assert aliases(tracking) == {"challenger": "1", "champion": "1"}


def test_the_aliases_that_a_version_has_now_are_told(tracking, policies):
    told = [
        tracking.register(
            "general", policies[n], str(n), decision=str(n), promoted=n == 0, description="", model=Path(), attempt=""
        )
        for n in range(2)
    ]
    assert told == [("1", ["challenger", "champion"]), ("2", ["challenger"])]


def test_a_policy_that_this_server_does_not_know_is_logged_to_the_run_that_registers_it(tracking, policies, tmp_path):
    import mlflow

    (tmp_path / "new").mkdir()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    here = succeed(tracking, step("champion"))
    register(tracking, "0" * 32, "one", promoted=True, model=tmp_path / "policy1", attempt=here)
    version = client.get_model_version_by_alias("aligned-policy-general", "champion")
    assert version.run_id == here
    folder = mlflow.artifacts.download_artifacts(
        version.source, tracking_uri=tracking.tracking_uri, dst_path=str(tmp_path / "new")
    )
    assert (Path(folder) / "adapter_model.safetensors").read_bytes() == b"\1"


def test_the_registered_version_leads_to_the_models_files(tracking, policies, tmp_path):
    import mlflow

    register(tracking, policies[1], "two", promoted=True)
    version = tracking.client().get_model_version_by_alias("aligned-policy-general", "champion")
    folder = mlflow.artifacts.download_artifacts(
        run_id=version.run_id, artifact_path="model", tracking_uri=tracking.tracking_uri, dst_path=str(tmp_path)
    )
    assert (Path(folder) / "adapter_model.safetensors").read_bytes() == b"\1"


def test_constitutions_have_registered_models_of_their_own(tracking, policies):
    register(tracking, policies[0], "one", promoted=True, of="general")
    assert register(tracking, policies[1], "two", promoted=False, of="medical") == "1"
    assert aliases(tracking, "general") == {"challenger": "1", "champion": "1"}
    assert aliases(tracking, "medical") == {"challenger": "1"}


def test_a_second_experiment_name_is_kept_apart(tracking, tmp_path):
    succeed(tracking, step("prompts"))
    other = MlflowTracking(
        tracking_uri=tracking.tracking_uri,
        artifact_root=tracking.artifact_root,
        lock_folder=tracking.lock_folder,
        experiment="other",
    )
    begun = time.time()
    succeed(other, step("prompts"))
    assert len(runs(tracking, "run")) == len(runs(other, "run")) == 1
    assert runs(other, "run")[0].info.start_time >= begun * 1000 - 1000
