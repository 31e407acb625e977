"""A sixth constitution, one YAML and no Python, through real runs on the tiny recipe: its pairs, a policy trained on them,
`make cai-demo`, and a backfill as the UI launches it.
"""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import dagster as dg
import pytest

pytestmark = pytest.mark.slow  # several whole runs
PROJECT = Path(__file__).parents[2]
TEMPLATE = PROJECT / "docs" / "constitution_template.yaml"
SHARED = ["base_model", "sft_dataset", "human_preferences", "prompts", "sft_checkpoint", "human_reward_model"]
PAIRS = "constitutional_preference_pairs"
TRAINED = ["reward_model", "aligned_policy/dpo"]
QUESTIONS = [f"How do I {verb} {food}?" for verb in ("cook", "store", "season") for food in ("rice", "mussels", "lentils")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Constitutions of somebody's own: those that are shipped, and the template as `cooking`."""
    folder = tmp_path_factory.mktemp("mine") / "constitutions"
    shutil.copytree(PROJECT / "conf" / "constitutions", folder)
    shutil.copy(TEMPLATE, folder / "cooking.yaml")
    return folder


@pytest.fixture(scope="module")
def config(folder):
    """Prompts with the new tag beside the shipped ones."""
    path = folder.parent / "cooking.jsonl"
    rows = [{"id": f"cooking-{i}", "prompt": text, "tags": ["cooking", "benign"]} for i, text in enumerate(QUESTIONS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"ops": {"prompts": {"config": {"prompts": ["data/prompts.jsonl", str(path)]}}}}


@pytest.fixture(scope="module")
def run(new_sandbox, folder, config):
    sandbox = new_sandbox("own_constitution", ALIGNMENT_CONSTITUTIONS=str(folder))
    sandbox.start_in_process([*SHARED, PAIRS, "ai_feedback", *TRAINED], config, "cooking").finish()
    (pairs,) = sandbox.artifacts(PAIRS)
    return SimpleNamespace(sandbox=sandbox, pairs=pairs)


def record(folder):
    return json.loads((folder / "artifact.json").read_text(encoding="utf-8"))


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_its_pairs_are_made_from_its_prompts_under_its_principles(run):
    done = rows(run.pairs / "rounds.jsonl")
    assert done
    assert {row["prompt"] for row in done} <= set(QUESTIONS)
    principles = {one["principle"] for row in done for one in row["revisions"]}
    assert principles <= {"food_safety", "doable", "asks_about_allergies", "honest"}
    assert {pair["domain"] for pair in rows(run.pairs / "pairs.jsonl")} == {"cooking"}
    assert record(run.pairs)["handle"]["partition"] == "cooking"


def test_what_was_trained_on_the_pairs_names_their_version(run):
    (data,) = record(run.pairs)["handle"]["generated"]
    assert (run.sandbox.data / data["pointer"]).exists()
    assert data["pointer"].startswith(f"generated/{PAIRS}/cooking/")
    assert data["rows"] == len(rows(run.pairs / "pairs.jsonl"))
    for asset in TRAINED:
        (attempt,) = run.sandbox.mlflow_runs({"dagster.asset_key": asset})
        generated = [i.dataset.digest for i in attempt.inputs.dataset_inputs if "generated/" in i.dataset.source]
        assert generated == [f"dvc-{data['md5']}"]


def test_the_version_comes_back_after_storage_was_lost(run):
    from dvc.cli import main

    (data,) = record(run.pairs)["handle"]["generated"]
    pointer = run.sandbox.data / data["pointer"]
    shutil.rmtree(pointer.with_suffix(""))
    assert main(["--cd", str(run.sandbox.data), "checkout", data["pointer"]]) == 0
    for name in ("pairs.jsonl", "rounds.jsonl"):
        assert (pointer.with_suffix("") / name).read_bytes() == (run.pairs / name).read_bytes()


# --- make cai-demo ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(run, folder):
    path = folder.parent / "mine.txt"
    path.write_text("How do I boil an egg?\n\nIs raw | milk safe?\n", encoding="utf-8")
    command = ["--constitution", "cooking", "--prompts", str(path)]
    output = run.sandbox.start_cai_demo(command, command).finish()
    _, first, again = output.split("critique and revise: recipe tiny, constitution cooking\n")
    (artifact,) = run.sandbox.artifacts("revised_examples")
    return SimpleNamespace(first=first, again=again, artifact=artifact)


def test_the_demo_trains_nothing_anew(demo):
    for asset in set(SHARED) - {"prompts"}:
        assert f"reusing {asset} " in demo.first
    assert "reusing revised_examples " not in demo.first
    assert "reusing revised_examples " in demo.again


def test_the_demo_shows_initial_and_revised_side_by_side_also_when_it_is_reused(demo):
    for output in (demo.first, demo.again):
        shown = output[output.index("1. How do I boil an egg?") :]
        assert shown.index("2. Is raw | milk safe?") > 0
        titles = [line.split() for line in shown.splitlines() if line.startswith("initial")]
        assert titles == [["initial", "|", "revised"]] * 2
    table = lambda text: text[text.index("1. How do I boil") :]  # noqa: E731
    assert table(demo.first) == table(demo.again)


def test_the_demos_table_is_in_mlflow_and_in_the_artifact(demo, run):
    attempts = run.sandbox.mlflow_runs({"dagster.asset_key": "revised_examples"})
    path = run.sandbox.storage / "mlartifacts" / attempts[0].info.run_id / "artifacts" / "revisions.json"
    table = json.loads(path.read_text())
    logged = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["prompt"] for row in logged] == ["How do I boil an egg?", "Is raw | milk safe?"]
    assert logged == rows(demo.artifact / "revisions.jsonl")
    assert f"runs/{attempts[0].info.run_id}, artifact revisions.json" in demo.again
    for row, done in zip(logged, rows(demo.artifact / "rounds.jsonl"), strict=True):
        assert (row["initial"], row["revised"]) == (done["initial"], done["final"])
        assert row["principles"] == ", ".join(one["principle"] for one in done["revisions"])


# --- a backfill -------------------------------------------------------------------------------------------------------

# What the UI asks for when somebody materializes an asset for some of its partitions.
BACKFILL = """
mutation {
  launchPartitionBackfill(backfillParams: {
    assetSelection: [{path: ["constitutional_preference_pairs"]}], partitionNames: ["coding", "tutor"]
  }) {
    __typename
    ... on LaunchBackfillSuccess { backfillId }
    ... on PythonError { message }
  }
}
"""


@pytest.mark.usefixtures("demo")
def test_a_backfill_of_the_ui_makes_the_pairs_of_several_constitutions(run):
    tool = lambda name: str(Path(sys.executable).with_name(name))  # noqa: E731
    workspace = ["-w", str(PROJECT / "workspace.yaml")]
    asked = run.sandbox.start_command(tool("dagster-graphql"), *workspace, "--text", BACKFILL).finish()
    assert "LaunchBackfillSuccess" in asked
    daemon = run.sandbox.start_command(tool("dagster-daemon"), "run", *workspace)
    try:
        with run.sandbox.instance() as instance:
            (backfill,) = instance.get_backfills()
            status = wait_for_backfill(instance, backfill.backfill_id, daemon)
            made = instance.get_materialized_partitions(dg.AssetKey(PAIRS))
    finally:
        daemon.process.terminate()
        daemon.process.wait(30)
    assert status == "COMPLETED_SUCCESS", daemon.text()[-6000:]
    assert made == {"coding", "cooking", "tutor"}
    assert {record(path)["handle"]["partition"] for path in run.sandbox.artifacts(PAIRS)} == made
    assert {p.name for p in (run.sandbox.data / "generated" / PAIRS).iterdir()} >= made


def wait_for_backfill(instance, backfill_id, daemon, seconds=400):
    import time

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        status = instance.get_backfill(backfill_id).status.value
        if status not in {"REQUESTED", "COMPLETING", "CANCELING", "FAILING"}:
            return status
        assert daemon.process.poll() is None, daemon.text()[-6000:]
        time.sleep(0.5)
    raise AssertionError(daemon.text()[-6000:])
