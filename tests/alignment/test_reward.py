"""Reward models: accuracy beside what length alone would reach, real training, and a head that must not get lost."""

import json
import math
import random
import weakref

import pytest
from safetensors.torch import load_file, save_file

import alignment.reward
from alignment.models import LoadSettings, LoraSettings, ModelFiles, load_reward_model, load_tokenizer
from alignment.records import Message, PreferencePair, WeightedPair
from alignment.reward import (
    HeadLost,
    RewardConfig,
    RewardMixConfig,
    accuracy_metrics,
    pairwise_loss,
    reward_training_pairs,
    score,
    score_pairs,
    train_reward_model,
)
from alignment.sft import NothingToTrain
from alignment.statistics import wilson
from alignment.training import OptimSettings

WORDS = ["the", "a", "cat", "dog", "sits", "runs", "on", "under", "tree", "house", "big", "small", "now", "then", "fast"]


def separable_pairs(n, seed=0):
    """Pairs that one word tells apart: "please" is in every chosen answer, "never" in every rejected one."""
    rng = random.Random(seed)

    def answer(word):
        words = rng.choices(WORDS, k=5)
        words.insert(rng.randrange(6), word)
        return " ".join(words)

    return [PreferencePair(id=f"p{i}", prompt=f"q {i}", chosen=answer("please"), rejected=answer("never")) for i in range(n)]


PAIRS = separable_pairs(240)
TRAIN, HELDOUT = PAIRS[:160], PAIRS[160:]


@pytest.fixture(scope="module")
def config(float32):
    return RewardConfig(
        lora=LoraSettings(dropout=0.0, target_modules=["all-linear"]),
        load=float32,
        optim=OptimSettings(epochs=2, learning_rate=3e-3, batch_size=16, micro_batch_size=16, save_every=4, seed=3),
    )


@pytest.fixture(scope="module")
def train(config, tiny_model, tmp_path_factory):
    """Trains in a folder of its own or, to resume, in a given one."""

    def run(folder=None, train=TRAIN, heldout=HELDOUT, log=None, base=tiny_model, **changes):
        folder = folder or tmp_path_factory.mktemp("reward")
        for name in ("work", "out"):
            (folder / name).mkdir(exist_ok=True)
        kwargs = {"log": log} if log else {}
        trained, metrics, table = train_reward_model(
            config.model_copy(update=changes),
            ModelFiles(base),
            train,
            heldout,
            work=folder / "work",
            out=folder / "out",
            **kwargs,
        )
        return trained, metrics, table, folder / "out" / "model"

    return run


@pytest.fixture(scope="module")
def lora(train):
    return train()


@pytest.fixture(scope="module")
def full(train):
    return train(finetuning="full")


@pytest.fixture(params=["lora", "full"])
def either(request):
    return request.param, *request.getfixturevalue(request.param)


def loaded(kind, folder, tiny_model, float32, **kwargs):
    files = ModelFiles(tiny_model, folder) if kind == "lora" else ModelFiles(folder)
    tokenizer = load_tokenizer(tiny_model)
    return load_reward_model(files, float32, tokenizer=tokenizer, **kwargs), tokenizer


def test_one_telling_word_is_learnt(either):
    _, trained, metrics, _, _ = either
    assert metrics["heldout/accuracy"] >= 0.9
    assert metrics["heldout/gain_over_length_low"] > 0.1
    assert metrics["heldout/margin"] > 0.5
    losses = [loss for _, loss in trained.curves["loss"]]
    assert losses[0] == pytest.approx(0.693, abs=0.1)  # it knows nothing yet: log 2
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]
    assert metrics["train/pairs"] == 160
    assert trained.steps == len(losses) == 20


def test_flipped_labels_teach_the_opposite(train):
    flipped = [p.model_copy(update={"chosen": p.rejected, "rejected": p.chosen}) for p in TRAIN]
    _, metrics, _, _ = train(train=flipped)
    assert metrics["heldout/accuracy"] <= 0.1


def test_the_saved_model_gives_the_same_scores(either, tiny_model, float32):
    kind, _, _, table, folder = either
    model, tokenizer = loaded(kind, folder, tiny_model, float32, seed=99)
    chosen, rejected = score_pairs(model, tokenizer, HELDOUT, 32)
    assert chosen == pytest.approx([row["reward_chosen"] for row in table], abs=1e-5)
    assert rejected == pytest.approx([row["reward_rejected"] for row in table], abs=1e-5)


def test_saving_and_loading_changes_no_bit_of_a_score(either):
    _, _, metrics, _, _ = either
    assert metrics["reload/score_gap"] == 0


@pytest.fixture(scope="module")
def bfloat16(train):
    return train(load=LoadSettings(dtype="bfloat16"))


@pytest.mark.parametrize("finetuning", ["lora", "full"])
def test_nor_does_it_in_bfloat16_where_rewards_are_float32_numbers_too(bfloat16, train, finetuning):
    import torch

    full = {"load": LoadSettings(dtype="bfloat16"), "finetuning": "full", "train": TRAIN[:16]}
    _, metrics, table, _ = bfloat16 if finetuning == "lora" else train(**full)
    assert metrics["reload/score_gap"] == 0
    rewards = torch.tensor([row["reward_chosen"] for row in table])
    assert (rewards != rewards.bfloat16()).float().mean() > 0.9


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_trained_model_makes_room_for_the_saved_one(train, monkeypatch, kind):
    trained, left = [], []

    def save(model, *args):
        trained.append(weakref.ref(model.get_input_embeddings()))
        really_save(model, *args)

    def load(*args, **kwargs):
        left.append([ref() for ref in trained])
        return really_load(*args, **kwargs)

    really_save, really_load = alignment.reward.save_model, alignment.reward.load_reward_model
    monkeypatch.setattr(alignment.reward, "save_model", save)
    monkeypatch.setattr(alignment.reward, "load_reward_model", load)
    train(finetuning=kind, train=TRAIN[:32])
    assert left == [[], [None]]  # when the base was loaded, and when the saved model was


def test_small_steps_of_the_score_head_are_not_lost_over_a_16_bit_base(train, config, tiny_model):
    """At this learning rate a step is less than half the distance of two 16-bit numbers from most weights."""
    import torch

    optim = config.optim.model_copy(update={"epochs": 4, "learning_rate": 2e-5, "scheduler": "constant", "warmup_ratio": 0.0})
    half = LoadSettings(dtype="bfloat16")
    _, _, _, folder = train(load=half, optim=optim)
    drawn = load_reward_model(ModelFiles(tiny_model), half, tokenizer=load_tokenizer(tiny_model), seed=optim.seed)
    (head,) = (w for name, w in load_file(folder / "adapter_model.safetensors").items() if "score" in name)
    assert head.dtype == torch.float32
    assert ((head - drawn.score.weight).abs() > 2e-4).float().mean() > 0.9


def test_a_killed_training_in_bfloat16_ends_like_one_too(
    train, bfloat16, recording_log, interrupted, largest_difference, tmp_path
):
    half = LoadSettings(dtype="bfloat16")
    _, metrics, _, folder = bfloat16
    log, _ = recording_log(until=7)
    with pytest.raises(interrupted):
        train(tmp_path, log=log, load=half)
    (weights,) = (tmp_path / "work" / "trainer" / "checkpoint-4").glob("adapter_model.safetensors")
    assert {str(w.dtype) for w in load_file(weights).values()} == {"torch.float32"}
    _, again, _, resumed = train(tmp_path, load=half)
    assert largest_difference(resumed, folder) == 0
    assert again == metrics


def test_the_saved_model_is_safetensors_with_its_score_head_and_tokenizer(either):
    _, _, _, _, folder = either
    (weights,) = folder.glob("*.safetensors")
    assert [tuple(w.shape) for name, w in load_file(weights).items() if "score" in name] == [(1, 64)]
    assert (folder / "tokenizer_config.json").exists()
    assert (folder / "chat_template.jinja").exists()
    assert not [*folder.rglob("*.bin"), *folder.rglob("*.pt"), *folder.rglob("*.pkl")]


def test_the_table_is_the_held_out_pairs_in_order(lora):
    _, metrics, table, _ = lora
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in table] == [(p.prompt, p.chosen, p.rejected) for p in HELDOUT]
    right = sum(r["reward_chosen"] > r["reward_rejected"] for r in table)
    assert metrics["heldout/accuracy"] == right / len(HELDOUT)


@pytest.fixture
def lose_the_head(monkeypatch):
    """Saving as it goes wrong in practice: the adapter (or model) without the new head."""

    def save(model, tokenizer, folder, *args, **kwargs):
        really_save(model, tokenizer, folder, *args, **kwargs)
        (weights,) = folder.glob("*.safetensors")
        kept = {name: w for name, w in load_file(weights).items() if "score" not in name}
        save_file(kept, weights, metadata={"format": "pt"})
        settings = folder / "adapter_config.json"
        if settings.exists():  # as saved for a causal model: nothing says that a head belongs to it
            values = json.loads(settings.read_text()) | {"modules_to_save": None, "task_type": None}
            settings.write_text(json.dumps(values))

    really_save = alignment.reward.save_model
    monkeypatch.setattr(alignment.reward, "save_model", save)


@pytest.fixture
def two_steps(config):
    """What is lost does not depend on how long was trained."""
    optim = config.optim.model_copy(update={"epochs": 1})
    return {"train": TRAIN[:32], "heldout": HELDOUT[:8], "optim": optim}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_without_held_out_pairs_a_lost_score_head_is_detected_too(train, two_steps, lose_the_head, kind):
    with pytest.raises(HeadLost, match="scores changed by up to"):
        train(finetuning=kind, **two_steps | {"heldout": []})


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_lost_score_head_is_detected(train, two_steps, lose_the_head, kind):
    with pytest.raises(HeadLost, match="scores changed by up to"):
        train(finetuning=kind, **two_steps)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_lost_score_head_is_detected_with_the_default_seed_and_a_small_learning_rate_too(train, two_steps, lose_the_head, kind):
    optim = two_steps["optim"].model_copy(update={"seed": 0, "learning_rate": 1e-5})
    with pytest.raises(HeadLost):
        train(finetuning=kind, **two_steps | {"optim": optim})


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("stop", [7, 17], ids=["first epoch", "second epoch"])
def test_a_killed_training_ends_like_one_that_was_not(
    train, request, recording_log, interrupted, largest_difference, tmp_path, kind, stop
):
    uninterrupted, metrics, _, folder = request.getfixturevalue(kind)
    log, _ = recording_log(until=stop)
    with pytest.raises(interrupted):
        train(tmp_path, log=log, finetuning=kind)
    log, seen = recording_log()
    resumed, again, _, resumed_folder = train(tmp_path, log=log, finetuning=kind)
    assert seen[0][0] == stop // 4 * 4 + 1  # from the last checkpoint, saved every 4 steps
    assert largest_difference(resumed_folder, folder) < 1e-5
    assert [s for s, _ in resumed.curves["loss"]] == [s for s, _ in uninterrupted.curves["loss"]]
    assert [v for _, v in resumed.curves["loss"]] == pytest.approx([v for _, v in uninterrupted.curves["loss"]], abs=1e-4)
    assert again == pytest.approx(metrics, abs=1e-4)


def test_pairs_that_are_too_long_are_dropped_and_counted(train):
    long = PreferencePair(id="long", prompt="q", chosen="please " * 20, rejected="never")
    _, metrics, _, _ = train(train=[*TRAIN[:20], long, long], max_length=100)
    assert metrics["train/pairs"] == 20
    assert metrics["train/pairs_dropped_too_long"] == 2


def test_nothing_to_train_is_said(train):
    with pytest.raises(NothingToTrain, match="none of 160 training pairs fits max_length 16 tokens"):
        train(max_length=16)
    with pytest.raises(NothingToTrain, match="there are no training pairs"):
        train(train=[])


# --- The loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("margin", "centering"), [(0.0, 0.0), (1.5, 0.0), (0.0, 0.3), (1.5, 0.3)])
def test_the_loss_by_hand(train, config, full, margin, centering):
    # Training starts at a reward model whose scores are known: the first step's loss is that of these scores. All pairs are
    # in it, so with m = 1.5, c = 0.3 and a pair that scores 2 and -1: -log sigmoid(2 + 1 - 1.5) + 0.3 * (2 - 1)^2 = 0.501.
    _, _, table, folder = full
    assert -math.log(1 / (1 + math.exp(-(2 + 1 - 1.5)))) + 0.3 * (2 - 1) ** 2 == pytest.approx(0.501, abs=1e-3)
    by_hand = 0.0
    for row in table[:16]:
        c, r = row["reward_chosen"], row["reward_rejected"]
        by_hand += (math.log(1 + math.exp(-(c - r - margin))) + centering * (c + r) ** 2) / 16
    once = config.optim.model_copy(update={"epochs": 1})
    trained, _, _, _ = train(
        train=HELDOUT[:16],
        heldout=[],
        base=folder,
        finetuning="full",
        optim=once,
        margin=margin,
        center_rewards_coefficient=centering,
    )
    assert trained.curves["loss"][0][1] == pytest.approx(by_hand, rel=1e-3, abs=1e-4)


def test_a_margin_drives_the_scores_further_apart(train, config):
    longer = config.optim.model_copy(update={"epochs": 4})
    _, narrow, _, _ = train(optim=longer)
    _, wide, _, _ = train(optim=longer, margin=4.0)
    assert wide["heldout/margin"] > narrow["heldout/margin"] + 1
    assert wide["heldout/accuracy"] >= 0.9


def test_centering_keeps_the_scores_around_zero(train, lora):
    def off_centre(table):
        return abs(sum(row["reward_chosen"] + row["reward_rejected"] for row in table)) / len(table)

    _, _, free, _ = train(center_rewards_coefficient=0.0)
    _, _, centred, _ = train(center_rewards_coefficient=0.5)
    assert off_centre(centred) < 0.5 * off_centre(free)


@pytest.mark.parametrize("finetuning", ["lora", "full"])
def test_a_margin_trains_gpt2_too(train, tiny_gpt2, finetuning):
    trained, _, _, _ = train(train=TRAIN[:16], heldout=HELDOUT[:4], base=tiny_gpt2, finetuning=finetuning, margin=1.0)
    assert trained.curves["loss"][0][1] == pytest.approx(-math.log(1 / (1 + math.e)), abs=0.15)  # nothing known yet: -log s(-1)


# --- Soft labels and weights ------------------------------------------------------------------------------------------


def weighted(pairs, label=1.0, weight=1.0):
    return [WeightedPair(**p.model_dump(), label=label, weight=weight) for p in pairs]


def flipped(pairs):
    return [p.model_copy(update={"chosen": p.rejected, "rejected": p.chosen}) for p in pairs]


def loss_of(chosen, rejected, labels, weights, **kwargs):
    import torch

    return pairwise_loss(*map(torch.tensor, (chosen, rejected, labels, weights)), **kwargs).item()


def test_the_soft_loss_by_hand():
    # d = 2 - 1 = 1 with p = 0.7: -0.7 log s(1) - 0.3 log s(-1) = 0.7 * 0.31326 + 0.3 * 1.31326 = 0.61326, counted twice;
    # d = 0 - 2 = -2 with p = 1: -log s(-2) = 2.12693, and with a margin of 0.5, which only this one has, -log s(-2.5) = 2.57889.
    rows = ([2.0, 0.0], [1.0, 2.0], [0.7, 1.0], [2.0, 1.0])
    assert loss_of(*rows) == pytest.approx((2 * 0.61326 + 2.12693) / 2, abs=1e-5)
    assert loss_of(*rows, margin=0.5) == pytest.approx((2 * 0.61326 + 2.57889) / 2, abs=1e-5)
    # Centering is not weighted: the squared sums are (2 + 1)^2 and (0 + 2)^2.
    assert loss_of(*rows, centering=0.1) == pytest.approx((2 * 0.61326 + 2.12693) / 2 + 0.1 * (9 + 4) / 2, abs=1e-5)


def test_the_soft_loss_is_least_where_the_scores_say_what_the_label_says():
    def at(d, p):
        return loss_of([d], [0.0], [p], [1.0])

    best = math.log(0.8 / 0.2)
    assert at(best, 0.8) < min(at(best + 0.1, 0.8), at(best - 0.1, 0.8))
    assert at(0.0, 0.5) < min(at(0.1, 0.5), at(-0.1, 0.5))


@pytest.mark.parametrize(("label", "sign"), [(0.9, -1), (0.1, 1), (1.0, -1)])
def test_the_gradient_moves_the_likelier_answer_up(label, sign):
    import torch

    chosen, rejected = (torch.zeros(1, requires_grad=True) for _ in range(2))
    pairwise_loss(chosen, rejected, torch.tensor([label]), torch.ones(1)).backward()
    assert chosen.grad.item() == pytest.approx(0.5 - label, abs=1e-6)  # sigmoid(0) - p
    assert rejected.grad.item() == pytest.approx(label - 0.5, abs=1e-6)
    assert chosen.grad.item() * sign > 0


@pytest.mark.parametrize("margin", [0.0, 1.5])
def test_a_label_of_one_is_exactly_the_loss_without_labels(margin):
    import torch
    from torch.nn.functional import logsigmoid

    chosen, rejected = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)) * 5
    ones = torch.ones(64)
    hard = -logsigmoid(chosen - rejected - margin).mean()
    assert torch.equal(pairwise_loss(chosen, rejected, ones, ones, margin), hard)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_training_with_labels_of_one_gives_the_same_model_as_without(train, request, largest_difference, kind):
    trained, metrics, _, folder = request.getfixturevalue(kind)
    again, same, _, other = train(train=weighted(TRAIN), finetuning=kind)
    assert largest_difference(folder, other) == 0
    assert again.curves["loss"] == trained.curves["loss"]
    assert same == metrics


def test_margin_and_centering_hold_for_labels_of_one_in_training_too(train, largest_difference):
    settings = {"margin": 1.5, "center_rewards_coefficient": 0.3}
    _, _, _, hard = train(train=TRAIN[:32], heldout=[], **settings)
    _, _, _, soft = train(train=weighted(TRAIN[:32]), heldout=[], **settings)
    assert largest_difference(hard, soft) < 1e-6


def test_soft_labels_are_learnt_as_probabilities(train, config):
    optim = config.optim.model_copy(update={"epochs": 6})
    _, metrics, table, _ = train(train=weighted(TRAIN, label=0.75), optim=optim, center_rewards_coefficient=0.0)
    assert metrics["heldout/accuracy"] >= 0.95
    # The loss is least where sigmoid(d) = 0.75; hard labels would drive the scores ever further apart.
    assert sum(r["reward_chosen"] - r["reward_rejected"] for r in table) / len(table) == pytest.approx(math.log(3), abs=0.35)
    assert metrics["train/pairs_soft"] == metrics["train/pairs"] == 160


def test_labels_below_a_half_teach_the_opposite(train):
    _, metrics, _, _ = train(train=weighted(TRAIN, label=0.1))
    assert metrics["heldout/accuracy"] <= 0.1


@pytest.mark.parametrize(("true", "false", "right"), [(4.0, 1.0, True), (1.0, 4.0, False)])
def test_of_pairs_that_contradict_each_other_the_heavier_are_believed(train, true, false, right):
    mixed = [*weighted(TRAIN[:80], weight=true), *weighted(flipped(TRAIN[80:]), weight=false)]
    _, metrics, _, _ = train(train=mixed)
    assert metrics["heldout/accuracy"] >= 0.8 if right else metrics["heldout/accuracy"] <= 0.2


def test_the_micro_batch_changes_nothing_for_weighted_pairs(train, config):
    rows = [*weighted(TRAIN[:40], 0.7, 0.5), *weighted(TRAIN[40:64], 1.0, 2.0)]
    curves = []
    for size in (16, 4):
        optim = config.optim.model_copy(update={"micro_batch_size": size})
        trained, _, _, _ = train(train=rows, heldout=[], optim=optim)
        curves.append([loss for _, loss in trained.curves["loss"]])
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


def test_a_killed_training_on_soft_labels_ends_like_one_that_was_not(
    train, recording_log, interrupted, largest_difference, tmp_path
):
    rows = [*TRAIN[:80], *weighted(TRAIN[80:], 0.7, 0.5)]
    _, _, _, folder = train(train=rows)
    log, _ = recording_log(until=7)
    with pytest.raises(interrupted):
        train(tmp_path, train=rows, log=log)
    log, seen = recording_log()
    _, _, _, resumed = train(tmp_path, train=rows, log=log)
    assert seen[0][0] == 5
    assert largest_difference(resumed, folder) < 1e-5


# --- Scoring ----------------------------------------------------------------------------------------------------------


def test_scores_do_not_depend_on_the_batch_they_were_in(lora, tiny_model, float32):
    model, tokenizer = loaded("lora", lora[3], tiny_model, float32)
    answers = [("please " if i % 2 else "never ") * (i % 5) + "a" * i for i in range(1, 13)]
    told = [[{"role": "user", "content": "q" * (7 * i % 40)}, {"role": "assistant", "content": a}] for i, a in enumerate(answers)]
    alone = score(model, tokenizer, told, 1)
    assert score(model, tokenizer, told, 12) == pytest.approx(alone, abs=1e-4)
    assert score(model, tokenizer, told[::-1], 5)[::-1] == pytest.approx(alone, abs=1e-4)
    assert max(alone) - min(alone) > 1


def test_the_score_is_read_at_the_eos_of_the_last_turn(lora, tiny_model, float32):
    import torch

    model, tokenizer = loaded("lora", lora[3], tiny_model, float32)
    text = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nplease wait<|im_end|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        states = model.base_model.model.model(torch.tensor([ids]))[0][0, -1]
        by_hand = model.base_model.model.score(states).item()
    told = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "please wait"}]
    assert score(model, tokenizer, [told], 4) == pytest.approx([by_hand], abs=1e-4)


def test_the_turns_before_are_part_of_what_is_scored(lora, tiny_model, float32):
    model, tokenizer = loaded("lora", lora[3], tiny_model, float32)
    pair = HELDOUT[0]
    before = (Message(role="user", content="never never"), Message(role="assistant", content="never never"))
    plain, _ = score_pairs(model, tokenizer, [pair], 1)
    with_history, _ = score_pairs(model, tokenizer, [pair.model_copy(update={"history": before})], 1)
    assert abs(plain[0] - with_history[0]) > 1e-3


# --- Metrics ----------------------------------------------------------------------------------------------------------


def pairs_of_lengths(*lengths):
    return [
        PreferencePair(id=f"{i}", prompt="q", chosen="c" * chosen, rejected="r" * rejected)
        for i, (chosen, rejected) in enumerate(lengths)
    ]


def test_accuracy_by_hand_with_a_tie_and_the_longer_answer_as_baseline():
    pairs = pairs_of_lengths((5, 1), (6, 2), (7, 7), (1, 5))  # longer: right, right, half, wrong = 2.5 of 4
    metrics = accuracy_metrics(pairs, [1.0, 2.0, 0.0, 3.0], [0.0, 2.0, 1.0, 1.0])  # right, half, wrong, right = 2.5
    assert metrics["heldout/accuracy"] == 2.5 / 4
    assert (metrics["heldout/accuracy_low"], metrics["heldout/accuracy_high"]) == wilson(2.5, 4)[1:]
    assert metrics["heldout/accuracy_longer_wins"] == 2.5 / 4
    assert metrics["heldout/accuracy_shorter_wins"] == 1.5 / 4
    assert metrics["heldout/gain_over_length"] == 0.0
    assert metrics["heldout/margin"] == (1 + 0 - 1 + 2) / 4
    assert metrics["heldout/pairs"] == 4


def test_the_better_of_the_two_length_baselines_is_the_one_to_beat():
    pairs = pairs_of_lengths((1, 5), (2, 6), (3, 9), (5, 1))  # shorter wins 3 of 4
    metrics = accuracy_metrics(pairs, [1.0] * 4, [0.0] * 4)
    assert metrics["heldout/accuracy"] == 1.0
    assert metrics["heldout/accuracy_shorter_wins"] == 0.75
    assert metrics["heldout/gain_over_length"] == 0.25
    assert metrics["heldout/gain_over_length_low"] == 0.0
    blind = accuracy_metrics(pairs, [float(len(p.rejected)) for p in pairs], [float(len(p.chosen)) for p in pairs])
    assert blind["heldout/gain_over_length"] == blind["heldout/gain_over_length_high"] == 0.0


def test_a_judge_that_sees_no_difference_is_right_half_the_time():
    metrics = accuracy_metrics(pairs_of_lengths((1, 5), (5, 1), (3, 3)), [0.0] * 3, [0.0] * 3)
    assert metrics["heldout/accuracy"] == 0.5
    assert metrics["heldout/gain_over_length"] == 0.0


def test_no_held_out_pairs_no_metrics():
    assert accuracy_metrics([], [], []) == {}


# --- The mixture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.25, 10), (1.0, 40)])
def test_the_configured_share_of_constitutional_pairs_joins_the_human_ones(share, count):
    human, constitutional = (
        separable_pairs(30, seed=1),
        [p.model_copy(update={"id": f"c{p.id}", "source": "constitutional"}) for p in separable_pairs(40, seed=2)],
    )
    config = RewardMixConfig(constitutional_share=share)
    mixed = reward_training_pairs(human, constitutional, config)
    assert sum(p.source == "constitutional" for p in mixed) == count
    assert sorted(p.id for p in mixed if p.source == "human") == sorted(p.id for p in human)
    assert len({p.id for p in mixed}) == len(mixed)
    assert reward_training_pairs(human, constitutional, config) == mixed
    other = config.model_copy(update={"optim": config.optim.model_copy(update={"seed": 1})})
    assert reward_training_pairs(human, constitutional, other) != mixed


@pytest.fixture
def sources():
    """Thirty human, forty constitutional and twenty compared pairs."""
    human = separable_pairs(30, seed=1)
    constitutional = [p.model_copy(update={"id": f"c{p.id}", "source": "constitutional"}) for p in separable_pairs(40, seed=2)]
    compared = [p.model_copy(update={"id": f"a{p.id}", "source": "ai_feedback"}) for p in separable_pairs(20, seed=3)]
    return human, constitutional, weighted(compared, label=0.6)


def test_without_a_weight_ai_feedback_changes_nothing(sources):
    human, constitutional, compared = sources
    mixed = reward_training_pairs(human, constitutional, RewardMixConfig(), compared)
    assert mixed == reward_training_pairs(human, constitutional, RewardMixConfig())
    assert {type(p) for p in mixed} == {PreferencePair}


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.25, 5), (1.0, 20)])
def test_the_configured_share_of_ai_feedback_joins_with_its_label_and_weight(sources, share, count):
    human, constitutional, compared = sources
    config = RewardMixConfig(ai_feedback_weight=0.5, ai_feedback_share=share)
    mixed = reward_training_pairs(human, constitutional, config, compared)
    feedback = [p for p in mixed if p.source == "ai_feedback"]
    assert len(feedback) == len({p.id for p in feedback}) == count
    assert {(p.label, p.weight) for p in feedback} <= {(0.6, 0.5)}
    assert len(mixed) == 70 + count
    assert reward_training_pairs(human, constitutional, config, compared) == mixed


def test_constitutional_pairs_that_are_to_take_part_must_be_there(sources):
    human, _, _ = sources
    with pytest.raises(NothingToTrain, match=r"no constitutional pairs.*Remedy: look at the filter counts"):
        reward_training_pairs(human, [], RewardMixConfig())
    for config in (RewardMixConfig(constitutional_weight=0), RewardMixConfig(constitutional_share=0)):
        assert len(reward_training_pairs(human, [], config)) == len(human)


def test_weights_apply_to_their_own_kind_and_zero_leaves_it_out(sources):
    human, constitutional, compared = sources
    config = RewardMixConfig(human_weight=2.0, constitutional_weight=0.0, ai_feedback_weight=1.0)
    mixed = reward_training_pairs(human, constitutional, config, compared)
    assert {(p.source, p.weight) for p in mixed} == {("human", 2.0), ("ai_feedback", 1.0)}
    assert len(mixed) == 50
    assert {p.label for p in mixed if p.source == "human"} == {1.0}
