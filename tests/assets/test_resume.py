"""`kill -9` in the middle of training: the step resumes from its last checkpoint and ends where an undisturbed one ends.

SFT: its process alone is killed, and Dagster retries the step in the same run. DPO: everything is killed at once, as when
the power fails, and a new run finds what was left.
"""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import psutil
import pytest

ASSETS = [
    "base_model",
    "sft_dataset",
    "human_preferences",
    "prompts",
    "sft_checkpoint",
    "human_reward_model",
    "constitutional_preference_pairs",
    "aligned_policy/dpo",
]
CONFIG = {
    "ops": {
        "sft_checkpoint": {"config": {"optim": {"epochs": 0.5, "save_every": 2}}},
        "aligned_policy__dpo": {"config": {"optim": {"epochs": 12, "save_every": 2}}},
    }
}


def wait_for(what: Callable[[], Any], job: Any, seconds: float = 600) -> Any:
    """Poll until `what` returns something; fail at once if the job has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        assert job.process.poll() is None, job.text()[-6000:]
        time.sleep(0.05)
    raise AssertionError(job.text()[-6000:])


def complete_checkpoint(sandbox: Any, asset: str, at_least: int) -> Callable[[], int]:
    """The newest complete trainer checkpoint of an asset at work, if it is not too early."""

    def look() -> int:
        marks = (sandbox.storage / "artifacts" / ".work" / asset).glob("*/trainer/checkpoint-*/complete")
        newest = max((int(mark.parent.name.split("-")[1]) for mark in marks), default=0)
        return newest if newest >= at_least else 0

    return look


def worker(sandbox: Any, step: str, job: Any) -> psutil.Process:
    """The process that executes a step, as Dagster records it."""
    with sandbox.instance() as instance:
        (run,) = instance.get_runs()
        entries = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_WORKER_STARTED)
        pids = [entry.dagster_event.pid for entry in entries if entry.dagster_event.step_key == step]
    process = psutil.Process(pids[-1])
    assert process in psutil.Process(job.process.pid).children(recursive=True)
    return process


def kill_everything(job: Any) -> None:
    driver = psutil.Process(job.process.pid)
    processes = [driver, *driver.children(recursive=True)]
    for process in processes:
        process.kill()
    job.process.wait(30)
    assert not psutil.wait_procs(processes, timeout=30)[1]


@pytest.fixture(scope="module")
def story(new_sandbox) -> SimpleNamespace:
    """An undisturbed run in one process, and beside it one with a process a step that is killed twice and started anew."""
    calm, disturbed = new_sandbox("calm"), new_sandbox("disturbed")
    undisturbed = calm.start_in_process(ASSETS, CONFIG, "general")  # where the steps run decides nothing
    first = disturbed.start_assets(ASSETS, CONFIG)
    try:
        sft_at = wait_for(complete_checkpoint(disturbed, "sft_checkpoint", 6), first)
        os.kill(worker(disturbed, "sft_checkpoint", first).pid, signal.SIGKILL)
        dpo_at = wait_for(complete_checkpoint(disturbed, "aligned_policy/dpo", 6), first)
        kill_everything(first)
        second = disturbed.start_assets(ASSETS, CONFIG)
        second.finish()
        undisturbed.finish()
    finally:
        for job in (undisturbed, first):
            if job.process.poll() is None:
                job.process.kill()
    return SimpleNamespace(calm=calm, disturbed=disturbed, first=first.text(), second=second.text(), sft_at=sft_at, dpo_at=dpo_at)


def published(sandbox: Any, asset: str) -> tuple[Path, dict[str, Any]]:
    (folder,) = sandbox.artifacts(asset)
    return folder, json.loads((folder / "artifact.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("asset", ["sft_checkpoint", "aligned_policy/dpo"])
def test_final_metrics_and_weights_are_those_of_an_undisturbed_run(story, asset):
    from safetensors.torch import load_file

    (calm_folder, calm), (folder, disturbed) = published(story.calm, asset), published(story.disturbed, asset)
    assert folder.name == calm_folder.name
    assert disturbed["handle"]["metrics"] == pytest.approx(calm["handle"]["metrics"], abs=1e-4, rel=0)
    ours, theirs = (load_file(f / "model" / "adapter_model.safetensors") for f in (folder, calm_folder))
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-4


def test_the_killed_sft_step_was_retried_in_the_same_run_from_its_checkpoint(story):
    assert "sft_checkpoint" in story.first
    assert re.search(r"resuming sft_checkpoint \w{12} from what an interrupted step left", story.first)
    (step, total) = map(int, re.search(r"SFT: resumed at step (\d+)/(\d+)", story.first).groups())
    assert story.sft_at <= step < total
    with story.disturbed.instance() as instance:
        first = instance.get_run_records(ascending=True)[0].dagster_run
        steps = {stat.step_key: stat for stat in instance.get_run_step_stats(first.run_id)}
    assert steps["sft_checkpoint"].attempts == 2


def test_mlflow_knows_the_killed_attempt_and_the_one_that_finished(story):
    attempts = story.disturbed.mlflow_runs({"dagster.asset_key": "sft_checkpoint"})
    assert [run.info.status for run in attempts] == ["KILLED", "FINISHED", "FINISHED"]
    assert [run.data.tags["dagster.retry_number"] for run in attempts] == ["0", "1", "0"]
    assert [run.data.tags.get("alignment.reused") for run in attempts] == [None, "false", "true"]
    assert len({run.data.tags["mlflow.parentRunId"] for run in attempts[:2]}) == 1


def test_after_everything_was_killed_the_next_run_resumes_and_reuses(story):
    assert re.search(r"resuming aligned_policy/dpo \w{12} from what an interrupted step left", story.second)
    (step, total) = map(int, re.search(r"DPO: resumed at step (\d+)/(\d+)", story.second).groups())
    assert story.dpo_at <= step < total
    for asset in set(ASSETS) - {"aligned_policy/dpo"}:
        assert re.search(rf" - reusing {asset} ", story.second)
    last = story.disturbed.mlflow_runs({"dagster.asset_key": "aligned_policy/dpo"})[-1]
    assert (last.info.status, last.data.tags["alignment.reused"]) == ("FINISHED", "false")


def test_no_attempt_of_the_dead_run_is_left_running(story):
    attempts = story.disturbed.mlflow_runs({"dagster.asset_key": "aligned_policy/dpo"})
    assert [run.info.status for run in attempts] == ["KILLED", "FINISHED"]


def test_nothing_of_the_interrupted_work_is_left(story):
    work = story.disturbed.storage / "artifacts" / ".work"
    assert [path for path in work.rglob("*") if path.is_file()] == []


def test_the_undisturbed_run_resumed_nothing(story):
    (output,) = story.calm.folder.glob("output_*.log")
    assert "resum" not in output.read_text(encoding="utf-8", errors="replace")
