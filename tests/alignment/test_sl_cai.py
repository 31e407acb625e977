"""SL-CAI: it goes on from the SFT checkpoint, on revisions and demonstrations, and answers as the revisions do."""

from collections import Counter

import pytest

from alignment.chat import training_example
from alignment.errors import UserError
from alignment.likelihood import label_log_probs
from alignment.methods.sl_cai import SlCaiConfig, train_sl_cai, training_conversations
from alignment.models import ModelFiles, load_causal_lm, load_tokenizer
from alignment.records import Conversation, Message, PreferencePair
from alignment.sft import NothingToTrain
from alignment.training import OptimSettings

PAIRS = [PreferencePair(id=f"p{i}", prompt=f"Question {i}", chosen=f"kind {i}", rejected=f"rude {i}") for i in range(8)]


def conversation(i, category=""):
    turns = (Message(role="user", content=f"hello {i}"), Message(role="assistant", content=f"hi {i}"))
    return Conversation(id=f"{category}{i}", messages=turns, category=category)


DEMONSTRATIONS = [*(conversation(i) for i in range(12)), *(conversation(i, "approved") for i in range(4))]
CRITIQUES = [conversation(i, "critique") for i in range(20)]
HELDOUT = [conversation(i) for i in range(50, 54)]


@pytest.fixture(scope="module")
def train(sft_adapter, float32, tmp_path_factory):
    """Trains in a folder of its own or, to resume, in a given one."""

    def run(folder=None, start=None, pairs=PAIRS, log=None, optim=None, **settings):
        folder = folder or tmp_path_factory.mktemp("sl_cai")
        for name in ("work", "out"):
            (folder / name).mkdir(exist_ok=True)
        given = {"epochs": 2, "learning_rate": 1e-3, "batch_size": 4, "micro_batch_size": 4, "save_every": 2}
        config = SlCaiConfig(**{"load": float32, "demonstrations": 8, **settings}, optim=OptimSettings(**given | (optim or {})))
        kwargs = {"log": log} if log else {}
        trained, metrics = train_sl_cai(
            config,
            start or sft_adapter,
            pairs,
            [*DEMONSTRATIONS, *CRITIQUES],
            HELDOUT,
            work=folder / "work",
            out=folder / "out",
            **kwargs,
        )
        return trained, metrics, folder / "out" / "model"

    return run


def nats(files, float32, conversations):
    """Summed negative log-likelihood of the answers, and their number of tokens."""
    model, tokenizer = load_causal_lm(files, float32), load_tokenizer(files.base)
    examples = [training_example(tokenizer, [m.model_dump() for m in c.messages]) for c in conversations]
    total = -sum(label_log_probs(model, tokenizer, [(e.input_ids, e.labels) for e in examples], 8))
    return total, sum(label != -100 for e in examples for label in e.labels)


def test_revisions_are_mixed_with_demonstrations_but_not_with_worked_critiques():
    rows = training_conversations(PAIRS, [*DEMONSTRATIONS, *CRITIQUES], 6, seed=0)
    assert Counter(r.category == "revision" for r in rows) == {True: 8, False: 6}
    assert "critique" not in {r.category for r in rows}
    revisions = {r.id: [m.content for m in r.messages] for r in rows if r.category == "revision"}
    assert revisions == {f"p{i}-revision": [f"Question {i}", f"kind {i}"] for i in range(8)}
    assert rows == training_conversations(PAIRS, [*DEMONSTRATIONS, *CRITIQUES], 6, seed=0)
    assert rows != training_conversations(PAIRS, [*DEMONSTRATIONS, *CRITIQUES], 6, seed=1)
    for count, expected in ((-1, 24), (99, 24), (0, 8)):
        assert len(training_conversations(PAIRS, [*DEMONSTRATIONS, *CRITIQUES], count, seed=0)) == expected


def test_the_turns_before_the_last_are_kept():
    history = (Message(role="user", content="first"), Message(role="assistant", content="second"))
    (row,) = training_conversations([PAIRS[0].model_copy(update={"history": history})], [], 0, seed=0)
    assert [m.content for m in row.messages] == ["first", "second", "Question 0", "kind 0"]


def test_it_begins_at_the_sft_checkpoint_and_moves_towards_the_revisions(train, sft_adapter, float32):
    rows = training_conversations(PAIRS, DEMONSTRATIONS, 8, seed=0)
    optim = {"batch_size": 16, "micro_batch_size": 16, "epochs": 8, "learning_rate": 1e-2}
    trained, metrics, folder = train(optim=optim)
    total, tokens = nats(sft_adapter, float32, rows)
    assert trained.curves["loss"][0][1] == pytest.approx(total / tokens, abs=1e-4)
    policy = ModelFiles(sft_adapter.base, folder)
    assert nats(policy, float32, rows)[0] < 0.8 * total
    assert (metrics["train/revisions"], metrics["train/demonstrations"], metrics["train/rows"]) == (8, 8, 16)
    held, held_tokens = nats(sft_adapter, float32, HELDOUT)
    assert metrics["heldout/loss_before"] == pytest.approx(held / held_tokens, abs=1e-4)
    held, held_tokens = nats(policy, float32, HELDOUT)
    assert metrics["heldout/loss"] == pytest.approx(held / held_tokens, abs=1e-4)


def test_over_a_full_sft_model_a_new_adapter_or_all_weights_are_trained(train, four_answers):
    for finetuning, weights in (("lora", "adapter_model.safetensors"), ("full", "model.safetensors")):
        _, _, folder = train(start=four_answers, finetuning=finetuning, optim={"epochs": 1})
        assert [p.name for p in folder.rglob("*.safetensors")] == [weights]
    with pytest.raises(UserError, match=r"finetuning: full.*Remedy"):
        train(finetuning="full")


def test_without_pairs_there_is_nothing_to_train(train):
    with pytest.raises(NothingToTrain, match=r"no revisions.*Remedy"):
        train(pairs=[])


def test_a_killed_training_ends_like_one_that_was_not(train, recording_log, interrupted, largest_difference, tmp_path):
    _, metrics, folder = train()
    log, _ = recording_log(until=7)
    with pytest.raises(interrupted):
        train(tmp_path, log=log)
    log, seen = recording_log()
    _, again, resumed_folder = train(tmp_path, log=log)
    assert seen[0][0] == 7
    assert largest_difference(resumed_folder, folder) < 1e-5
    assert again == pytest.approx(metrics, abs=1e-4)
