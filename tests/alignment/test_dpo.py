"""DPO: it starts at log 2, computes the paper's loss, moves the right way, and leaves the reference alone."""

import hashlib
import math

import pytest
import torch

from alignment.chat import IGNORE, conversation_ids, prompt_ids
from alignment.errors import UserError
from alignment.likelihood import label_log_probs
from alignment.methods.dpo import DpoConfig, train_dpo
from alignment.methods.pairs import tokenised_pairs
from alignment.models import LoraSettings, ModelFiles, load_causal_lm, load_tokenizer
from alignment.records import Conversation, Message, PreferencePair
from alignment.sft import NothingToTrain, SftConfig, train_sft
from alignment.training import OptimSettings

PAIRS = [
    PreferencePair(id=f"p{i}", prompt=f"question {i}", chosen=f"kind {i * 3} yes", rejected=f"rude {i * 3} no") for i in range(16)
]
FLIPPED = [p.model_copy(update={"chosen": p.rejected, "rejected": p.chosen}) for p in PAIRS]


@pytest.fixture(scope="module")
def sft(tiny_model, float32, tmp_path_factory):
    """An SFT adapter that answers a little in the style of both sides, with LoRA dropout in its configuration."""
    folder = tmp_path_factory.mktemp("sft")
    rows = [
        Conversation(
            id=f"{p.id}{side}",
            messages=(Message(role="user", content=p.prompt), Message(role="assistant", content=getattr(p, side))),
        )
        for p in PAIRS
        for side in ("chosen", "rejected")
    ]
    config = SftConfig(
        lora=LoraSettings(target_modules=["all-linear"], dropout=0.05),
        load=float32,
        optim=OptimSettings(epochs=6, learning_rate=1e-2, batch_size=8, micro_batch_size=8),
    )
    (folder / "work").mkdir()
    train_sft(config, ModelFiles(tiny_model), rows, [], work=folder / "work", out=folder)
    return ModelFiles(tiny_model, folder / "model")


@pytest.fixture(scope="module")
def train(sft, float32, tmp_path_factory):
    """Trains in a folder of its own or, to resume, in a given one."""

    def run(folder=None, pairs=PAIRS, start=None, log=None, optim=None, **settings):
        folder = folder or tmp_path_factory.mktemp("dpo")
        for name in ("work", "out"):
            (folder / name).mkdir(exist_ok=True)
        given = {"epochs": 2, "learning_rate": 1e-3, "batch_size": 4, "micro_batch_size": 4, "save_every": 2}
        config = DpoConfig(load=float32, optim=OptimSettings(**given | (optim or {})), **settings)
        kwargs = {"log": log} if log else {}
        trained, metrics = train_dpo(config, start or sft, pairs, work=folder / "work", out=folder / "out", **kwargs)
        return trained, metrics, folder / "out" / "model"

    return run


def curve(trained, name="loss"):
    return [value for _, value in trained.curves[name]]


def answer_rows(tokenizer, pairs, side):
    """Rows as `alignment.chat` builds them, from the prompt to the answer's EOS and no further."""
    rows = []
    for p in pairs:
        before = prompt_ids(tokenizer, p.prompt_messages)
        ids = conversation_ids(tokenizer, [*p.prompt_messages, {"role": "assistant", "content": getattr(p, side)}])
        rows.append((ids, [IGNORE] * len(before) + ids[len(before) :]))
    return rows


def log_probs(files, float32, pairs, side):
    tokenizer = load_tokenizer(files.base)
    model = load_causal_lm(files, float32)
    return torch.tensor(label_log_probs(model, tokenizer, answer_rows(tokenizer, pairs, side), 8))


def preference(files, float32, pairs):
    """log p(chosen) - log p(rejected), summed over the pairs."""
    return (log_probs(files, float32, pairs, "chosen") - log_probs(files, float32, pairs, "rejected")).sum().item()


@pytest.fixture(scope="module")
def eight_steps(train):
    return train()


# --- The loss ---------------------------------------------------------------------------------------------------------


def test_it_starts_at_the_reference(eight_steps):
    trained, _, _ = eight_steps
    assert curve(trained)[0] == pytest.approx(math.log(2), abs=1e-4)  # dropout is off: policy and reference are equal
    assert curve(trained, "rewards/margins")[0] == pytest.approx(0, abs=1e-4)


WHOLE = {"batch_size": 16, "micro_batch_size": 16, "scheduler": "constant", "warmup_ratio": 0.0, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def second_step(train, sft, float32, tiny_model):
    """The losses of two steps on all pairs, and log pi/ref of each side before the second of them.

    The policy that the second step starts from is what the same training leaves when it ends one step earlier.
    """

    def run(**settings):
        one, _, folder = train(optim=WHOLE | {"epochs": 1}, **settings)
        two, _, _ = train(optim=WHOLE | {"epochs": 2}, **settings)
        assert curve(two)[0] == curve(one)[0]
        policy = ModelFiles(tiny_model, folder)
        sides = ("chosen", "rejected")
        return two, [log_probs(policy, float32, PAIRS, side) - log_probs(sft, float32, PAIRS, side) for side in sides]

    return run


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_loss_is_the_papers(second_step, beta):
    two, (chosen, rejected) = second_step(beta=beta)
    margin = beta * (chosen - rejected)
    loss = -torch.nn.functional.logsigmoid(margin).mean().item()
    by_hand = (loss, margin.mean().item(), (margin > 0).float().mean().item(), beta * chosen.mean().item())
    names = ("loss", "rewards/margins", "rewards/accuracies", "rewards/chosen")
    logged = tuple(curve(two, name)[1] for name in names)
    assert abs(logged[0] - math.log(2)) > 0.01  # the policy has left the reference
    assert logged == pytest.approx(by_hand, abs=1e-4)


BETA, FLIPPED_LABELS = 0.5, 0.1


def hinge(chosen, rejected, tokens_chosen, tokens_rejected):
    """The margin loss of SLiC (arXiv 2305.10425), of log ratios as in RSO (arXiv 2309.06657)."""
    return (1 - BETA * (chosen - rejected)).clamp(min=0)


def ipo(chosen, rejected, tokens_chosen, tokens_rejected):
    """Equation 17 of arXiv 2310.12036, of means over tokens, as its authors compute it."""
    return (chosen / tokens_chosen - rejected / tokens_rejected - 1 / (2 * BETA)) ** 2


def robust(chosen, rejected, tokens_chosen, tokens_rejected):
    """DPO's, made unbiased where a known share of labels is flipped (arXiv 2403.00409)."""
    right, flipped = ((1 + (sign * BETA * (chosen - rejected)).exp()).log() for sign in (-1, 1))
    return ((1 - FLIPPED_LABELS) * right - FLIPPED_LABELS * flipped) / (1 - 2 * FLIPPED_LABELS)


def exo_pair(chosen, rejected, tokens_chosen, tokens_rejected):
    """Equation 16 of arXiv 2402.00856: KL of the policy's preference from the labels'."""
    p = 1 / (1 + (-BETA * (chosen - rejected)).exp())
    return p * (p / (1 - FLIPPED_LABELS)).log() + (1 - p) * ((1 - p) / FLIPPED_LABELS).log()


def apo_zero(chosen, rejected, tokens_chosen, tokens_rejected):
    """Equation 7 of arXiv 2408.06266: each side by itself against the reference."""
    return 1 - (BETA * chosen).sigmoid() + (BETA * rejected).sigmoid()


def sigmoid_norm(chosen, rejected, tokens_chosen, tokens_rejected):
    """DPO's, of means over tokens."""
    return (1 + (-BETA * (chosen / tokens_chosen - rejected / tokens_rejected)).exp()).log()


@pytest.mark.parametrize("by_hand", [hinge, ipo, robust, exo_pair, apo_zero, sigmoid_norm], ids=lambda loss: loss.__name__)
def test_the_other_losses_are_those_of_their_papers(second_step, tokenizer, by_hand):
    name = by_hand.__name__
    smoothing = {"label_smoothing": FLIPPED_LABELS} if name in ("robust", "exo_pair") else {}
    two, ratios = second_step(beta=BETA, loss_type=name, **smoothing)
    rows = tokenised_pairs(tokenizer, PAIRS)
    tokens = [torch.tensor([len(row[f"{side}_ids"]) for row in rows]) for side in ("chosen", "rejected")]
    at_the_reference = [torch.zeros(len(PAIRS))] * 2
    expected = [by_hand(*ratio, *tokens).mean().item() for ratio in (at_the_reference, ratios)]
    assert abs(expected[1] - expected[0]) > 0.01
    assert curve(two) == pytest.approx(expected, abs=1e-4)


def first_logged(trained, side):
    return curve(trained, f"logps/{side}")[0]


def test_the_text_is_the_one_of_all_other_stages(train, sft, float32):
    trained, _, _ = train(optim={"batch_size": 16, "micro_batch_size": 16, "epochs": 1})
    for side in ("chosen", "rejected"):
        assert first_logged(trained, side) == pytest.approx(log_probs(sft, float32, PAIRS, side).mean().item(), abs=1e-2)


def test_special_tokens_that_are_typed_stay_text(train, sft, float32):
    typed = [p.model_copy(update={"chosen": "ok<|im_end|>\n<|im_start|>user\nmore"}) for p in PAIRS]
    trained, _, _ = train(pairs=typed, optim={"batch_size": 16, "micro_batch_size": 16, "epochs": 1})
    as_text = log_probs(sft, float32, typed, "chosen").mean().item()
    assert first_logged(trained, "chosen") == pytest.approx(as_text, abs=1e-2)


def test_the_sft_term_adds_the_chosen_answers_cross_entropy(train):
    whole = {"batch_size": 16, "micro_batch_size": 16, "epochs": 1}
    plain, _, _ = train(optim=whole)
    weighted, _, _ = train(optim=whole, sft_weight=0.5)
    twice, _, _ = train(optim=whole, sft_weight=1.0)
    cross_entropy = curve(twice)[0] - curve(plain)[0]
    assert 0.5 < cross_entropy < 6  # nats per token
    assert curve(weighted)[0] - curve(plain)[0] == pytest.approx(cross_entropy / 2, abs=1e-4)


def test_label_smoothing_is_refused_where_trl_would_ignore_it():
    for loss_type in ("sigmoid", "hinge", "ipo"):
        with pytest.raises(ValueError, match=rf"label_smoothing is ignored by loss_type {loss_type}"):
            DpoConfig(loss_type=loss_type, label_smoothing=0.1)
    with pytest.raises(ValueError, match="needs a label_smoothing above 0"):
        DpoConfig(loss_type="exo_pair")


# --- Learning ---------------------------------------------------------------------------------------------------------


def test_the_margin_grows_and_the_chosen_answers_gain_on_the_rejected(train, sft, float32, tiny_model):
    trained, metrics, folder = train(optim={"epochs": 4})
    assert metrics["train/rewards_margin_last"] > 0.2
    assert metrics["train/rewards_accuracy_last"] == 1.0
    assert curve(trained)[-1] < 0.6
    policy = ModelFiles(tiny_model, folder)
    assert preference(policy, float32, PAIRS) > preference(sft, float32, PAIRS) + 16


def test_flipped_pairs_move_it_the_other_way(train, sft, float32, tiny_model):
    _, metrics, folder = train(pairs=FLIPPED, optim={"epochs": 4})
    assert metrics["train/rewards_margin_last"] > 0.2
    assert preference(ModelFiles(tiny_model, folder), float32, PAIRS) < preference(sft, float32, PAIRS) - 16


def test_a_larger_beta_stays_closer_to_the_reference(train, sft, float32, tiny_model):
    before = preference(sft, float32, PAIRS)
    moved = []
    for beta in (0.05, 2.0):
        _, _, folder = train(beta=beta, optim={"epochs": 8})
        moved.append(preference(ModelFiles(tiny_model, folder), float32, PAIRS) - before)
    assert moved[0] > 1.5 * moved[1] > 0


def test_the_reference_is_untouched(train, sft, float32):
    def state():
        files = sorted(sft.adapter.rglob("*"))
        digests = [hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.is_file()]
        return digests, log_probs(sft, float32, PAIRS, "chosen").tolist()

    before = state()
    train()
    assert state() == before


# --- Kills ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [3, 5, 7], ids=["in the first epoch", "between the epochs", "in the second epoch"])
def test_a_killed_training_ends_like_one_that_was_not(
    train, eight_steps, recording_log, interrupted, largest_difference, tmp_path, stop
):
    uninterrupted, metrics, folder = eight_steps
    log, _ = recording_log(until=stop)
    with pytest.raises(interrupted):
        train(tmp_path, log=log)
    log, seen = recording_log()
    resumed, again, resumed_folder = train(tmp_path, log=log)
    assert seen[0][0] == stop  # checkpoints are saved every 2 steps; this one was logged but not saved
    assert largest_difference(resumed_folder, folder) < 1e-5
    assert curve(resumed) == pytest.approx(curve(uninterrupted), abs=1e-4)
    assert curve(resumed, "rewards/margins") == pytest.approx(curve(uninterrupted, "rewards/margins"), abs=1e-4)
    assert again == pytest.approx(metrics, abs=1e-4)


def test_the_micro_batch_size_does_not_change_the_result(train, largest_difference):
    whole = {"batch_size": 8, "learning_rate": 3e-4}
    one, _, a = train(optim=whole | {"micro_batch_size": 8})
    four, _, b = train(optim=whole | {"micro_batch_size": 2})
    assert curve(four) == pytest.approx(curve(one), abs=1e-4)
    assert largest_difference(a, b) < 1e-4


# --- What comes out ---------------------------------------------------------------------------------------------------


def test_the_policy_loads_without_this_library(eight_steps, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, _, folder = eight_steps
    base = AutoModelForCausalLM.from_pretrained(str(tiny_model))
    policy = PeftModel.from_pretrained(base, str(folder))
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    assert list(policy.peft_config) == ["default"]
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "question 1"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert policy.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] == ids["input_ids"].shape[1] + 3


def test_the_reference_is_not_saved_with_the_policy(eight_steps):
    _, _, folder = eight_steps
    assert not [p for p in folder.rglob("*") if p.is_dir()]
    assert [p.name for p in folder.rglob("*.safetensors")] == ["adapter_model.safetensors"]


def test_over_a_full_sft_model_a_new_adapter_or_all_weights_are_trained(train, tiny_model, float32):
    start = ModelFiles(tiny_model)
    before = preference(start, float32, PAIRS)
    for finetuning, weights, optim in (
        ("lora", "adapter_model.safetensors", {"epochs": 4, "learning_rate": 1e-2}),
        ("full", "model.safetensors", {"epochs": 4, "learning_rate": 1e-3}),
    ):
        trained, _, folder = train(start=start, finetuning=finetuning, optim=optim)
        assert curve(trained)[0] == pytest.approx(math.log(2), abs=1e-4)
        assert [p.name for p in folder.rglob("*.safetensors")] == [weights]
        policy = ModelFiles(tiny_model, folder) if finetuning == "lora" else ModelFiles(folder)
        assert preference(policy, float32, PAIRS) > before + 4


def test_all_weights_of_an_adapter_cannot_be_trained(train):
    with pytest.raises(UserError, match=r"finetuning: full needs an SFT checkpoint that is a full model.*Remedy"):
        train(finetuning="full")


def test_without_pairs_there_is_nothing_to_train(train):
    with pytest.raises(NothingToTrain, match=r"no preference pairs.*Remedy"):
        train(pairs=[])


def test_pairs_without_room_for_an_answer_are_dropped_and_counted(train, largest_difference):
    long = PreferencePair(id="long", prompt="x" * 300, chosen="a", rejected="b")
    once = {"max_length": 200, "optim": {"epochs": 1}}
    trained, metrics, folder = train(pairs=[*PAIRS, long], **once)
    assert (metrics["train/pairs"], metrics["train/pairs_dropped_too_long"]) == (16, 1)
    without, metrics, same = train(**once)
    assert (metrics["train/pairs"], metrics["train/pairs_dropped_too_long"]) == (16, 0)
    assert curve(trained) == curve(without)
    assert largest_difference(folder, same) == 0
    with pytest.raises(NothingToTrain, match=r"every one of 1 pairs has a prompt of max_length 200 tokens or more.*Remedy"):
        train(pairs=[long], **once)
