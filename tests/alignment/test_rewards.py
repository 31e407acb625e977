"""Rewards: which answer a text states, which form it has, what each is worth, and what the sum is; all by hand."""

import math

import pytest

from alignment.errors import UserError
from alignment.models import ModelFiles, load_reward_model, load_tokenizer
from alignment.records import Problem, Prompt
from alignment.reward import score
from alignment.rewards import (
    RewardWeights,
    Rollout,
    Task,
    answer_format,
    chat_task,
    exact_answer,
    model_reward,
    problem_task,
    reward_functions,
    stated_answer,
    total_rewards,
)

CHAT = Task(({"role": "user", "content": "How are you?"},))


def asked(answer):
    return Task(({"role": "user", "content": "How many?"},), answer)


# --- The stated answer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: 42", "42"),
        ("2 * 21 = 42\nanswer : 42", "42"),
        ("Answer:\n42", "42"),
        ("The answer is: 42", "42"),
        ("Answer: 42.", "42"),
        ("Answer: **42**", "42"),
        ("Answer: **42**.", "42"),
        ("Answer: ** 42 ** .", "42"),
        ("Answer: **42.**", "42"),
        ("**Answer:** 42", "42"),
        ("**Answer: 42**", "42"),
        ("Answer: `42`", "42"),
        ("Answer: $42$", "42"),
        ("Answer: $1,234.50", "1234.50"),
        ("Answer: 1,234", "1234"),
        ("Answer: 1,234,567", "1234567"),
        ("Answer: 1,2", "1,2"),
        ("Answer: -7", "-7"),
        ("Answer: .5", ".5"),
        ("Answer: Yes!", "yes"),
        ("Answer: Thursday, 3 May", "thursday, 3 may"),
        ("Answer: 42 km", "42 km"),
        ("Answer: 41\nNo, that is wrong.\nAnswer: 42", "42"),
        ("Answer: 42\nThat is 6 times 7.", "42"),
        ("Answer: 42, and so on to 99", "42, and so on to 99"),
    ],
)
def test_what_follows_the_last_answer_is_stated(text, answer):
    assert stated_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("That makes 42.", "42"),
        ("6 times 7 is 42 km.", "42"),
        ("That makes 42, which is all of them.", "42"),
        ("The sum is 1,234, not 1,233, as I said: 1,234.", "1234"),
        ("3 - 10 = -7", "-7"),
        ("It weighs 1,234.5 kg", "1234.5"),
        ("I do not know.", None),
        ("Answer:", None),
        ("", None),
    ],
)
def test_without_one_the_last_number_is(text, answer):
    assert stated_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "known", "reward"),
    [
        ("Answer: 42", "42", 1.0),
        ("Answer: 1,234", "1234", 1.0),
        ("Answer: 1234", "1,234", 1.0),
        ("Answer: **Thursday**.", "Thursday", 1.0),
        ("Answer: 42 km", "42 km", 1.0),
        ("Answer: 42 km", "42", 0.0),
        ("So it is 42", "42", 1.0),
        ("Answer: 421", "42", 0.0),
        ("Answer: 7", "-7", 0.0),
        ("Answer: 42\nAnswer: 43", "42", 0.0),
        ("I do not know.", "42", 0.0),
        ("", "42", 0.0),
    ],
)
def test_the_right_answer_earns_1_and_every_other_text_0(text, known, reward):
    assert exact_answer([Rollout(asked(known), text)]) == [reward]


# --- The form ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("Answer: 42", 1.0),
        ("6 times 7\n  answer: 42  \n\n", 1.0),
        ("Answer: wrong, but as it was asked for", 1.0),
        ("Answer: 42\nI hope that helps.", 0.0),
        ("Answer: 41\nAnswer: 42", 0.0),
        ("So the answer: 42", 0.0),
        ("**Answer:** 42", 0.0),
        ("Answer:", 0.0),
        ("42", 0.0),
        ("", 0.0),
    ],
)
def test_one_closing_line_that_states_the_answer_earns_1(text, reward):
    assert answer_format([Rollout(asked("42"), text)]) == [reward]


def test_neither_applies_where_no_answer_is_known():
    for function in (exact_answer, answer_format):
        chat, problem = function([Rollout(CHAT, "Answer: 42"), Rollout(asked("42"), "Answer: 42")])
        assert math.isnan(chat)
        assert problem == 1


# --- The sum ----------------------------------------------------------------------------------------------------------


def lengths(rollouts):
    """Stands for a reward model."""
    return [float(len(r.completion)) for r in rollouts]


def test_the_total_is_the_weighted_sum_of_what_applies():
    weights = RewardWeights(reward_model=-0.5, exact_answer=2.0, answer_format=0.25)
    rollouts = [
        Rollout(asked("42"), "Answer: 42"),  # 10 characters
        Rollout(asked("42"), "It is 42"),
        Rollout(asked("42"), "Answer: 7"),
        Rollout(asked("42"), "no"),
        Rollout(CHAT, "Answer: 42"),
    ]
    totals, values = total_rewards(reward_functions(weights, lengths), rollouts)
    assert totals == [-5 + 2 + 0.25, -4 + 2, -4.5 + 0.25, -1.0, -5.0]
    assert values["reward_model"] == [10, 8, 9, 2, 10]
    assert values["exact_answer"][:4] == [1, 1, 0, 0]
    assert values["answer_format"][:4] == [1, 0, 1, 0]
    assert math.isnan(values["exact_answer"][4])
    assert math.isnan(values["answer_format"][4])


def test_only_what_has_a_weight_is_asked():
    functions = reward_functions(RewardWeights(reward_model=0.0, exact_answer=3.0), None)
    assert functions == {"exact_answer": (3.0, exact_answer)}
    assert total_rewards(functions, [Rollout(asked("42"), "42"), Rollout(asked("42"), "43")])[0] == [3.0, 0.0]
    assert reward_functions(RewardWeights(), lengths) == {"reward_model": (1.0, lengths)}


def test_rewards_that_cannot_be_are_refused():
    with pytest.raises(UserError, match=r"rewards: every weight is 0.*Remedy"):
        reward_functions(RewardWeights(reward_model=0.0), lengths)
    with pytest.raises(UserError, match=r"rewards\.reward_model: there is no reward model here.*Remedy"):
        reward_functions(RewardWeights(), None)
    functions = reward_functions(RewardWeights(reward_model=0.0, exact_answer=1.0, answer_format=1.0), None)
    with pytest.raises(UserError, match=r"none of exact_answer, answer_format applies to the prompt 'How are you\?'.*Remedy"):
        total_rewards(functions, [Rollout(asked("42"), "42"), Rollout(CHAT, "42")])


def test_a_reward_models_reward_is_its_score_of_the_finished_conversation(tiny_model, float32):
    tokenizer = load_tokenizer(tiny_model)
    model = load_reward_model(ModelFiles(tiny_model), float32, tokenizer=tokenizer)
    rewards = model_reward(model, tokenizer, 2)([Rollout(CHAT, "Fine."), Rollout(asked("42"), "42"), Rollout(CHAT, "")])
    finished = [("How are you?", "Fine."), ("How many?", "42"), ("How are you?", " ")]
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in finished]
    assert rewards == pytest.approx(score(model, tokenizer, turns, 1), abs=1e-5)
    assert len(set(rewards)) == 3


# --- The tasks --------------------------------------------------------------------------------------------------------


def test_a_problem_says_how_to_end_and_a_prompt_is_asked_as_it_is():
    task = problem_task(Problem(id="p", prompt="What is 6 times 7?", answer="42"))
    (turn,) = task.messages
    assert turn["role"] == "user"
    assert turn["content"].startswith("What is 6 times 7?\n")
    assert turn["content"].endswith("end with a line of the form: Answer: <answer>")
    assert task.answer == "42"
    assert chat_task(Prompt(id="q", prompt="How are you?")) == CHAT
