"""Real trainings of tiny models, made to fail in just the way an alarm watches for, beside healthy ones.

AI feedback's runs are in tests/alignment/test_ai_feedback.py.
"""

import random
from types import SimpleNamespace

import pytest
import test_ai_feedback  # noqa: F401 - its runs count, too
import torch
from alarm_runs import HEALTHY, SHOWN, shows

import alignment.reward
import alignment.sft
from alignment.alarms import ALARMS
from alignment.chat import IGNORE, Example
from alignment.datasets import write_jsonl
from alignment.evaluation import Heldout, ReportConfig, SftReportConfig, evaluate_policy, measure_sft
from alignment.generation import SamplingSettings
from alignment.leakage import leakage
from alignment.methods import METHODS
from alignment.methods.dpo import DpoConfig, train_dpo
from alignment.methods.grpo import train_grpo
from alignment.methods.kto import train_kto
from alignment.methods.orpo import train_orpo
from alignment.methods.ppo import PpoConfig, train_ppo
from alignment.methods.rloo import train_rloo
from alignment.methods.roles import LanguageRole
from alignment.methods.sl_cai import SlCaiConfig, train_sl_cai
from alignment.models import LoraSettings, ModelFiles
from alignment.progress import SILENT
from alignment.records import Conversation, Message, PreferencePair, Prompt
from alignment.reward import RewardConfig, train_reward_model
from alignment.rewards import RewardWeights, Task, problem_task
from alignment.sft import NothingToTrain, SftConfig, train_sft
from alignment.training import OptimSettings
from resources.tracking import flatten

QUESTIONS = [f"question {i}" for i in range(12)]
CONSTANT = {"scheduler": "constant", "warmup_ratio": 0.0}
GROUPS = ("aligned_policy/grpo", "aligned_policy/rloo")
PAIRS = ("aligned_policy/dpo", "aligned_policy/kto", "aligned_policy/orpo")


def talks(answer, questions=QUESTIONS):
    return [
        Conversation(id=q, messages=(Message(role="user", content=q), Message(role="assistant", content=answer(i))))
        for i, q in enumerate(questions)
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Makes the folders that a training works in and writes to."""

    def make():
        folder = tmp_path_factory.mktemp("run")
        for name in ("work", "out"):
            (folder / name).mkdir()
        return {"work": folder / "work", "out": folder / "out"}

    return make


PLEASE = talks(lambda i: "yes please")
HELD_OUT = talks(lambda i: "yes please", ["held out"])


@pytest.fixture(scope="module")
def sft(tiny_model, float32, folders):
    """Fine-tunes all weights on answers until they are known by heart; returns the metrics and the model."""

    def run(answer, epochs=40, heldout=None, max_length=512):
        places = folders()
        config = SftConfig(
            finetuning="full",
            load=float32,
            optim=OptimSettings(epochs=epochs, learning_rate=1e-2, batch_size=12, micro_batch_size=12),
            max_length=max_length,
        )
        rows = talks(answer)
        _, metrics = train_sft(config, ModelFiles(tiny_model), rows, heldout or rows, **places)
        return metrics, places["out"] / "model"

    return run


@pytest.fixture(scope="module")
def polite(sft):
    """Answers "yes please"."""
    return sft(lambda i: "yes please")


# --- 1 and 2: SFT -----------------------------------------------------------------------------------------------------


@shows(of="sft_checkpoint")
def test_a_healthy_sft_is_silent(polite):
    return polite[0]


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


@pytest.fixture
def lost_mask(monkeypatch):
    """Training rows lose all labels but one on the first token, which nothing predicts, on the way to the loss."""

    def tokenise(tokenizer, conversations, max_length):
        rows, dropped = real(tokenizer, conversations, max_length)
        if conversations != HELD_OUT:
            rows = [row | {"labels": [0] + [IGNORE] * (len(row["labels"]) - 1)} for row in rows]
        return rows, dropped

    real = alignment.sft._tokenise
    monkeypatch.setattr(alignment.sft, "_tokenise", tokenise)


@shows("trainable_tokens", of="sft_checkpoint", among_others=True)
def test_a_mask_that_is_lost_on_the_way_to_the_loss_is_noticed(sft, lost_mask):
    metrics, _ = sft(lambda i: "yes please", epochs=2, heldout=HELD_OUT)
    return metrics


@shows("eos_is_learnt", of="sft_checkpoint")
def test_a_stop_token_outside_the_loss_is_noticed(sft, monkeypatch):
    relabelled(monkeypatch, lambda labels: [*labels[:-1], IGNORE])
    metrics, _ = sft(lambda i: "yes please")
    return metrics


@shows("rows_dropped", of="sft_checkpoint", among_others=True)
def test_a_run_that_drops_most_rows_is_noticed(sft):
    metrics, _ = sft(lambda i: "yes " * (2 if i < 3 else 40), epochs=2, max_length=100)
    return metrics


@shows("heldout_loss_falls", of="sft_checkpoint", among_others=True)
def test_a_run_that_learns_nothing_of_use_is_noticed(sft):
    metrics, _ = sft(lambda i: "aaaa", heldout=talks(lambda i: "zzzz"))
    return metrics


@pytest.fixture(scope="module")
def sl_cai(float32, folders):
    """Fine-tunes all weights on revisions; returns the metrics."""

    def run(start, revision, heldout, max_length=512):
        optim = OptimSettings(epochs=1, learning_rate=1e-4, batch_size=12, micro_batch_size=12, **CONSTANT)
        config = SlCaiConfig(finetuning="full", load=float32, demonstrations=0, optim=optim, max_length=max_length)
        pairs = [PreferencePair(id=q, prompt=q, chosen=revision(i), rejected="no never") for i, q in enumerate(QUESTIONS)]
        return train_sl_cai(config, ModelFiles(start), pairs, [], heldout, **folders())[1]

    return run


@shows(of="aligned_policy/sl_cai")
def test_a_healthy_sl_cai_is_silent(sl_cai, polite):
    return sl_cai(polite[1], lambda i: f"yes please {i}", PLEASE)


@shows("trainable_tokens", "rows_dropped", "eos_is_learnt", of="aligned_policy/sl_cai")
def test_revisions_that_are_mostly_too_long_and_of_which_nothing_is_learnt_are_noticed(sl_cai, tiny_model, lost_mask):
    return sl_cai(tiny_model, lambda i: "yes " * (2 if i < 3 else 40), HELD_OUT, max_length=100)


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
def scorer(tiny_model, float32, folders):
    def run(data, finetuning="lora", max_length=512):
        places = folders()
        config = RewardConfig(
            finetuning=finetuning,
            lora=LoraSettings(dropout=0.0, target_modules=["all-linear"]),
            load=float32,
            optim=OptimSettings(epochs=3, learning_rate=3e-3, batch_size=16, micro_batch_size=16),
            max_length=max_length,
        )
        train, heldout = data[: len(data) * 2 // 3], data[len(data) * 2 // 3 :]
        _, metrics, _ = train_reward_model(config, ModelFiles(tiny_model), train, heldout, **places)
        return metrics, ModelFiles(tiny_model, places["out"] / "model")

    return run


@pytest.fixture(scope="module")
def likes_please(scorer):
    return scorer(pairs(240))


@pytest.fixture(scope="module")
def likes_never(scorer):
    return scorer(pairs(240, good="never", bad="please"))


@shows(of="reward_model")
def test_a_healthy_reward_model_is_silent(likes_please):
    return likes_please[0]


@shows("better_than_length", of="reward_model")
def test_a_reward_model_of_random_labels_is_noticed(scorer):
    metrics, _ = scorer(pairs(240, shuffled=True))
    return metrics


@shows("better_than_length", of="reward_model")
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
    return metrics


@shows("scores_survive_reload", of="reward_model", among_others=True)
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
    return metrics


@shows("pairs_dropped", of="reward_model", among_others=True)
def test_pairs_that_are_mostly_too_long_are_noticed(scorer):
    long = [p.model_copy(update={"chosen": p.chosen * 4}) for p in pairs(60)]
    metrics, _ = scorer([*pairs(24), *long, *pairs(42)], max_length=100)
    return metrics


# --- 1 and 5: DPO, KTO, ORPO ------------------------------------------------------------------------------------------

ALIKE = [
    PreferencePair(id=f"p{i}", prompt=q, chosen=f"the answer is {i} yes", rejected=f"the answer is {i} yet")
    for i, q in enumerate(QUESTIONS)
]


@pytest.fixture(scope="module")
def dpo(sft, float32, folders):
    # The SFT checkpoint already prefers the chosen answers of pairs that differ in a letter: there is little to gain.
    _, start = sft(lambda i: ALIKE[i].chosen)

    def run(**settings):
        places = folders()
        config = DpoConfig(
            lora=LoraSettings(r=8, alpha=16, dropout=0.0, target_modules=["all-linear"]),
            load=float32,
            optim=OptimSettings(
                epochs=20,
                learning_rate=settings.pop("learning_rate"),
                batch_size=12,
                micro_batch_size=12,
                **CONSTANT,
            ),
            **settings,
        )
        _, metrics = train_dpo(config, ModelFiles(start), ALIKE, **places)
        return metrics, ModelFiles(start, places["out"] / "model"), ModelFiles(start)

    return run


@pytest.fixture(scope="module")
def displaced(dpo):
    return dpo(learning_rate=1e-2)


@pytest.fixture(scope="module")
def anchored(dpo):
    return dpo(learning_rate=3e-3, sft_weight=1.0)


@shows("chosen_stays_likely", of="aligned_policy/dpo")
def test_chosen_answers_that_become_unlikely_are_noticed(displaced):
    metrics, _, _ = displaced
    assert metrics["train/rewards_margin_last"] > 0
    assert metrics["train/chosen_reward_last"] < -1
    return metrics


@shows(of="aligned_policy/dpo")
def test_a_healthy_dpo_is_silent(anchored):
    metrics, _, _ = anchored
    assert metrics["train/rewards_margin_last"] > 0.1
    return metrics


@pytest.fixture(scope="module")
def on_pairs(tiny_model, float32, folders):
    """One epoch of a method that learns from pairs; returns the metrics."""

    def run(asset, pairs):
        name = asset.split("/")[1]
        optim = OptimSettings(epochs=1, learning_rate=1e-4, batch_size=4, micro_batch_size=4, **CONSTANT)
        config = METHODS[name].config(load=float32, optim=optim, max_length=200)
        train = {"dpo": train_dpo, "kto": train_kto, "orpo": train_orpo}[name]
        return train(config, ModelFiles(tiny_model), pairs, **folders())[1]

    return run


@shows(of=("aligned_policy/kto", "aligned_policy/orpo"))
def test_pairs_that_fit_are_silent(on_pairs, asset):
    return on_pairs(asset, ALIKE)


@shows("pairs_dropped", of=PAIRS)
def test_pairs_whose_prompts_mostly_leave_no_room_for_an_answer_are_noticed(on_pairs, asset):
    return on_pairs(asset, [*ALIKE[:4], *(p.model_copy(update={"prompt": "x" * 300}) for p in ALIKE[4:])])


# --- 6: PPO -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks(problems):
    """All with the same answer, which the policy gives in a quarter of the cases."""
    return [problem_task(p) for p in problems]


TOO_LONG = Task(({"role": "user", "content": "x" * 300},), "42")
RIGHT = RewardWeights(reward_model=0.0, exact_answer=1.0)


@pytest.fixture(scope="module")
def ppo(four_answers, tasks, float32, folders):
    """Trains all weights for a few steps; returns the metrics."""

    def run(of=tasks, max_new_tokens=6, **settings):
        given = {
            "steps": 2,
            "batch_size": 16,
            "micro_batch_size": 16,
            "learning_rate": 1e-3,
            "critic_learning_rate": 1e-3,
            "scheduler": "constant",
            "rewards": RIGHT,
            "sampling": SamplingSettings(temperature=0.7, top_k=0, max_new_tokens=max_new_tokens),
            "critic_start": "sft",
            "finetuning": "full",
            "load": float32,
        }
        return train_ppo(PpoConfig(**given | settings), four_answers, None, of, **folders())[1]

    return run


@shows(of="aligned_policy/ppo")
def test_a_healthy_ppo_is_silent(ppo):
    metrics = ppo(steps=4)
    assert metrics["train/scores_last"] > metrics["train/scores_first"] + 0.2
    return metrics


@shows("first_pass_ratio", of="aligned_policy/ppo", among_others=True)
def test_a_sampler_of_another_temperature_than_the_learner_is_noticed(ppo, monkeypatch):
    def log_probs(self, batch, temperature, **kwargs):
        return real(self, batch, temperature if torch.is_grad_enabled() else 1.0, **kwargs)

    real = LanguageRole.log_probs
    monkeypatch.setattr(LanguageRole, "log_probs", log_probs)
    return ppo(steps=1, ppo_epochs=1)


@shows("rollouts_end", "reward_rises", "prompts_dropped", of="aligned_policy/ppo")
def test_answers_that_are_all_cut_a_flat_reward_and_prompts_that_do_not_fit_are_noticed(ppo, tasks):
    return ppo(of=[*tasks[:4], *[TOO_LONG] * 5], max_prompt_length=250, max_new_tokens=1, ppo_epochs=1)


@shows("kl_per_answer", "policy_has_entropy", of="aligned_policy/ppo", among_others=True)
def test_a_policy_that_runs_away_from_its_reference_is_noticed(ppo):
    return ppo(learning_rate=3.0, kl_coef=0.0, max_new_tokens=12, ppo_epochs=1)


# --- 7: GRPO and RLOO -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def group_rl(four_answers, tasks, float32, folders):
    """Trains all weights by GRPO or RLOO on four groups of four answers a step; returns the metrics."""

    def run(asset, of=tasks, epochs=0.5, learning_rate=1e-4, **settings):
        name = asset.split("/")[1]
        given = {"load": float32, "finetuning": "full", "num_generations": 4, "max_new_tokens": 6, "rewards": RIGHT}
        optim = {**CONSTANT, "batch_size": 16, "micro_batch_size": 16}
        optim = OptimSettings(epochs=epochs, learning_rate=learning_rate, **optim)
        config = METHODS[name].config(**given | settings, optim=optim)
        return {"grpo": train_grpo, "rloo": train_rloo}[name](config, four_answers, None, of, **folders())[1]

    return run


@shows(of=GROUPS)
def test_a_healthy_group_rl_is_silent(group_rl, asset):
    return group_rl(asset)


@shows("completions_end", "length_below_cap", "groups_differ", "tasks_dropped", of=GROUPS)
def test_answers_that_are_all_cut_and_worth_the_same_and_tasks_that_do_not_fit_are_noticed(group_rl, tasks, asset):
    form = RewardWeights(reward_model=0.0, answer_format=1.0)
    return group_rl(asset, [*tasks[:4], *[TOO_LONG] * 5], epochs=1, max_prompt_length=250, max_new_tokens=1, rewards=form)


@shows("kl_per_token", "policy_has_entropy", of=GROUPS, among_others=True)
def test_a_group_policy_that_runs_away_from_its_reference_is_noticed_also_at_beta_0(group_rl, asset):
    return group_rl(asset, learning_rate=3.0, beta=0.0)


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


@shows(of="policy_report/ppo")
def test_a_healthy_report_is_silent(report, polite, rude, likes_please):
    improved = report(ModelFiles(polite[1]), rude, likes_please[1], likes_please[1], PLEASE)
    assert improved["evaluator/gain_low"] > 0
    assert improved["eos_rate/policy"] == improved["eos_rate/sft"] == 1
    return improved


@shows("evaluator_agrees", of="policy_report/ppo")
def test_a_reward_that_only_the_reward_model_sees_is_noticed(report, polite, rude, likes_please, likes_never):
    hacked = report(ModelFiles(polite[1]), rude, likes_never[1], likes_please[1], PLEASE)
    assert hacked["reward_model/gain"] > 0.1
    assert hacked["evaluator/gain"] < 0
    return hacked


@shows("answers_end", of="policy_report/ppo", among_others=True)
def test_answers_that_do_not_end_are_noticed(report, polite, rude, likes_please):
    endless = report(ModelFiles(polite[1]), rude, likes_please[1], likes_please[1], PLEASE, max_new_tokens=4)
    assert endless["eos_rate/policy"] == 0
    return endless


@shows("gain_is_not_length", of="policy_report/ppo", among_others=True)
def test_a_gain_that_comes_with_length_is_noticed(report, sft, rude, likes_please):
    wordy = ModelFiles(sft(lambda i: "please please please please")[1])
    metrics = report(wordy, rude, likes_please[1], likes_please[1], PLEASE)
    assert metrics["evaluator/gain"] > 0
    return metrics


@pytest.fixture(scope="module")
def dpo_report(report, likes_please):
    """Measures a policy that DPO made, together with the metrics of its training."""

    def run(trained, policy, start):
        demonstrations = talks(lambda i: ALIKE[i].chosen)
        return report(policy, start, likes_please[1], likes_please[1], demonstrations, trained=trained)

    return run


@shows(of="policy_report/dpo")
def test_a_healthy_dpo_report_is_silent(dpo_report, anchored):
    return dpo_report(*anchored)


@shows("likelihood_not_displaced", of="policy_report/dpo", among_others=True)
def test_displaced_likelihood_and_worse_perplexity_together_are_noticed(dpo_report, displaced):
    return dpo_report(*displaced)


# --- 10: critique and revise ------------------------------------------------------------------------------------------

NO_FILTERS = {
    "max_similarity": 1.0,
    "min_words": 1,
    "max_repetition": 1.0,
    "min_same_script": 0.0,
    "keep_truncated": True,
    "min_reward_gain": -1000,
}


@pytest.fixture(scope="module")
def revised(tiny_model, folders):
    """Computes `constitutional_preference_pairs` with a model that writes noise; returns the metrics and the stage's bounds."""
    from assets import constitutional

    def run(**settings):
        places = folders()
        prompts = [Prompt(id=q, prompt=q, tags=("general",)) for q in QUESTIONS]
        write_jsonl(places["out"] / "train.jsonl", prompts)
        short = {"temperature": 1.0, "max_new_tokens": 12}
        values = {"answer": short, "critique": short, "revision": short, "rounds": 1, "load": {"dtype": "float32"}, **settings}
        config = SimpleNamespace(model_dump=lambda: values, force=False)
        inputs = ("sft_checkpoint", "human_reward_model", "prompts")
        given = dict.fromkeys(inputs, SimpleNamespace(fingerprint="0" * 64))
        store = SimpleNamespace(path=lambda handle: places["out"], model_files=lambda handle: ModelFiles(tiny_model))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constitutional, "materialize", lambda context, stage, tools, *, force: stage())
            stage = constitutional.constitutional_preference_pairs.op.compute_fn.decorated_fn(
                SimpleNamespace(partition_key="general"), config, **given, store=store, tracking=None, dvc=None
            )
        outcome = stage.compute(SimpleNamespace(folder=places["work"], out=places["out"]), SILENT)
        return {**flatten(stage.config.model_dump()), **outcome.metrics}

    return run


@shows(of="constitutional_preference_pairs")
def test_pairs_of_which_enough_are_kept_are_silent(revised):
    return revised(no_violation_threshold=1.0, filters=NO_FILTERS)


@shows("share_kept", of="constitutional_preference_pairs")
def test_revisions_of_which_none_is_worth_training_on_are_noticed(revised):
    return revised(no_violation_threshold=1.0)


@shows("share_kept", "critic_finds_something", of="constitutional_preference_pairs")
def test_a_critic_that_finds_nothing_is_noticed(revised):
    return revised(no_violation_threshold=1e-300, filters=NO_FILTERS)


# --- 11: leakage ------------------------------------------------------------------------------------------------------


DATA_SETS = {
    "sft_dataset": ("train", "heldout"),
    "human_preferences": ("reward_train", "evaluator_train", "heldout"),
    "prompts": ("train", "heldout", "problems_train", "problems_heldout"),
}


@pytest.fixture
def split(tmp_path):
    """Writes data sets of a held-out conversation and a prompt to train on; returns what is counted when they are compared."""

    def run(trained_on):
        talk = (Message(role="user", content="Held talk?"), Message(role="assistant", content="Yes."))
        rows = {
            "sft_dataset/heldout": [Conversation(id="c", messages=talk)],
            "prompts/train": [Prompt(id="q", prompt=trained_on)],
        }
        for folder, names in DATA_SETS.items():
            (tmp_path / folder).mkdir()
            for name in names:
                write_jsonl(tmp_path / folder / f"{name}.jsonl", rows.get(f"{folder}/{name}", []))
        return leakage(**{folder: tmp_path / folder for folder in DATA_SETS})[0]

    return run


@shows(of="prompts")
def test_data_that_is_split_well_is_silent(split):
    return split("Train prompt?")


@shows("nothing_leaks", of="prompts")
def test_a_held_out_prompt_that_is_trained_on_is_noticed(split):
    return split("held talk")


# --- All of them ------------------------------------------------------------------------------------------------------

SAME_TRAINING = {"human_reward_model", "evaluator"}  # as `reward_model`, on other pairs


def shown_for(stage, alarm):
    return any(name == alarm and stage in (asset, asset.split("/")[0]) for asset, name in SHOWN)


@pytest.mark.parametrize(("alarm", "stage"), [(w.name, s) for w in ALARMS.values() for s in w.stages if s not in SAME_TRAINING])
def test_every_alarm_fires_in_a_run_of_every_stage_that_it_watches(alarm, stage):
    assert shown_for(stage, alarm)


@pytest.mark.parametrize("stage", sorted({s for w in ALARMS.values() for s in w.stages} - SAME_TRAINING))
def test_every_stage_that_is_watched_has_a_healthy_run(stage):
    assert [asset for asset in HEALTHY if stage in (asset, asset.split("/")[0])]
