"""Real trainings of tiny models, made to fail in just the way an alarm watches for, beside healthy ones.

PPO's and GRPO's runs are in the tests of these methods; here are the stages before and after them.
"""

import random
from pathlib import Path

import pytest

import alignment.reward
import alignment.sft
from alignment.alarms import ALARMS, AlarmConfig, sound, watches
from alignment.chat import IGNORE, Example
from alignment.evaluation import Heldout, ReportConfig, SftReportConfig, evaluate_policy, measure_sft
from alignment.generation import SamplingSettings
from alignment.methods.dpo import DpoConfig, train_dpo
from alignment.models import LoraSettings, ModelFiles
from alignment.records import Conversation, Message, PreferencePair, Prompt
from alignment.reward import RewardConfig, train_reward_model
from alignment.sft import NothingToTrain, SftConfig, train_sft
from alignment.training import OptimSettings

BOUNDS = AlarmConfig()
QUESTIONS = [f"question {i}" for i in range(12)]


def fired(asset, metrics, bounds=BOUNDS):
    return {w.name for w in watches(asset) if sound(w, metrics, bounds).fired}


def talks(answer, questions=QUESTIONS):
    return [
        Conversation(id=q, messages=(Message(role="user", content=q), Message(role="assistant", content=answer(i))))
        for i, q in enumerate(questions)
    ]


@pytest.fixture(scope="module")
def sft(tiny_model, float32, tmp_path_factory):
    """Fine-tunes all weights on answers until they are known by heart; returns the metrics and the model."""

    def run(answer, epochs=40, heldout=None, base=tiny_model, max_length=512):
        folder = tmp_path_factory.mktemp("sft")
        (folder / "work").mkdir()
        config = SftConfig(
            finetuning="full",
            load=float32,
            optim=OptimSettings(epochs=epochs, learning_rate=1e-2, batch_size=12, micro_batch_size=12),
            max_length=max_length,
        )
        rows = talks(answer)
        _, metrics = train_sft(config, ModelFiles(base), rows, heldout or rows, work=folder / "work", out=folder)
        return metrics, folder / "model"

    return run


@pytest.fixture(scope="module")
def polite(sft):
    """Answers "yes please"."""
    return sft(lambda i: "yes please")


# --- 1 and 2: SFT -----------------------------------------------------------------------------------------------------


def test_a_healthy_sft_is_silent(polite):
    assert fired("sft_checkpoint", polite[0]) == set()


def relabelled(monkeypatch, change):
    real = alignment.sft.training_examples

    def examples(tokenizer, messages):
        return [Example(made.input_ids, change(made.labels)) for made in real(tokenizer, messages)]

    monkeypatch.setattr(alignment.sft, "training_examples", examples)


def test_rows_without_a_labelled_token_are_an_error(sft, monkeypatch):
    # The one label that is left is on the first token, which nothing predicts.
    relabelled(monkeypatch, lambda labels: [0] + [IGNORE] * (len(labels) - 1))
    with pytest.raises(NothingToTrain, match="no token to train on"):
        sft(lambda i: "yes please")


def test_a_mask_that_is_lost_on_the_way_to_the_loss_is_noticed(sft, monkeypatch):
    def tokenise(tokenizer, conversations, max_length):
        rows, dropped = real(tokenizer, conversations, max_length)
        if conversations[0].id == QUESTIONS[0]:  # the training rows
            rows = [row | {"labels": [0] + [IGNORE] * (len(row["labels"]) - 1)} for row in rows]
        return rows, dropped

    real = alignment.sft._tokenise
    monkeypatch.setattr(alignment.sft, "_tokenise", tokenise)
    metrics, _ = sft(lambda i: "yes please", epochs=2, heldout=talks(lambda i: "yes please", ["held out"]))
    assert "trainable_tokens" in fired("sft_checkpoint", metrics)


def test_a_stop_token_outside_the_loss_is_noticed(sft, monkeypatch):
    relabelled(monkeypatch, lambda labels: [*labels[:-1], IGNORE])
    metrics, _ = sft(lambda i: "yes please")
    assert fired("sft_checkpoint", metrics) == {"eos_is_learnt"}


def test_a_run_that_drops_most_rows_and_one_that_learns_nothing_are_noticed(sft):
    metrics, _ = sft(lambda i: "yes " * (2 if i < 3 else 40), epochs=2, max_length=100)
    assert "rows_dropped" in fired("sft_checkpoint", metrics)
    metrics, _ = sft(lambda i: "aaaa", heldout=talks(lambda i: "zzzz"))
    assert "heldout_loss_falls" in fired("sft_checkpoint", metrics)


# --- 3 and 9: reward models -------------------------------------------------------------------------------------------

WORDS = ["tree", "house", "cat", "dog", "moon", "river", "stone", "bread"]


def answers(rng, word):
    words = rng.choices(WORDS, k=4)
    words.insert(rng.randrange(5), word)
    return " ".join(words)


def pairs(n, good="please", bad="never", shuffled=False):
    rng = random.Random(0)
    made = [PreferencePair(id=f"p{i}", prompt=f"q {i}", chosen=answers(rng, good), rejected=answers(rng, bad)) for i in range(n)]
    if not shuffled:
        return made
    flip = [rng.random() < 0.5 for _ in made]
    return [
        p.model_copy(update={"chosen": p.rejected, "rejected": p.chosen}) if f else p for p, f in zip(made, flip, strict=True)
    ]


@pytest.fixture(scope="module")
def scorer(tiny_model, float32, tmp_path_factory):
    def run(data, finetuning="lora", max_length=512):
        folder = tmp_path_factory.mktemp("scorer")
        for name in ("work", "out"):
            (folder / name).mkdir()
        config = RewardConfig(
            finetuning=finetuning,
            lora=LoraSettings(dropout=0.0, target_modules=["all-linear"]),
            load=float32,
            optim=OptimSettings(epochs=3, learning_rate=3e-3, batch_size=16, micro_batch_size=16),
            max_length=max_length,
        )
        train, heldout = data[: len(data) * 2 // 3], data[len(data) * 2 // 3 :]
        base = ModelFiles(tiny_model)
        _, metrics, _ = train_reward_model(config, base, train, heldout, work=folder / "work", out=folder / "out")
        return metrics, ModelFiles(tiny_model, folder / "out" / "model")

    return run


@pytest.fixture(scope="module")
def likes_please(scorer):
    return scorer(pairs(240))


@pytest.fixture(scope="module")
def likes_never(scorer):
    return scorer(pairs(240, good="never", bad="please"))


def test_a_healthy_reward_model_is_silent(likes_please):
    assert fired("reward_model", likes_please[0]) == set()


def test_a_reward_model_of_random_labels_is_noticed(scorer):
    metrics, _ = scorer(pairs(240, shuffled=True))
    assert fired("reward_model", metrics) == {"better_than_length"}


def test_a_reward_model_that_learnt_only_length_is_noticed(scorer):
    rng = random.Random(1)
    data = [
        PreferencePair(
            id=f"p{i}", prompt=f"q {i}", chosen=" ".join(rng.choices(WORDS, k=9)), rejected=" ".join(rng.choices(WORDS, k=3))
        )
        for i in range(150)
    ]
    metrics, _ = scorer(data)
    assert metrics["heldout/accuracy"] > 0.9
    assert fired("reward_model", metrics) == {"better_than_length"}


def test_a_lost_head_would_be_noticed_even_if_it_were_no_error(scorer, monkeypatch):
    from safetensors.torch import load_file, save_file

    def save(model, tokenizer, folder, *args, **kwargs):
        real(model, tokenizer, folder, *args, **kwargs)
        (weights,) = folder.glob("*.safetensors")
        save_file({k: v for k, v in load_file(weights).items() if "score" not in k}, weights, metadata={"format": "pt"})

    real = alignment.reward.save_model
    monkeypatch.setattr(alignment.reward, "save_model", save)
    monkeypatch.setattr(alignment.reward, "RELOAD_TOLERANCE", float("inf"))
    metrics, _ = scorer(pairs(48), finetuning="full")
    assert "scores_survive_reload" in fired("reward_model", metrics)


def test_pairs_that_are_mostly_too_long_are_noticed(scorer):
    long = [p.model_copy(update={"chosen": p.chosen * 4}) for p in pairs(60)]
    metrics, _ = scorer([*pairs(24), *long, *pairs(42)], max_length=100)
    assert "pairs_dropped" in fired("reward_model", metrics)


# --- 5: DPO -----------------------------------------------------------------------------------------------------------

ALIKE = [
    PreferencePair(id=f"p{i}", prompt=q, chosen=f"the answer is {i} yes", rejected=f"the answer is {i} yet")
    for i, q in enumerate(QUESTIONS)
]


@pytest.fixture(scope="module")
def dpo(sft, float32, tmp_path_factory):
    # The SFT checkpoint already prefers the chosen answers of pairs that differ in a letter: there is little to gain.
    _, start = sft(lambda i: ALIKE[i].chosen)

    def run(**settings):
        folder = tmp_path_factory.mktemp("dpo")
        for name in ("work", "out"):
            (folder / name).mkdir()
        config = DpoConfig(
            lora=LoraSettings(r=8, alpha=16, dropout=0.0, target_modules=["all-linear"]),
            load=float32,
            optim=OptimSettings(
                epochs=20,
                learning_rate=settings.pop("learning_rate"),
                scheduler="constant",
                warmup_ratio=0.0,
                batch_size=12,
                micro_batch_size=12,
            ),
            **settings,
        )
        _, metrics = train_dpo(config, ModelFiles(start), ALIKE, work=folder / "work", out=folder / "out")
        return metrics, ModelFiles(start, folder / "out" / "model"), ModelFiles(start)

    return run


@pytest.fixture(scope="module")
def displaced(dpo):
    return dpo(learning_rate=1e-2)


@pytest.fixture(scope="module")
def anchored(dpo):
    return dpo(learning_rate=3e-3, sft_weight=1.0)


def test_chosen_answers_that_become_unlikely_are_noticed(displaced):
    metrics, _, _ = displaced
    assert metrics["train/rewards_margin_last"] > 0
    assert metrics["train/chosen_reward_last"] < -1
    assert fired("aligned_policy/dpo", metrics) == {"chosen_stays_likely"}


def test_a_healthy_dpo_is_silent(anchored):
    metrics, _, _ = anchored
    assert metrics["train/rewards_margin_last"] > 0.1
    assert fired("aligned_policy/dpo", metrics) == set()


# --- 2, 5, 8, 9: reports ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tiny_model, float32):
    def run(policy, sft, evaluator, reward_model, demonstrations, trained=None, max_new_tokens=40):
        heldout = Heldout(prompts=tuple(Prompt(id=q, prompt=q) for q in QUESTIONS), demonstrations=tuple(demonstrations))
        models = {"sft": sft, "evaluator": evaluator, "reward_model": reward_model, "heldout": heldout}
        sampling = SamplingSettings(temperature=0, max_new_tokens=max_new_tokens)
        settings = SftReportConfig(sampling=sampling, base_examples=0, max_problems=0, load=float32)
        theirs, _, rows = measure_sft(settings, base=ModelFiles(tiny_model), **models)
        metrics, _ = evaluate_policy(ReportConfig(), theirs=theirs, base_rows=rows, policy=policy, **models)
        return metrics | {f"policy/{name}": value for name, value in (trained or {}).items()}

    return run


@pytest.fixture(scope="module")
def rude(sft):
    """Answers "no never"."""
    return ModelFiles(sft(lambda i: "no never")[1])


PLEASE = talks(lambda i: "yes please")


@pytest.fixture(scope="module")
def improved(report, polite, rude, likes_please):
    """A policy that turned polite, by two scorers that like that."""
    return report(ModelFiles(polite[1]), rude, likes_please[1], likes_please[1], PLEASE)


def test_a_healthy_report_is_silent(improved):
    assert improved["evaluator/gain_low"] > 0
    assert improved["eos_rate/policy"] == improved["eos_rate/sft"] == 1
    assert fired("policy_report/ppo", improved) == set()


def test_a_reward_that_only_the_reward_model_sees_is_noticed(report, polite, rude, likes_please, likes_never):
    hacked = report(ModelFiles(polite[1]), rude, likes_never[1], likes_please[1], PLEASE)
    assert hacked["reward_model/gain"] > 0.1
    assert hacked["evaluator/gain"] < 0
    assert fired("policy_report/ppo", hacked) == {"evaluator_agrees"}


def test_answers_that_do_not_end_are_noticed(report, polite, rude, likes_please):
    endless = report(ModelFiles(polite[1]), rude, likes_please[1], likes_please[1], PLEASE, max_new_tokens=4)
    assert endless["eos_rate/policy"] == 0
    assert "answers_end" in fired("policy_report/ppo", endless)


def test_a_gain_that_comes_with_length_is_noticed(report, sft, polite, rude, likes_please):
    wordy = ModelFiles(sft(lambda i: "please please please please")[1])
    metrics = report(wordy, rude, likes_please[1], likes_please[1], PLEASE)
    assert metrics["evaluator/gain"] > 0
    assert "gain_is_not_length" in fired("policy_report/ppo", metrics)


def test_displaced_likelihood_and_worse_perplexity_together_are_noticed(report, displaced, anchored, likes_please):
    demonstrations = talks(lambda i: ALIKE[i].chosen)
    scorers = (likes_please[1], likes_please[1])
    for (trained, policy, start), expected in ((displaced, True), (anchored, False)):
        metrics = report(policy, start, *scorers, demonstrations, trained=trained)
        assert ("likelihood_not_displaced" in fired("policy_report/dpo", metrics)) == expected


def test_every_alarm_of_these_stages_has_a_run_here():
    text = Path(__file__).read_text(encoding="utf-8")
    here = {"sft_checkpoint", "reward_model", "aligned_policy/dpo", "policy_report"}
    for watch in ALARMS.values():
        if here & set(watch.stages):
            assert f'"{watch.name}"' in text
