"""`constitutional_preference_pairs` with a critic behind an endpoint, materialized by Dagster on the tiny recipe and logged to a
real MLflow: the pairs are those that the server's answers make, nothing is paid for twice, and the key is in no file, log or
database that the runs wrote.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
from chat_server import ChatServer, echo

from alignment.handles import Checkpoint, PromptSet, RewardModel
from alignment.records import Prompt
from alignment.tiny_model import build_tiny_model
from assets.constitutional import constitutional_preference_pairs
from resources.artifacts import ArtifactStore
from resources.dvc_data import DvcData
from resources.handle_io import HandleIOManager
from resources.tracking import MlflowTracking

KEY = "sk-recognisable-4711-0815-pipeline"
VARIABLE = "CRITIC_KEY_OF_THIS_TEST"
ASSET = "constitutional_preference_pairs"
PROMPTS = 4
INPUTS = ("sft_checkpoint", "human_reward_model", "prompts")


def config(url: str, *, force: bool = False, model: str = "m") -> dict[str, Any]:
    critic = {"kind": "endpoint", "model": model, "base_url": url, "api_key_env": VARIABLE, "retries": 2}
    return {"ops": {ASSET: {"config": {"candidates": 1, "critic": critic, "force": force}}}}


def upstream(payload: dict[str, Any]) -> Any:
    """Answers, unless asked for the model that is down; then it tells the key, as some servers do."""
    if payload["model"] == "down":
        return 503, {"error": {"message": f"overloaded: {KEY}"}}
    return echo(payload)


def put_inputs(storage: Path) -> None:
    """What comes before the asset: a checkpoint, a reward model and prompts, as artifacts and handles."""
    inputs = [
        Checkpoint(asset="sft_checkpoint", fingerprint="s", mlflow_run_id="r"),
        RewardModel(asset="human_reward_model", fingerprint="h", mlflow_run_id="r"),
        PromptSet(asset="prompts", fingerprint="p", mlflow_run_id="r"),
    ]
    (storage / "handles").mkdir(parents=True)
    for handle in inputs:
        (storage / "handles" / f"{handle.asset}.json").write_text(handle.model_dump_json(), encoding="utf-8")
        folder = storage / "artifacts" / handle.asset / handle.fingerprint
        folder.mkdir(parents=True)
        if handle.asset == "prompts":
            rows = [Prompt(id=f"p{i}", prompt=f"Question {i}", tags=("general",)) for i in range(PROMPTS)]
            (folder / "train.jsonl").write_text("".join(r.model_dump_json() + "\n" for r in rows), encoding="utf-8")
        else:
            build_tiny_model(folder / "model")


def _failed(entry: dg.EventLogEntry) -> bool:
    return entry.dagster_event is not None and entry.dagster_event.is_step_failure


@pytest.fixture(scope="module")
def story(tmp_path_factory, fresh_data, empty_database) -> SimpleNamespace:
    """A run, the same run forced, and a run with another model that is down."""
    root = tmp_path_factory.mktemp("endpoint")
    storage = root / "storage"
    put_inputs(storage)
    shutil.copy(empty_database, storage / "mlflow.db")
    resources = {
        "store": ArtifactStore(root=str(storage / "artifacts")),
        "io_manager": HandleIOManager(root=str(storage / "handles")),
        "dvc": DvcData(root=str(fresh_data)),
        "tracking": MlflowTracking(
            tracking_uri=f"sqlite:///{storage / 'mlflow.db'}",
            artifact_root=str(storage / "mlartifacts"),
            lock_folder=str(storage / "locks"),
        ),
    }
    (root / "dagster").mkdir()
    with (
        pytest.MonkeyPatch.context() as patch,
        ChatServer(upstream, faults=["500", "429", None]) as server,
        dg.DagsterInstance.local_temp(str(root / "dagster")) as instance,
    ):
        patch.setenv(VARIABLE, KEY)
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("ALIGNMENT_STORAGE", str(storage))
        runs = [
            dg.materialize(
                [constitutional_preference_pairs, *(dg.AssetSpec(name).with_io_manager_key("io_manager") for name in INPUTS)],
                partition_key="general",
                resources=resources,
                run_config=run_config,
                instance=instance,
                raise_on_error=False,
            )
            for run_config in (config(server.url), config(server.url, force=True), config(server.url, model="down"))
        ]
        said = "\n".join(
            entry.user_message + (str(entry.dagster_event.step_failure_data.error) if _failed(entry) else "")
            for run in runs
            for entry in instance.all_logs(run.run_id)
        )
    client = resources["tracking"].client()
    experiment = client.get_experiment_by_name("alignment").experiment_id
    found = client.search_runs([experiment], f"tags.`dagster.asset_key` = '{ASSET}'", order_by=["attributes.start_time ASC"])
    (artifact,) = (storage / "artifacts" / ASSET).iterdir()
    return SimpleNamespace(root=root, artifact=artifact, runs=runs, server=server, said=said, mlflow=list(found))


def test_critiques_and_revisions_are_what_the_server_answered(story):
    assert [run.success for run in story.runs] == [True, True, False], story.said[-5000:]
    said = {echo(payload)["choices"][0]["message"]["content"] for payload in story.server.payloads}
    revised = [json.loads(line) for line in (story.artifact / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(revised) == PROMPTS
    for r in revised:
        (only,) = r["revisions"]
        assert {only["critique"], only["revision"]} <= said
        assert r["initial"] not in said  # the sampler is the SFT checkpoint
        assert r["reward_final"] is not None  # and the judge the reward model


def test_a_forced_run_asks_for_nothing_and_gives_the_same_pairs(story):
    asked = [payload for payload in story.server.payloads if payload["model"] == "m"]
    assert len({json.dumps(payload) for payload in asked}) == 2 * PROMPTS
    assert len(asked) == 2 * PROMPTS + 6  # of three different requests two fail once
    replaced = story.root / "storage" / "artifacts" / ".replaced" / ASSET / story.artifact.name
    assert (replaced / "pairs.jsonl").read_bytes() == (story.artifact / "pairs.jsonl").read_bytes()
    assert (replaced / "pairs.jsonl").read_bytes()
    assert "4 of 4 answers of m were already there" in story.said


def test_a_server_that_is_down_fails_the_step_once_with_a_clear_error(story):
    assert [run.info.status for run in story.mlflow] == ["FINISHED", "FINISHED", "FAILED"]
    for place in (story.said, story.mlflow[-1].data.tags["alignment.error"]):
        assert "no answer after 3 attempts, the last: HTTP 503" in place
        assert "Remedy: see to the server" in place


def test_the_key_was_sent_and_is_nowhere_in_what_the_runs_wrote(story):
    assert story.server.keys == {f"Bearer {KEY}"}
    assert KEY not in story.said
    files = [path for path in story.root.rglob("*") if path.is_file()]
    assert {"mlflow.db", "index.db", "rounds.jsonl", "artifact.json"} <= {path.name for path in files}
    assert sum("answers" in path.parts for path in files) >= 2 * PROMPTS
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_mlflow_has_the_name_of_the_variable_and_of_the_model(story):
    params = story.mlflow[0].data.params
    assert (params["critic.api_key_env"], params["critic.model"], params["sampler.kind"]) == (VARIABLE, "m", "local")
