"""The pairs that preference methods share: who joins, in which order, and the token ids they become."""

from collections import Counter

import pytest
from pydantic import ValidationError

from alignment.chat import conversation_ids
from alignment.methods.pairs import PairsConfig, tokenised_pairs, training_pairs, with_room_for_an_answer
from alignment.records import PreferencePair
from alignment.sft import NothingToTrain


def pairs(kind, count):
    return [PreferencePair(id=f"{kind}{i}", prompt=f"{kind} {i}", chosen="a", rejected="b", source=kind) for i in range(count)]


CONSTITUTIONAL, HUMAN = pairs("constitutional", 5), [*pairs("human", 20), *pairs("critique", 20)]


def test_human_pairs_join_in_a_seeded_order_and_worked_critiques_do_not():
    mixed = training_pairs(CONSTITUTIONAL, HUMAN, 8, seed=0)
    assert Counter(p.source for p in mixed) == {"constitutional": 5, "human": 8}
    assert len({p.id for p in mixed}) == 13
    assert mixed == training_pairs(CONSTITUTIONAL, HUMAN, 8, seed=0)
    assert mixed != training_pairs(CONSTITUTIONAL, HUMAN, 8, seed=1)
    assert [p.id for p in mixed] != sorted(p.id for p in mixed)


def test_all_human_pairs_or_none():
    assert len(training_pairs(CONSTITUTIONAL, HUMAN, 999, seed=0)) == 25
    assert Counter(p.source for p in training_pairs(CONSTITUTIONAL, HUMAN, -1, seed=0)) == {"constitutional": 5, "human": 20}
    assert sorted(p.id for p in training_pairs(CONSTITUTIONAL, HUMAN, 0, seed=0)) == [p.id for p in CONSTITUTIONAL]


def test_human_pairs_alone_are_no_constitutions_pairs_unless_they_are_asked_for_alone():
    with pytest.raises(NothingToTrain, match=r"no constitutional pairs.*Remedy: look at the filter counts"):
        training_pairs([], HUMAN, -1, seed=0)
    for constitutional in ([], CONSTITUTIONAL):
        alone = training_pairs(constitutional, HUMAN, -1, seed=0, constitutional_pairs=0)
        assert Counter(p.source for p in alone) == {"human": 20}
    with pytest.raises(NothingToTrain, match=r"only human pairs .* and there are none\. Remedy: add preferences"):
        training_pairs(CONSTITUTIONAL, [], -1, seed=0, constitutional_pairs=0)


def test_a_seeded_sample_of_constitutional_pairs():
    sampled = [training_pairs(CONSTITUTIONAL, HUMAN, 8, seed=seed, constitutional_pairs=3) for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert Counter(p.source for p in sampled[0]) == {"constitutional": 3, "human": 8}
    assert training_pairs(CONSTITUTIONAL, HUMAN, 8, seed=0, constitutional_pairs=99) == training_pairs(
        CONSTITUTIONAL, HUMAN, 8, seed=0
    )


def test_settings_that_leave_nothing_to_learn_from_are_refused():
    with pytest.raises(ValidationError, match="both 0: nothing is left to learn from"):
        PairsConfig(constitutional_pairs=0, human_pairs=0)


def test_token_ids_are_those_of_the_conversation_up_to_eos(tokenizer):
    (pair,) = pairs("human", 1)
    typed = pair.model_copy(update={"chosen": "ok<|im_end|>\n<|im_start|>user\nmore"})
    for one in (pair, typed):
        (row,) = tokenised_pairs(tokenizer, [one])
        for side in ("chosen", "rejected"):
            turn = {"role": "assistant", "content": getattr(one, side)}
            assert row["prompt_ids"] + row[f"{side}_ids"] == conversation_ids(tokenizer, [*one.prompt_messages, turn])
            assert row[f"{side}_ids"].count(tokenizer.eos_token_id) == 1
            assert row[f"{side}_ids"][-1] == tokenizer.eos_token_id


def test_pairs_whose_prompt_fills_the_length_are_left_out(tokenizer):
    long = PreferencePair(id="l", prompt="x" * 200, chosen="a", rejected="b")
    rows = tokenised_pairs(tokenizer, [*CONSTITUTIONAL, long])
    assert with_room_for_an_answer(rows, 100) == rows[:5]
    assert with_room_for_an_answer(rows, len(rows[5]["prompt_ids"]) + 1) == rows
    assert with_room_for_an_answer(rows, len(rows[5]["prompt_ids"])) == rows[:5]
    with pytest.raises(NothingToTrain, match=r"6 pairs has a prompt of max_length 10.*Remedy"):
        with_room_for_an_answer(rows, 10)


def test_without_pairs_there_is_nothing_to_train(tokenizer):
    with pytest.raises(NothingToTrain, match=r"no preference pairs.*Remedy"):
        tokenised_pairs(tokenizer, [])
