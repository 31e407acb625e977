"""Sampling: an answer depends on its prompt and its seed, not on the batch it happened to be in."""

import math
from collections import Counter

import pytest
import torch

from alignment.chat import prompt_ids
from alignment.generation import SamplingSettings, completion, generate, sample_ids

QUESTIONS = ["Hi", "What is a leap year?", "x" * 70, "Warum ist der Himmel blau?", "?", "1 + 1", "y" * 33, "東京 か"]
CONVERSATIONS = [[{"role": "user", "content": q}] for q in QUESTIONS]
GREEDY = SamplingSettings(temperature=0.0, max_new_tokens=16)
SAMPLED = SamplingSettings(temperature=1.0, top_k=50, max_new_tokens=16)
SEEDS = [11, 22, 33, 44, 55, 66, 77, 2**62 + 1]


def next_logits(model, ids):
    """Float32 logits (V) after these tokens, without generate, cache or padding."""
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0, -1].float()


def greedy_by_hand(model, ids, steps):
    out = []
    for _ in range(steps):
        out.append(int(next_logits(model, ids + out).argmax()))
    return out


def talkative(folder, float32):
    """A tiny model that does not merely echo: with its small tied embeddings the likeliest token is always the last one."""
    from alignment.models import ModelFiles, load_causal_lm

    model = load_causal_lm(ModelFiles(folder), float32)
    head = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
    model.lm_head.weight = torch.nn.Parameter(head * 0.3)
    return model


@pytest.fixture(scope="module")
def model(tiny_model, float32):
    return talkative(tiny_model, float32)


@pytest.fixture(params=["llama", "gpt2"])
def either_model(request, model, tiny_gpt2, float32):
    return model if request.param == "llama" else talkative(tiny_gpt2, float32)


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_batch_size_changes_nothing(either_model, tokenizer, settings):
    def answers(batch_size):
        batched = settings.model_copy(update={"batch_size": batch_size})
        return generate(either_model, tokenizer, CONVERSATIONS, batched, seeds=SEEDS)

    assert answers(1) == answers(8) == answers(3)
    assert len({a.text for a in answers(8)}) > 4


def test_order_changes_nothing(model, tokenizer):
    answers = generate(model, tokenizer, CONVERSATIONS, SAMPLED, seeds=SEEDS)
    order = [3, 7, 0, 5, 1, 6, 2, 4]
    again = generate(model, tokenizer, [CONVERSATIONS[i] for i in order], SAMPLED, seeds=[SEEDS[i] for i in order])
    assert again == [answers[i] for i in order]


def test_repetition_penalty_is_for_the_text_not_for_the_padding(model, tokenizer):
    settings = GREEDY.model_copy(update={"repetition_penalty": 1.5})
    alone = generate(model, tokenizer, CONVERSATIONS, settings.model_copy(update={"batch_size": 1}))
    assert generate(model, tokenizer, CONVERSATIONS, settings) == alone
    assert alone != generate(model, tokenizer, CONVERSATIONS, GREEDY)


def test_other_seeds_other_answers(model, tokenizer):
    first = generate(model, tokenizer, CONVERSATIONS, SAMPLED, seeds=SEEDS)
    other = generate(model, tokenizer, CONVERSATIONS, SAMPLED, seeds=[s + 1 for s in SEEDS])
    assert all(a.text != b.text for a, b in zip(first, other, strict=True))
    same_prompt = generate(model, tokenizer, CONVERSATIONS[:1] * 6, SAMPLED, seeds=SEEDS[:6])
    assert len({a.text for a in same_prompt}) == 6


def test_sampling_from_the_likeliest_token_alone_is_greedy(model, tokenizer):
    top_1 = SAMPLED.model_copy(update={"top_k": 1})
    greedy = generate(model, tokenizer, CONVERSATIONS, GREEDY)
    assert generate(model, tokenizer, CONVERSATIONS, top_1, seeds=SEEDS) == greedy


def test_greedy_is_the_likeliest_token_again_and_again(either_model, tokenizer):
    answers = generate(either_model, tokenizer, CONVERSATIONS, GREEDY)
    for conversation, answer in zip(CONVERSATIONS, answers, strict=True):
        ids = greedy_by_hand(either_model, prompt_ids(tokenizer, conversation), 16)
        assert tokenizer.eos_token_id not in ids
        text = tokenizer.decode(ids, skip_special_tokens=True).replace("\0", "").strip()
        assert (answer.text, answer.tokens, answer.ended) == (text, 16, False)


def test_an_answer_ends_at_its_eos_which_counts_as_a_token(model, tokenizer):
    prompt = prompt_ids(tokenizer, CONVERSATIONS[1])
    ids = greedy_by_hand(model, prompt, 16)
    stop = next(i for i in range(3, 16) if ids[i] not in ids[:i] and ids[i] not in prompt)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[stop])  # what the model says next now means "stop"
    assert prompt_ids(tokenizer, CONVERSATIONS[1]) == prompt
    (answer,) = generate(model, tokenizer, CONVERSATIONS[1:2], GREEDY)
    assert (answer.tokens, answer.ended) == (stop + 1, True)
    assert answer.text == tokenizer.decode(ids[:stop], skip_special_tokens=True).replace("\0", "").strip()
    # at the limit: one token short of its EOS, and exactly long enough
    for limit, tokens, ended in ((stop, stop, False), (stop + 1, stop + 1, True)):
        (cut,) = generate(model, tokenizer, CONVERSATIONS[1:2], GREEDY.model_copy(update={"max_new_tokens": limit}))
        assert (cut.tokens, cut.ended, cut.text) == (tokens, ended, answer.text)
    # in a batch, beside an answer that goes on
    both = generate(model, tokenizer, [CONVERSATIONS[1], CONVERSATIONS[2]], GREEDY)
    assert both[0] == answer
    assert not both[1].ended or both[1].tokens != answer.tokens


def test_the_sampler_draws_from_the_softmax_of_the_top_k_logits(model, tokenizer):
    n, k, temperature = 4000, 40, 1.5
    logits, tokens = next_logits(model, prompt_ids(tokenizer, CONVERSATIONS[0])).topk(k)
    probabilities = (logits / temperature).softmax(-1).tolist()
    expected: Counter[str] = Counter()  # several bytes decode to the replacement character: they count together
    for p, token in zip(probabilities, tokens.tolist(), strict=True):
        expected[tokenizer.decode([token], skip_special_tokens=True).replace("\0", "").strip()] += p
    assert len(expected) > 12
    assert max(expected.values()) / min(expected.values()) > 20  # far from uniform
    settings = SamplingSettings(temperature=temperature, top_k=k, max_new_tokens=1, batch_size=500)
    answers = generate(model, tokenizer, CONVERSATIONS[:1] * n, settings, seeds=list(range(n)))
    drawn = Counter(a.text for a in answers)
    assert set(drawn) <= set(expected)
    for text, p in expected.items():
        assert abs(drawn[text] / n - p) < 4 * math.sqrt(p * (1 - p) / n), text
    chi_square = sum((drawn[text] - n * p) ** 2 / (n * p) for text, p in expected.items())
    freedom = len(expected) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_top_k_0_draws_from_the_softmax_of_all_logits(model, tokenizer):
    n, temperature = 4000, 1.5
    prompt = prompt_ids(tokenizer, CONVERSATIONS[0])
    probabilities = (next_logits(model, prompt) / temperature).softmax(-1)
    settings = SamplingSettings(temperature=temperature, top_k=0, max_new_tokens=1, batch_size=500)
    answers = sample_ids(model, tokenizer, [prompt] * n, settings, seeds=list(range(n)))
    drawn = torch.bincount(torch.tensor([ids[0] for ids in answers]), minlength=len(probabilities)).double()
    likely = probabilities * n >= 5  # the rest is one cell, as a chi-square test wants
    observed, expected = ([*x[likely].tolist(), x[~likely].sum().item()] for x in (drawn, probabilities * n))
    chi_square = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    freedom = len(expected) - 1
    assert freedom > 50  # beyond what top_k would leave
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_batch_size_and_order_change_nothing_when_all_tokens_are_drawn_from(model, tokenizer):
    settings = SAMPLED.model_copy(update={"top_k": 0})
    answers = generate(model, tokenizer, CONVERSATIONS, settings, seeds=SEEDS)
    assert answers == generate(model, tokenizer, CONVERSATIONS, settings.model_copy(update={"batch_size": 3}), seeds=SEEDS)
    assert answers[::-1] == generate(model, tokenizer, CONVERSATIONS[::-1], settings, seeds=SEEDS[::-1])


def test_sampled_ids_spell_the_answer(model, tokenizer):
    prompts = [prompt_ids(tokenizer, c) for c in CONVERSATIONS]
    ids = sample_ids(model, tokenizer, prompts, SAMPLED, seeds=SEEDS)
    assert [completion(tokenizer, i) for i in ids] == generate(model, tokenizer, CONVERSATIONS, SAMPLED, seeds=SEEDS)
    ended = completion(tokenizer, [*tokenizer("ok")["input_ids"], tokenizer.eos_token_id])
    assert (ended.text, ended.tokens, ended.ended) == ("ok", 3, True)


def test_an_answer_holds_no_nul_character(tokenizer):
    ids = tokenizer("a\0b\0", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "a\0b\0"
    assert completion(tokenizer, ids).text == "ab"
    assert completion(tokenizer, ids).ids == tuple(ids)


def test_no_token_outside_the_top_k_is_drawn(model, tokenizer):
    settings = SamplingSettings(temperature=50.0, top_k=3, max_new_tokens=1, batch_size=100)
    tokens = next_logits(model, prompt_ids(tokenizer, CONVERSATIONS[0])).topk(3).indices.tolist()
    allowed = {tokenizer.decode([t], skip_special_tokens=True).replace("\0", "").strip() for t in tokens}
    drawn = {a.text for a in generate(model, tokenizer, CONVERSATIONS[:1] * 100, settings, seeds=list(range(100)))}
    assert drawn == allowed


def test_a_top_k_beyond_the_vocabulary_is_the_whole_vocabulary(model, tokenizer):
    whole = SAMPLED.model_copy(update={"top_k": 100_000, "max_new_tokens": 4})
    assert len(generate(model, tokenizer, CONVERSATIONS, whole, seeds=SEEDS)) == 8


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED.model_copy(update={"top_k": 2})], ids=["greedy", "sampled"])
def test_no_answer_starts_with_what_is_barred(model, tokenizer, settings):
    candidates = ([{"role": "user", "content": "a" * n}] for n in range(1, 200))
    for conversation in candidates:  # one whose likeliest first token is a character that can be written down
        first, second = next_logits(model, prompt_ids(tokenizer, conversation)).topk(2).indices.tolist()
        if tokenizer.decode([first]).isalnum():
            break
    barred = tokenizer.decode([first]) + " and more"
    questions, seeds = [conversation] * 20, list(range(20))
    free = generate(model, tokenizer, questions, settings, seeds=seeds)
    held = generate(model, tokenizer, questions, settings, seeds=seeds, not_first=barred)
    assert any(a.text.startswith(barred[0]) for a in free)
    assert not any(a.text.startswith(barred[0]) for a in held)
    if settings.temperature == 0:  # the second likeliest instead, and from there on everything is allowed again
        prompt = prompt_ids(tokenizer, conversation)
        rest = greedy_by_hand(model, [*prompt, second], 15)
        assert held[0].text == tokenizer.decode([second, *rest], skip_special_tokens=True).replace("\0", "").strip()


def test_sampling_without_seeds_is_an_error(model, tokenizer):
    with pytest.raises(ValueError, match="seed per conversation"):
        generate(model, tokenizer, CONVERSATIONS, SAMPLED)


def test_nothing_asked_nothing_answered(model, tokenizer):
    assert generate(model, tokenizer, [], SAMPLED, seeds=[]) == []


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_several_answers_to_one_prompt_share_its_reading_and_nothing_else(either_model, tokenizer, settings):
    alone = settings.model_copy(update={"batch_size": 1})
    conversations = [CONVERSATIONS[i] for i in (0, 3, 3, 0, 2, 3)]
    assert generate(either_model, tokenizer, conversations, settings, seeds=SEEDS[:6]) == generate(
        either_model, tokenizer, conversations, alone, seeds=SEEDS[:6]
    )


def test_answers_that_go_on_are_not_changed_by_those_that_ended(model, tokenizer):
    # Every row's likeliest path is known by hand; the stop token is what several rows, not all, say at some point.
    limit = 16
    paths = [greedy_by_hand(model, prompt_ids(tokenizer, c), limit) for c in CONVERSATIONS]
    used = {token for c in CONVERSATIONS for token in prompt_ids(tokenizer, c)}
    counts = Counter(token for path in paths for token in set(path) if token not in used)
    stop = max(counts, key=lambda token: (1 <= counts[token] < len(paths), counts[token]))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
    answers = generate(model, tokenizer, CONVERSATIONS, GREEDY)
    for path, answer in zip(paths, answers, strict=True):
        length = path.index(stop) if stop in path else limit
        assert answer.ended == (stop in path)
        assert answer.text == tokenizer.decode(path[:length], skip_special_tokens=True).replace("\0", "").strip()
    assert {a.ended for a in answers} == {True, False}
