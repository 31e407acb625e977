"""KTO: the paper's loss with z0 over the whole batch, the right tokens, both weights, the right way, kills."""

import pytest
import torch

from alignment.chat import IGNORE
from alignment.errors import UserError
from alignment.likelihood import label_log_probs
from alignment.methods.kto import KtoConfig, judged_answers, train_kto
from alignment.methods.pairs import tokenised_pairs
from alignment.models import ModelFiles, load_causal_lm, load_tokenizer
from alignment.records import PreferencePair
from alignment.sft import NothingToTrain
from alignment.training import OptimSettings

PAIRS = [PreferencePair(id=f"p{i}", prompt=f"Question {i}", chosen=f"yes {i}!", rejected=f"{i} no") for i in range(8)]
FLIPPED = [p.model_copy(update={"chosen": p.rejected, "rejected": p.chosen}) for p in PAIRS]
BETA, DESIRABLE, UNDESIRABLE = 0.5, 0.7, 1.3


@pytest.fixture(scope="module")
def train(sft_adapter, float32, tmp_path_factory):
    """Trains in a folder of its own or, to resume, in a given one."""

    def run(folder=None, pairs=PAIRS, start=None, log=None, optim=None, **settings):
        folder = folder or tmp_path_factory.mktemp("kto")
        for name in ("work", "out"):
            (folder / name).mkdir(exist_ok=True)
        given = {"epochs": 2, "learning_rate": 1e-2, "batch_size": 4, "micro_batch_size": 4, "save_every": 2}
        config = KtoConfig(load=float32, optim=OptimSettings(**given | (optim or {})), **settings)
        kwargs = {"log": log} if log else {}
        trained, metrics = train_kto(config, start or sft_adapter, pairs, work=folder / "work", out=folder / "out", **kwargs)
        return trained, metrics, folder / "out" / "model"

    return run


def curve(trained, name="loss"):
    return [value for _, value in trained.curves[name]]


def log_probs(files, float32, rows, answer):
    model, tokenizer = load_causal_lm(files, float32), load_tokenizer(files.base)
    labelled = [(r["prompt_ids"] + r[answer], [IGNORE] * len(r["prompt_ids"]) + r[answer]) for r in rows]
    return torch.tensor(label_log_probs(model, tokenizer, labelled, 8))


# --- The loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("undesirable_weight", "above"), [(UNDESIRABLE, False), (0.0, True)], ids=["z0 is 0", "z0 is above 0"])
@pytest.mark.parametrize("micro_batch_size", [16, 4])
def test_the_loss_is_the_papers(train, sft_adapter, float32, undesirable_weight, above, micro_batch_size):
    # The third step's loss, from the policy as it was after the second: the same training, ended one step earlier.
    settings = {"beta": BETA, "desirable_weight": DESIRABLE, "undesirable_weight": undesirable_weight}
    optim = {"batch_size": 16, "micro_batch_size": micro_batch_size, "scheduler": "constant", "warmup_ratio": 0.0}
    _, _, folder = train(optim=optim | {"epochs": 2}, **settings)
    three, _, _ = train(optim=optim | {"epochs": 3}, **settings)
    policy = ModelFiles(sft_adapter.base, folder)
    rows = judged_answers(tokenised_pairs(load_tokenizer(sft_adapter.base), PAIRS), 16, seed=0)
    ratio, mismatched = (
        log_probs(policy, float32, rows, answer) - log_probs(sft_adapter, float32, rows, answer)
        for answer in ("completion_ids", "KL_completion_ids")
    )
    z0 = mismatched.mean().clamp(min=0)
    assert (z0 > 0.01) == above
    good = torch.tensor([r["label"] for r in rows])
    loss = torch.where(
        good, DESIRABLE * (1 - torch.sigmoid(BETA * (ratio - z0))), undesirable_weight * (1 - torch.sigmoid(BETA * (z0 - ratio)))
    ).mean()
    assert curve(three)[0] == pytest.approx((DESIRABLE + undesirable_weight) / 4, abs=1e-4)  # policy and reference are equal
    assert curve(three)[2] == pytest.approx(loss.item(), abs=1e-4)
    assert abs(curve(three)[2] - curve(three)[0]) > 0.01
    assert curve(three, "kl")[2] == pytest.approx(z0.item(), abs=1e-4)
    if micro_batch_size == 16:
        assert curve(three, "rewards/chosen")[2] == pytest.approx(BETA * ratio[good].mean().item(), abs=1e-4)
        assert curve(three, "rewards/rejected")[2] == pytest.approx(BETA * ratio[~good].mean().item(), abs=1e-4)


def test_the_micro_batch_size_does_not_change_the_result(train, largest_difference):
    whole = {"batch_size": 16, "learning_rate": 1e-3, "epochs": 4}
    one, _, a = train(optim=whole | {"micro_batch_size": 16})
    four, _, b = train(optim=whole | {"micro_batch_size": 4})
    assert curve(four) == pytest.approx(curve(one), abs=1e-4)
    assert largest_difference(a, b) < 1e-4


def test_a_weight_of_zero_silences_its_side(train, sft_adapter, float32):
    rows = judged_answers(tokenised_pairs(load_tokenizer(sft_adapter.base), PAIRS), 16, seed=0)
    good = torch.tensor([r["label"] for r in rows])

    def moved(**weights):
        _, _, folder = train(optim={"batch_size": 16, "micro_batch_size": 16, "epochs": 8, "learning_rate": 3e-3}, **weights)
        policy = ModelFiles(sft_adapter.base, folder)
        return log_probs(policy, float32, rows, "completion_ids") - log_probs(sft_adapter, float32, rows, "completion_ids")

    assert moved(undesirable_weight=0.0)[good].mean() > 0.1
    assert moved(desirable_weight=0.0)[~good].mean() < -0.1


# --- What is compared -------------------------------------------------------------------------------------------------


def test_every_answer_is_judged_once_and_meets_anothers_prompt(tokenizer):
    pairs = tokenised_pairs(tokenizer, PAIRS)
    rows = judged_answers(pairs, 4, seed=0)
    assert len(rows) == 16
    for label, side in ((True, "chosen_ids"), (False, "rejected_ids")):
        expected = sorted((p["prompt_ids"], p[side]) for p in pairs)
        assert sorted((r["prompt_ids"], r["completion_ids"]) for r in rows if r["label"] is label) == expected
    own = {tuple(p["prompt_ids"]): (p["chosen_ids"], p["rejected_ids"]) for p in pairs}
    for start in range(0, 16, 4):
        batch = rows[start : start + 4]
        assert sorted(r["KL_completion_ids"] for r in batch) == sorted(r["completion_ids"] for r in batch)
        if len({tuple(r["prompt_ids"]) for r in batch}) > 2:
            assert all(r["KL_completion_ids"] not in own[tuple(r["prompt_ids"])] for r in batch)
    assert judged_answers(pairs, 4, seed=0) == rows != judged_answers(pairs, 4, seed=1)
    assert len(judged_answers(pairs[:1], 4, seed=0)) == 2  # nobody else's prompt is there


def test_pairs_without_room_for_an_answer_are_dropped_and_counted(train):
    long = PreferencePair(id="long", prompt="x" * 300, chosen="a", rejected="b")
    _, metrics, _ = train(pairs=[*PAIRS, long], max_length=200, optim={"epochs": 1})
    assert (metrics["train/pairs"], metrics["train/pairs_dropped_too_long"]) == (8, 1)
    with pytest.raises(NothingToTrain, match="Remedy"):
        train(pairs=[])


def test_one_answer_in_memory_is_refused():
    with pytest.raises(ValueError, match=r"micro_batch_size must be at least 2"):
        KtoConfig(optim=OptimSettings(micro_batch_size=1))


# --- Learning, and the same result ------------------------------------------------------------------------------------


def test_it_moves_the_way_the_pairs_say(train, sft_adapter, float32):
    tokenizer = load_tokenizer(sft_adapter.base)
    rows = judged_answers(tokenised_pairs(tokenizer, PAIRS), 16, seed=0)
    good = torch.tensor([r["label"] for r in rows])

    def preference(files):
        sums = log_probs(files, float32, rows, "completion_ids")
        return (sums[good].sum() - sums[~good].sum()).item()

    before = preference(sft_adapter)
    for pairs, sign in ((PAIRS, 1), (FLIPPED, -1)):
        _, metrics, folder = train(pairs=pairs, optim={"epochs": 6})
        assert sign * (preference(ModelFiles(sft_adapter.base, folder)) - before) > 4
        assert metrics["train/rewards_margin_last"] > 0.05


@pytest.fixture(scope="module")
def undisturbed(train):
    return train()


@pytest.mark.parametrize("stop", [3, 7], ids=["in the first epoch", "in the second epoch"])
def test_a_killed_training_ends_like_one_that_was_not(
    train, undisturbed, recording_log, interrupted, largest_difference, tmp_path, stop
):
    uninterrupted, metrics, folder = undisturbed
    log, _ = recording_log(until=stop)
    with pytest.raises(interrupted):
        train(tmp_path, log=log)
    log, seen = recording_log()
    resumed, again, resumed_folder = train(tmp_path, log=log)
    assert seen[0][0] == stop
    assert largest_difference(resumed_folder, folder) < 1e-5
    assert curve(resumed) == pytest.approx(curve(uninterrupted), abs=1e-4)
    assert again == pytest.approx(metrics, abs=1e-4)


def test_over_a_full_sft_model_a_new_adapter_or_all_weights_are_trained(train, four_answers):
    for finetuning, weights in (("lora", "adapter_model.safetensors"), ("full", "model.safetensors")):
        trained, _, folder = train(start=four_answers, finetuning=finetuning, optim={"epochs": 1})
        assert curve(trained)[0] == pytest.approx(0.5, abs=1e-4)
        assert [p.name for p in folder.rglob("*.safetensors")] == [weights]
    with pytest.raises(UserError, match=r"finetuning: full.*Remedy"):
        train(finetuning="full")
