"""Progress: what is said and when, and that only a checkpoint that was written to its end is resumed from."""

import math

import pytest

import alignment.progress
from alignment.progress import COMPLETE, SILENT, Log, Progress, last_complete_checkpoint, trainer_callback


def checkpoint(folder, step, complete=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text("{}")
    if complete:
        (path / COMPLETE).touch()
    return path


def test_without_checkpoints_there_is_nothing_to_resume_from(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "not there") is None


def test_the_newest_complete_checkpoint_counts_steps_as_numbers(tmp_path):
    for step in (9, 100, 20):
        checkpoint(tmp_path, step)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def test_a_checkpoint_that_a_kill_cut_short_is_ignored(tmp_path):
    checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 20, complete=False)
    (tmp_path / "runs").mkdir()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / COMPLETE).unlink()
    assert last_complete_checkpoint(tmp_path) is None


def test_the_trainer_marks_a_checkpoint_after_all_its_files(tmp_path):
    from transformers import TrainerControl, TrainerState, TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    checkpoint(tmp_path, 5, complete=False)
    trainer_callback(SILENT, "SFT").on_save(args, TrainerState(global_step=5), TrainerControl())
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-5"


def test_the_trainers_log_becomes_metrics_and_a_sentence(tmp_path):
    from transformers import TrainerControl, TrainerState, TrainingArguments

    metrics, said = [], []
    callback = trainer_callback(Log(metrics=lambda s, v: metrics.append((s, dict(v))), say=said.append), "SFT")
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    state, control = TrainerState(global_step=0, max_steps=8), TrainerControl()
    callback.on_train_begin(args, state, control)
    state.global_step = 2
    callback.on_log(args, state, control, logs={"loss": 1.25, "grad_norm": math.nan, "note": "x", "train_runtime": 3.0})
    assert metrics == [(2, {"loss": 1.25})]
    assert said[0] == "SFT: 8 steps"
    assert said[1].startswith("SFT: step 2/8, loss 1.2500, ETA ")


def test_a_resumed_training_says_so(tmp_path):
    from transformers import TrainerControl, TrainerState, TrainingArguments

    said = []
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    callback = trainer_callback(Log(say=said.append), "DPO")
    callback.on_train_begin(args, TrainerState(global_step=4, max_steps=8), TrainerControl())
    assert said == ["DPO: resumed at step 4/8"]


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(alignment.progress.time, "monotonic", lambda: now[0])
    return now


def test_progress_is_said_at_most_so_often_and_at_the_end(clock):
    said = []
    progress = Progress(Log(say=said.append), "sampling", total=10, every=5.0)
    for _ in range(10):
        clock[0] += 2
        progress.advance(1)
    assert said == ["sampling 3/10, ETA 14 s", "sampling 6/10, ETA 8 s", "sampling 9/10, ETA 2 s", "sampling 10/10, ETA 0 s"]


def test_progress_may_carry_a_detail(clock):
    said = []
    Progress(Log(say=said.append), "revising", total=4).advance(4, "3 changed")
    assert said == ["revising 4/4, 3 changed, ETA 0 s"]
