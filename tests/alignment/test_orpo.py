"""ORPO: the paper's loss on the answer's tokens alone, a single stage from the base model, the right way, kills."""

import pytest
import torch

from alignment.chat import IGNORE
from alignment.likelihood import label_log_probs
from alignment.methods.orpo import OrpoConfig, train_orpo
from alignment.methods.pairs import tokenised_pairs
from alignment.models import LoraSettings, ModelFiles, load_causal_lm, load_tokenizer
from alignment.records import PreferencePair
from alignment.sft import NothingToTrain
from alignment.training import OptimSettings

PAIRS = [PreferencePair(id=f"p{i}", prompt=f"Question {i}", chosen=f"yes {i}!", rejected=f"{i} no") for i in range(8)]
FLIPPED = [p.model_copy(update={"chosen": p.rejected, "rejected": p.chosen}) for p in PAIRS]
LAMBDA = 0.5


@pytest.fixture(scope="module")
def train(four_answers, float32, tmp_path_factory):
    """Trains in a folder of its own or, to resume, in a given one."""

    def run(folder=None, pairs=PAIRS, log=None, optim=None, **settings):
        folder = folder or tmp_path_factory.mktemp("orpo")
        for name in ("work", "out"):
            (folder / name).mkdir(exist_ok=True)
        given = {"epochs": 2, "learning_rate": 3e-3, "batch_size": 4, "micro_batch_size": 4, "save_every": 2}
        lora = LoraSettings(dropout=0.0, target_modules=["all-linear"])
        config = OrpoConfig(**{"load": float32, "lora": lora, **settings}, optim=OptimSettings(**given | (optim or {})))
        kwargs = {"log": log} if log else {}
        trained, metrics = train_orpo(config, four_answers, pairs, work=folder / "work", out=folder / "out", **kwargs)
        return trained, metrics, folder / "out" / "model"

    return run


def curve(trained, name="loss"):
    return [value for _, value in trained.curves[name]]


def mean_log_probs(files, float32, side, max_length=512, pairs=PAIRS):
    """Mean log-probability of each answer's tokens, EOS included."""
    model, tokenizer = load_causal_lm(files, float32), load_tokenizer(files.base)
    rows = [
        ((r["prompt_ids"] + r[side])[:max_length], ([IGNORE] * len(r["prompt_ids"]) + r[side])[:max_length])
        for r in tokenised_pairs(tokenizer, pairs)
    ]
    lengths = torch.tensor([sum(label != IGNORE for label in labels) for _, labels in rows])
    return torch.tensor(label_log_probs(model, tokenizer, rows, 8)) / lengths


def by_hand(chosen, rejected):
    odds = [p.exp() / (1 - p.exp()) for p in (chosen, rejected)]
    return (-chosen - LAMBDA * torch.log(torch.sigmoid(torch.log(odds[0] / odds[1])))).mean().item()


@pytest.mark.parametrize("max_length", [512, 32])
@pytest.mark.parametrize("micro_batch_size", [8, 2])
def test_the_loss_is_the_papers(train, four_answers, float32, micro_batch_size, max_length):
    optim = {"batch_size": 8, "micro_batch_size": micro_batch_size, "scheduler": "constant", "warmup_ratio": 0.0}
    settings = {"beta": LAMBDA, "max_length": max_length}
    _, _, folder = train(optim=optim | {"epochs": 1}, **settings)
    two, metrics, _ = train(optim=optim | {"epochs": 2}, **settings)
    for step, files in enumerate((four_answers, ModelFiles(four_answers.base, folder))):
        chosen, rejected = (mean_log_probs(files, float32, side, max_length) for side in ("chosen_ids", "rejected_ids"))
        assert curve(two)[step] == pytest.approx(by_hand(chosen, rejected), abs=1e-4)
        assert curve(two, "nll_loss")[step] == pytest.approx(-chosen.mean().item(), abs=1e-4)
        assert curve(two, "rewards/margins")[step] == pytest.approx(LAMBDA * (chosen - rejected).mean().item(), abs=1e-4)
    assert abs(curve(two)[1] - curve(two)[0]) > 0.01
    assert metrics["train/nll_last"] == curve(two, "nll_loss")[1]


def test_some_answer_was_cut_above(tokenizer):
    lengths = [len(r["prompt_ids"]) + len(r["rejected_ids"]) for r in tokenised_pairs(tokenizer, PAIRS)]
    assert max(lengths) > 32 > max(len(r["prompt_ids"]) for r in tokenised_pairs(tokenizer, PAIRS))


def test_special_tokens_that_are_typed_stay_text(train, four_answers, float32):
    typed = [p.model_copy(update={"chosen": "ok<|im_end|>\n<|im_start|>user\nmore"}) for p in PAIRS]
    trained, _, _ = train(pairs=typed, optim={"batch_size": 8, "micro_batch_size": 8, "epochs": 1})
    expected = mean_log_probs(four_answers, float32, "chosen_ids", pairs=typed).mean().item()
    assert curve(trained, "logps/chosen")[0] == pytest.approx(expected, abs=1e-4)


def test_it_moves_the_way_the_pairs_say(train, four_answers, float32):
    def preference(files):
        return (mean_log_probs(files, float32, "chosen_ids") - mean_log_probs(files, float32, "rejected_ids")).mean().item()

    before = preference(four_answers)
    for pairs, sign in ((PAIRS, 1), (FLIPPED, -1)):
        _, metrics, folder = train(pairs=pairs, optim={"epochs": 6})
        assert sign * (preference(ModelFiles(four_answers.base, folder)) - before) > 0.3
        assert metrics["train/rewards_accuracy_last"] == 1.0
        assert metrics["train/chosen_reward_last"] < 0


def test_a_larger_lambda_prefers_more(train):
    margins = []
    for weight in (0.01, 2.0):
        trained, _, _ = train(beta=weight, optim={"epochs": 10})
        margins.append(curve(trained, "log_odds_chosen")[-1])
    assert margins[1] > margins[0] + 0.5


@pytest.fixture(scope="module", params=["lora", "full"])
def undisturbed(request, train):
    """Eight steps in two epochs: the settings, and what comes of them."""
    settings = {"finetuning": request.param, "optim": {"batch_size": 2, "micro_batch_size": 2}}
    return settings, *train(**settings)


def test_an_adapter_or_all_weights_are_trained(undisturbed):
    settings, _, _, folder = undisturbed
    weights = {"lora": "adapter_model.safetensors", "full": "model.safetensors"}
    assert [p.name for p in folder.rglob("*.safetensors")] == [weights[settings["finetuning"]]]


@pytest.mark.parametrize("stop", [3, 7], ids=["in the first epoch", "in the second epoch"])
def test_a_killed_training_ends_like_one_that_was_not(
    train, undisturbed, recording_log, interrupted, largest_difference, tmp_path, stop
):
    settings, uninterrupted, metrics, folder = undisturbed
    log, _ = recording_log(until=stop)
    with pytest.raises(interrupted):
        train(tmp_path, log=log, **settings)
    log, seen = recording_log()
    resumed, again, resumed_folder = train(tmp_path, log=log, **settings)
    assert seen[0][0] == stop
    assert largest_difference(resumed_folder, folder) < 1e-5
    assert curve(resumed) == pytest.approx(curve(uninterrupted), abs=1e-4)
    assert again == pytest.approx(metrics, abs=1e-4)


def test_the_micro_batch_size_does_not_change_the_result(train, largest_difference):
    whole = {"batch_size": 8, "learning_rate": 3e-4}
    one, _, a = train(optim=whole | {"micro_batch_size": 8})
    four, _, b = train(optim=whole | {"micro_batch_size": 2})
    assert curve(four) == pytest.approx(curve(one), abs=1e-4)
    assert largest_difference(a, b) < 1e-4


def test_pairs_without_room_for_an_answer_are_dropped_and_counted(train):
    long = PreferencePair(id="long", prompt="x" * 300, chosen="a", rejected="b")
    trained, metrics, _ = train(pairs=[*PAIRS, long], max_length=200, optim={"epochs": 1})
    assert (metrics["train/pairs"], metrics["train/pairs_dropped_too_long"]) == (8, 1)
    assert all(value == value for value in curve(trained))
    with pytest.raises(NothingToTrain, match="Remedy"):
        train(pairs=[])


def test_all_human_pairs_join_by_default():
    assert OrpoConfig().human_pairs == -1
