"""Reading what texts begin with in common once: which beginnings, that it saves the reading, and that it changes no result."""

import pytest
import torch

from alignment import prefixes
from alignment.chat import common_length
from alignment.critic import LocalAnswerer
from alignment.generation import SamplingSettings, sample_ids
from alignment.models import ModelFiles, load_causal_lm, load_reward_model
from alignment.prefixes import WORTH_READING, Prefixes, can_share, common_beginnings
from alignment.reward import score

SYSTEM = list(range(10, 60))
GREEDY = SamplingSettings(temperature=0.0, max_new_tokens=12)


def prompts(tokenizer, *tails):
    """Token ids that begin with the same 50 tokens."""
    return [SYSTEM + tokenizer(tail, add_special_tokens=False)["input_ids"] for tail in tails]


@pytest.fixture(params=["llama", "gpt2"])
def model(request, tiny_model, tiny_gpt2, float32):
    model = load_causal_lm(ModelFiles(tiny_model if request.param == "llama" else tiny_gpt2), float32)
    head = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
    model.lm_head.weight = torch.nn.Parameter(head * 0.3)  # with its own, tied one the likeliest token is always the last one
    return model


@pytest.fixture
def tokens_read(model):
    """How many tokens each forward pass was given, rows times columns."""
    read = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, out: read.append(inputs[0].numel()))
    return read


def test_common_beginnings_by_hand():
    a, b, c = [1] * 80 + [2] * 70 + [3], [1] * 80 + [2] * 70 + [4], [1] * 80 + [5]
    assert common_length(a, b) == 150
    assert common_beginnings([a, b, c]) == [[(1,) * 80], [(1,) * 80 + (2,) * 70]]
    assert common_beginnings([c, b]) == [[(1,) * 80]]
    assert common_beginnings([a]) == common_beginnings([]) == []


def test_of_equal_rows_all_but_the_last_token_is_read_first():
    row = [7] * (WORTH_READING + 1)
    assert common_beginnings([row, row]) == [[tuple(row[:-1])]]
    assert common_beginnings([row, row, [*row, 8]]) == [[tuple(row[:-1])]]
    assert common_beginnings([row[:-1], row[:-1]]) == []  # too little to be worth a pass


def test_no_row_goes_without_a_token_of_its_own():
    rows = [[1] * 100, [1] * 100 + [2], [1] * 99 + [3]]
    assert all(len(b) < min(len(r) for r in rows if r[: len(b)] == list(b)) for level in common_beginnings(rows) for b in level)


def test_logits_after_a_kept_beginning_are_those_of_the_whole_row(model, tokenizer):
    rows = [*prompts(tokenizer, "a", "what is a leap year", "xy"), [5, 6, 7]]
    with torch.inference_mode():
        read = Prefixes(model).with_beginnings_of(rows, 0, 4)
        assert [read.length_of(row) for row in rows] == [50, 50, 50, 0]
        for left in (True, False):
            batch = read.open(rows, 0, room=0, left=left, least=1)
            logits = model(**batch.inputs()).logits
            for i, row in enumerate(rows):
                last = -1 if left else len(row) - (50 if i < 3 else 0) - 1
                alone = model(torch.tensor([row])).logits[0, -1]
                torch.testing.assert_close(logits[i, last], alone, atol=1e-4, rtol=1e-4)


def test_sampling_reads_a_common_beginning_once(model, tokenizer, tokens_read):
    rows = prompts(tokenizer, "a", "bc", "leap year?")
    together = sample_ids(model, tokenizer, rows, GREEDY)
    longest = max(map(len, rows)) - 50
    assert tokens_read[:2] == [50, 3 * longest]
    tokens_read.clear()
    alone = [sample_ids(model, tokenizer, [row], GREEDY)[0] for row in rows]
    assert tokens_read[0] == len(rows[0])
    assert together == alone


def test_a_conversation_that_goes_on_is_not_read_again(model, tokenizer, tokens_read):
    answerer = LocalAnswerer(model, tokenizer)
    asked = [[{"role": "user", "content": text}] for text in ("x" * 70, "y" * 90)]
    first = answerer.answer(asked, GREEDY, seeds=[0, 1], continued=True)
    more = [
        [*c, {"role": "assistant", "content": a.text}, {"role": "user", "content": "again"}]
        for c, a in zip(asked, first, strict=True)
    ]
    tokens_read.clear()
    second = answerer.answer(more, GREEDY, seeds=[0, 1])
    read = tokens_read[0]
    tokens_read.clear()
    assert LocalAnswerer(model, tokenizer).answer(more, GREEDY, seeds=[0, 1]) == second
    assert read < tokens_read[0] - 2 * 60  # all of what both had been asked before
    tokens_read.clear()
    answerer.answer(more, GREEDY, seeds=[0, 1])  # what nobody said would go on was let go
    assert tokens_read[0] > read


def test_what_does_not_fit_the_memory_set_aside_is_read_again(model, tokenizer, tokens_read, monkeypatch):
    monkeypatch.setattr(prefixes, "KEPT_BYTES", 0)
    answerer = LocalAnswerer(model, tokenizer)
    asked = [[{"role": "user", "content": "x" * 70}]]
    (first,) = answerer.answer(asked, GREEDY, seeds=[0], continued=True)
    more = [[*asked[0], {"role": "assistant", "content": first.text}, {"role": "user", "content": "again"}]]
    tokens_read.clear()
    second = answerer.answer(more, GREEDY, seeds=[0])
    assert tokens_read[0] > 70
    assert LocalAnswerer(model, tokenizer).answer(more, GREEDY, seeds=[0]) == second


def test_sampling_leaves_the_vocabularys_head_as_it_was(model, tokenizer):
    sample_ids(model, tokenizer, prompts(tokenizer, "a"), GREEDY)
    assert "forward" not in vars(model.get_output_embeddings())


def test_scores_are_those_of_texts_read_alone(tiny_model, tokenizer, float32):
    scorer = load_reward_model(ModelFiles(tiny_model), float32, tokenizer=tokenizer, seed=3)
    question = {"role": "user", "content": "why is the sky blue? " * 4}
    answers = ["because", "light is scattered by the air", "it is not", "ask me later, please"] * 3
    texts = [[question, {"role": "assistant", "content": f"{a} {i}"}] for i, a in enumerate(answers)]
    read = []
    scorer.get_input_embeddings().register_forward_hook(lambda module, inputs, out: read.append(inputs[0].shape))
    together = score(scorer, tokenizer, texts, 4)
    assert sum(n * t for n, t in read) < 12 * len("why is the sky blue? " * 4)  # the question alone, twelve times, is more
    assert together == pytest.approx([score(scorer, tokenizer, [text], 1)[0] for text in texts], abs=1e-4)
    assert together == score(scorer, tokenizer, texts[::-1], 4)[::-1]


@pytest.mark.parametrize("kept", [2**30, 1])
def test_no_more_texts_are_read_at_once_than_a_batch_holds(tiny_model, tokenizer, float32, monkeypatch, kept):
    scorer = load_reward_model(ModelFiles(tiny_model), float32, tokenizer=tokenizer, seed=3)
    questions = [{"role": "user", "content": f"{i} why is the sky blue? " * 2} for i in range(8)]
    texts = [[question, {"role": "assistant", "content": answer}] for question in questions for answer in ("yes", "no it is not")]
    read = []
    scorer.get_input_embeddings().register_forward_hook(lambda module, inputs, out: read.append(inputs[0].shape[0]))
    monkeypatch.setattr(prefixes, "KEPT_BYTES", kept)
    together = score(scorer, tokenizer, texts, 2)
    # Eight texts of two rows each, after what is read first: the opening of all, then the questions until that is too much.
    assert read == ([1, 2, 2, 2, 2] if kept > 1 else [1]) + [2] * 8
    assert together == pytest.approx([score(scorer, tokenizer, [text], 1)[0] for text in texts], abs=1e-4)


def test_a_model_whose_layers_look_at_a_window_reads_everything(tokenizer, float32):
    from transformers import MistralConfig, MistralForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=len(tokenizer), num_key_value_heads=1, sliding_window=16, **shape)
    model = MistralForCausalLM(config).eval()
    assert not can_share(model)
    rows = prompts(tokenizer, "a", "bc")
    assert sample_ids(model, tokenizer, rows, GREEDY) == [sample_ids(model, tokenizer, [row], GREEDY)[0] for row in rows]
