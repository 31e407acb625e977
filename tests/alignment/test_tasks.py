"""Tasks of reinforcement learning: whose prompts, which problems, how many, in which order."""

import pytest

from alignment.methods.tasks import training_tasks
from alignment.records import Problem, Prompt
from alignment.rewards import ASK_FOR_ANSWER
from alignment.sft import NothingToTrain


@pytest.fixture
def folder(tmp_path):
    prompts = [Prompt(id=f"p{i}", prompt=f"prompt {i}", tags=("code",) if i % 2 else ("general", "harmful")) for i in range(10)]
    problems = [Problem(id=f"q{i}", prompt=f"problem {i}", answer=str(i)) for i in range(4)]
    for name, rows in (("train", prompts), ("problems_train", problems)):
        (tmp_path / f"{name}.jsonl").write_text("".join(r.model_dump_json() + "\n" for r in rows), encoding="utf-8")
    return tmp_path


def asked(tasks):
    return sorted((t.messages[0]["content"].split("\n")[0], t.answer) for t in tasks)


def test_prompts_are_those_of_the_constitution(folder):
    even = [(f"prompt {i}", None) for i in range(0, 10, 2)]
    assert asked(training_tasks(folder, "prompts", ["harmful", "other"], 0, seed=0)) == even
    assert len(training_tasks(folder, "prompts", ["code", "general"], 0, seed=0)) == 10


def test_problems_carry_their_answer_and_say_how_to_give_it(folder):
    tasks = training_tasks(folder, "problems", [], 0, seed=0)
    assert asked(tasks) == [(f"problem {i}", str(i)) for i in range(4)]
    assert all(t.messages[0]["content"].endswith(ASK_FOR_ANSWER) for t in tasks)


def test_both_are_mixed_in_a_seeded_order_and_cut(folder):
    tasks = training_tasks(folder, "both", ["code"], 0, seed=0)
    assert len(tasks) == 9
    assert tasks == training_tasks(folder, "both", ["code"], 0, seed=0) != training_tasks(folder, "both", ["code"], 0, seed=1)
    assert training_tasks(folder, "both", ["code"], 5, seed=0) == tasks[:5]
    assert {t.answer is None for t in tasks[:5]} == {True, False}
    assert len(training_tasks(folder, "both", ["code"], 99, seed=0)) == 9


def test_without_problems_both_are_the_prompts(folder):
    (folder / "problems_train.jsonl").write_text("")
    assert training_tasks(folder, "both", ["code"], 0, seed=0) == training_tasks(folder, "prompts", ["code"], 0, seed=0)


def test_no_task_is_said(folder):
    with pytest.raises(NothingToTrain, match=r"tasks: prompts: there is none .*tags medical.*Remedy: .* prompts\.prompts"):
        training_tasks(folder, "prompts", ["medical"], 0, seed=0)
    (folder / "problems_train.jsonl").write_text("")
    with pytest.raises(
        NothingToTrain, match=r"tasks: problems: there is none among the training problems\. .* prompts\.problems"
    ):
        training_tasks(folder, "problems", ["medical"], 0, seed=0)
    with pytest.raises(NothingToTrain, match=r"tasks: both: .*tags medical\) and problems\. Remedy: .*prompts\.problems"):
        training_tasks(folder, "both", ["medical"], 0, seed=0)
