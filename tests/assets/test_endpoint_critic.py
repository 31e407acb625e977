"""`constitutional_preference_pairs` with a critic behind an endpoint, as `make demo` would run it: the pairs are those that the
server's answers make, nothing is paid for twice, and the key is in no file, log or database that the runs wrote.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chat_server import ChatServer, echo

KEY = "sk-recognisable-4711-0815-pipeline"
VARIABLE = "CRITIC_KEY_OF_THIS_TEST"
ASSETS = [
    "base_model",
    "sft_dataset",
    "human_preferences",
    "prompts",
    "sft_checkpoint",
    "human_reward_model",
    "constitutional_preference_pairs",
]
PROMPTS = 5


def config(url: str, *, force: bool = False, **changes: Any) -> dict[str, Any]:
    critic = {"kind": "endpoint", "model": "m", "base_url": url, "api_key_env": VARIABLE, "retries": 2, **changes}
    pairs = {"max_prompts": PROMPTS, "candidates": 1, "critic": critic, "force": force}
    return {"ops": {"constitutional_preference_pairs": {"config": pairs}}}


def upstream(payload: dict[str, Any]) -> Any:
    """Answers, unless asked for the model that is down; then it tells the key, as some servers do."""
    if payload["model"] == "down":
        return 503, {"error": {"message": f"overloaded: {KEY}"}}
    return echo(payload)


@pytest.fixture(scope="module")
def story(new_sandbox) -> SimpleNamespace:
    """A run, the same run forced, and a run with another model that is down."""
    sandbox = new_sandbox("endpoint")
    with pytest.MonkeyPatch.context() as patch, ChatServer(upstream, faults=["500", "429", None]) as server:
        patch.setenv(VARIABLE, KEY)
        patch.setenv("NO_PROXY", "127.0.0.1")
        runs = [config(server.url), config(server.url, force=True), config(server.url, model="down")]
        job = sandbox.start_assets(ASSETS, *runs)
        try:
            code = job.process.wait(1700)
        finally:
            job.process.kill()
        return SimpleNamespace(sandbox=sandbox, said=job.text(), code=code, server=server)


def rounds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]


def test_critiques_and_revisions_are_what_the_server_answered(story):
    (folder,) = story.sandbox.artifacts("constitutional_preference_pairs")
    assert story.said.count("critique and revise") >= 2, story.said[-6000:]
    said = {echo(payload)["choices"][0]["message"]["content"] for payload in story.server.payloads}
    revised = rounds(folder)
    assert len(revised) == PROMPTS
    for r in revised:
        (only,) = r["revisions"]
        assert {only["critique"], only["revision"]} <= said
        assert r["initial"] not in said  # the sampler is the SFT checkpoint
        assert r["reward_final"] != r["reward_initial"]  # and the judge the reward model


def test_a_forced_run_asks_for_nothing_and_gives_the_same_pairs(story):
    asked = [payload for payload in story.server.payloads if payload["model"] == "m"]
    assert len({json.dumps(payload) for payload in asked}) == 2 * PROMPTS
    assert len(asked) == 2 * PROMPTS + story.server.failed["500"] + story.server.failed["429"]
    (folder,) = story.sandbox.artifacts("constitutional_preference_pairs")
    (replaced,) = (story.sandbox.storage / "artifacts" / ".replaced" / "constitutional_preference_pairs").glob("*")
    assert replaced.name == folder.name
    for name in ("pairs.jsonl", "rounds.jsonl"):
        mine, theirs = (f / name for f in (folder, replaced))
        assert mine.read_bytes() == theirs.read_bytes()
    assert "were already there" in story.said


def test_a_server_that_is_down_fails_the_step_once_with_a_clear_error(story):
    assert story.code == 1
    assert "no answer after 3 attempts, the last: HTTP 503" in story.said
    assert "Remedy: see to the server" in story.said
    attempts = story.sandbox.mlflow_runs({"dagster.asset_key": "constitutional_preference_pairs"})
    assert [run.info.status for run in attempts] == ["FINISHED", "FINISHED", "FAILED"]
    assert "HTTP 503" in attempts[-1].data.tags["alignment.error"]


def test_the_key_was_sent_and_is_nowhere_in_what_the_runs_wrote(story):
    assert story.server.keys == {f"Bearer {KEY}"}
    files = [path for path in story.sandbox.folder.rglob("*") if path.is_file()]
    assert any(path.name == "mlflow.db" for path in files)
    assert any("answers" in path.parts for path in files)
    assert {".log", ".db", ".jsonl", ".json"} <= {path.suffix for path in files}
    found = [path for path in files if KEY.encode() in path.read_bytes() or KEY[3:].encode() in path.read_bytes()]
    assert found == []


def test_mlflow_has_the_name_of_the_variable_and_of_the_model(story):
    run = story.sandbox.mlflow_runs({"dagster.asset_key": "constitutional_preference_pairs"})[0]
    assert run.data.params["critic.api_key_env"] == VARIABLE
    assert run.data.params["critic.model"] == "m"
    assert run.data.params["sampler.kind"] == "local"
