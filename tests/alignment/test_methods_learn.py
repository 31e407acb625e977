"""Every method learns a task whose best answer is known, and unlearns it when told the opposite.

A tiny model answers every question with one of four numbers, each as often. One of them is right: a program says so (the
reward), or comparisons do. The same model is base model and SFT checkpoint.
"""

from statistics import mean

import pytest
import torch

from alignment.generation import SamplingSettings, generate
from alignment.likelihood import answer_log_probs
from alignment.methods import METHODS, Training
from alignment.models import LoadSettings, ModelFiles, load_causal_lm, load_tokenizer
from alignment.progress import SILENT
from alignment.records import Conversation, Message, PreferencePair
from alignment.rewards import RewardWeights, Rollout, exact_answer, problem_task
from alignment.training import OptimSettings

ANSWERS = ("17", "42", "58", "93")  # of the model `four_answers`
BEST = "42"
HELLO = Conversation(id="c", messages=(Message(role="user", content="Hi"), Message(role="assistant", content="Hello")))
FLOAT32 = LoadSettings(dtype="float32")


def optim(seed, epochs, learning_rate):
    return OptimSettings(
        seed=seed,
        epochs=epochs,
        learning_rate=learning_rate,
        scheduler="constant",
        warmup_ratio=0.0,
        batch_size=32,
        micro_batch_size=32,
    )


def by_reward(epochs):
    return lambda seed, sign: {
        "rewards": RewardWeights(reward_model=0.0, exact_answer=sign),
        "tasks": "problems",
        "max_new_tokens": 6,
        "beta": 0.01,
        "optim": optim(seed, epochs, 1e-3),
    }


def by_pairs(epochs, learning_rate, **settings):
    return lambda seed, sign: {"optim": optim(seed, epochs, learning_rate), **settings}


def by_steps(steps):
    return lambda seed, sign: {
        "rewards": RewardWeights(reward_model=0.0, exact_answer=sign),
        "tasks": "problems",
        "sampling": SamplingSettings(temperature=1.0, top_k=0, max_new_tokens=6),
        "steps": steps,
        "batch_size": 32,
        "micro_batch_size": 32,
        "learning_rate": 1e-3,
        "critic_learning_rate": 1e-3,
        "critic_start": "sft",
        "kl_coef": 0.05,
        "seed": seed,
    }


# What each method is given for (seed, sign); sign -1 turns the reward around, or the pairs.
SETTINGS = {
    "sl_cai": by_pairs(10, 1e-3, demonstrations=0),
    "dpo": by_pairs(10, 1e-3),
    "kto": by_pairs(10, 1e-3),
    "orpo": by_pairs(6, 1e-3),
    "ppo": by_steps(15),
    "grpo": by_reward(10),
    "rloo": by_reward(20),
}


def question(problem):
    return problem_task(problem).messages[0]["content"]


@pytest.fixture(scope="module")
def data(problems, tmp_path_factory):
    """The folder of data for a sign of the aim: problems and pairs."""
    folders = {}
    for sign in (1, -1):
        folder = folders[sign] = tmp_path_factory.mktemp("data")
        pairs = []
        for p in problems:
            for i, other in enumerate(a for a in ANSWERS if a != BEST):
                chosen, rejected = (BEST, other)[::sign]
                pairs.append(PreferencePair(id=f"{p.id}{i}", prompt=question(p), chosen=chosen, rejected=rejected))
        for name, rows in {
            "pairs": pairs,
            "reward_train": pairs,
            "problems_train": problems,
            "train": [HELLO],
            "heldout": [HELLO],
        }.items():
            (folder / f"{name}.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8")
    return folders


def mean_reward(files, problems):
    """The share of right answers, of eight samples for each question."""
    model, tokenizer = load_causal_lm(files, FLOAT32), load_tokenizer(files.base)
    tasks = [problem_task(p) for p in problems for _ in range(8)]
    settings = SamplingSettings(temperature=1.0, top_k=0, max_new_tokens=6)
    answers = generate(model, tokenizer, [t.messages for t in tasks], settings, seeds=list(range(len(tasks))))
    return mean(exact_answer([Rollout(t, a.text, a.ended) for t, a in zip(tasks, answers, strict=True)]))


def preference(files, problems):
    """The probability of the right answer where one of the four must be given, mean over the questions."""
    model, tokenizer = load_causal_lm(files, FLOAT32), load_tokenizer(files.base)
    asked = [problem_task(p).messages for p in problems for _ in ANSWERS]
    answers = ANSWERS * len(problems)
    log_probs = answer_log_probs(model, tokenizer, asked, answers, batch_size=64, ended=[True] * len(answers))
    of_question = torch.tensor(log_probs).view(len(problems), len(ANSWERS)).softmax(-1)
    return of_question[:, ANSWERS.index(BEST)].mean().item()


# DPO and KTO may make all answers of the pairs less likely, in favour of one that is in none of them.
MEASURE = {"dpo": preference, "kto": preference}


@pytest.fixture(scope="module")
def policy(four_answers, data, tmp_path_factory):
    """Trains by a method's own entry in the table; returns the policy."""

    def run(name, seed, sign):
        method, folder = METHODS[name], tmp_path_factory.mktemp(name)
        for sub in ("work", "out"):
            (folder / sub).mkdir()
        training = Training(
            models=dict.fromkeys(("sft_checkpoint", "base_model", "reward_model"), four_answers),
            folders=dict.fromkeys(method.inputs, data[sign]),
            prompt_tags=(),
            work=folder / "work",
            out=folder / "out",
            log=SILENT,
        )
        config = method.config.model_validate({"load": FLOAT32, "finetuning": "full", **SETTINGS[name](seed, sign)})
        method.train(config, training)
        return ModelFiles(folder / "out" / "model")

    return run


def test_every_method_is_here():
    assert set(SETTINGS) == set(METHODS)


SEEDS = pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])


def test_the_start_gives_every_answer_equally_often(four_answers, problems):
    assert 0.15 < mean_reward(four_answers, problems) < 0.35
    assert 0.2 < preference(four_answers, problems) < 0.3


@SEEDS
@pytest.mark.parametrize("name", METHODS)
def test_it_learns_the_best_answer(policy, problems, name, seed):
    assert MEASURE.get(name, mean_reward)(policy(name, seed, 1), problems) >= 0.9


@SEEDS
@pytest.mark.parametrize("name", METHODS)
def test_told_the_opposite_it_unlearns_it(policy, problems, name, seed):
    assert MEASURE.get(name, mean_reward)(policy(name, seed, -1), problems) <= 0.05
