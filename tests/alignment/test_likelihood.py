"""Log-probabilities against a softmax over everything, worked row by row without padding."""

import pytest
import torch

from alignment import likelihood
from alignment.chat import IGNORE, prompt_ids
from alignment.likelihood import answer_log_probs, first_token_log_probs, label_and_last_log_probs, label_log_probs
from alignment.models import ModelFiles, load_causal_lm

QUESTIONS = ["Hi", "What is a leap year?", "x" * 60, "東京"]
ANSWERS = ["Hello.", "A year with 366 days.", "y", "首都です"]
CONVERSATIONS = [[{"role": "user", "content": q}] for q in QUESTIONS]


def random_rows(seed=0, n=12, vocabulary=250):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        length = int(torch.randint(2, 50, (1,), generator=generator))
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        asked = torch.rand(length, generator=generator) < 0.5
        rows.append((ids, [token if wanted else IGNORE for token, wanted in zip(ids, asked, strict=True)]))
        if i % 4 == 0:
            rows.append((ids, [IGNORE] * length))
    return rows


def by_hand(model, rows):
    sums = []
    for ids, labels in rows:
        with torch.inference_mode():
            logp = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        sums.append(sum(logp[t - 1, labels[t]].item() for t in range(1, len(ids)) if labels[t] != IGNORE))
    return sums


@pytest.fixture
def adapted(tiny_model, float32):
    """The tiny Llama under an adapter with random weights (zero, as they usually start, would not matter)."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(r=8, lora_dropout=0.9, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(load_causal_lm(ModelFiles(tiny_model), float32), lora).eval()


@pytest.fixture(params=["llama", "gpt2", "adapter"])
def any_model(request, model, tiny_gpt2, float32):
    if request.param == "gpt2":
        return load_causal_lm(ModelFiles(tiny_gpt2), float32)
    return model if request.param == "llama" else request.getfixturevalue("adapted")


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_equals_the_full_softmax(any_model, tokenizer, batch_size):
    rows = random_rows()
    got = label_log_probs(any_model, tokenizer, rows, batch_size)
    assert got == pytest.approx(by_hand(any_model, rows), abs=1e-3, rel=1e-5)
    assert max(got) <= 0
    assert min(got) < -50


def test_an_adapter_is_not_left_out(adapted, tokenizer, model):
    rows = random_rows(1, 3)
    apart = zip(label_log_probs(adapted, tokenizer, rows, 4), label_log_probs(model, tokenizer, rows, 4), strict=True)
    assert all(abs(a - b) > 1e-2 for a, b in apart if b)


def test_dropout_is_off_whatever_mode_the_model_was_in(adapted, tokenizer):
    rows = random_rows(2, 3)
    expected = label_log_probs(adapted.eval(), tokenizer, rows, 4)
    assert label_log_probs(adapted.train(), tokenizer, rows, 4) == expected


def test_neither_batch_nor_padding_nor_order_changes_anything(model, tokenizer):
    rows = random_rows(3)
    together = label_log_probs(model, tokenizer, rows, 64)
    alone = [label_log_probs(model, tokenizer, [row], 1)[0] for row in rows]
    assert together == pytest.approx(alone, abs=1e-3)
    assert label_log_probs(model, tokenizer, rows[::-1], 64)[::-1] == pytest.approx(together, abs=1e-3)
    short = rows[0]
    padded = label_log_probs(model, tokenizer, [short, ([7] * 400, [IGNORE] * 400)], 2)
    assert padded == pytest.approx([alone[0], 0.0], abs=1e-3)


def test_an_answers_log_probability_is_that_of_its_tokens_after_the_prompt(model, tokenizer):
    def expected(eos):
        rows = []
        for conversation, answer in zip(CONVERSATIONS, ANSWERS, strict=True):
            before = prompt_ids(tokenizer, conversation)
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * eos
            rows.append((before + ids, [IGNORE] * len(before) + ids))
        return by_hand(model, rows)

    got = answer_log_probs(model, tokenizer, CONVERSATIONS, ANSWERS, 3)
    assert got == pytest.approx(expected(eos=0), abs=1e-3)
    with_eos = answer_log_probs(model, tokenizer, CONVERSATIONS, ANSWERS, 3, ended=[True] * 4)
    assert with_eos == pytest.approx(expected(eos=1), abs=1e-3)
    mixed = answer_log_probs(model, tokenizer, CONVERSATIONS, ANSWERS, 3, ended=[True, False, True, False])
    assert mixed == pytest.approx([with_eos[0], got[1], with_eos[2], got[3]], abs=1e-3)


def test_all_one_token_answers_together_have_probability_one(model, tokenizer):
    before = prompt_ids(tokenizer, CONVERSATIONS[0])
    rows = [([*before, token], [IGNORE] * len(before) + [token]) for token in range(len(tokenizer))]
    total = torch.tensor(label_log_probs(model, tokenizer, rows, 64)).exp().sum().item()
    assert total == pytest.approx(1, abs=1e-4)


def test_an_empty_answer_is_certain(model, tokenizer):
    assert answer_log_probs(model, tokenizer, CONVERSATIONS[:2], ["", ""], 2) == [0.0, 0.0]
    assert label_log_probs(model, tokenizer, [], 2) == []


@pytest.mark.parametrize("architecture", ["gemma2", "granite"])
def test_models_that_rescale_or_cap_their_logits(tokenizer, architecture):
    import transformers

    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.5,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    if architecture == "gemma2":
        config = transformers.Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=3.0)
        model = transformers.Gemma2ForCausalLM(config).eval()
    else:
        model = transformers.GraniteForCausalLM(transformers.GraniteConfig(**sizes, logits_scaling=8.0)).eval()
    rows = random_rows(4, 3)
    assert label_log_probs(model, tokenizer, rows, 4) == pytest.approx(by_hand(model, rows), abs=1e-2, rel=1e-4)


@pytest.mark.parametrize("batch_size", [3, 64])
def test_the_vocabulary_is_projected_a_few_positions_at_a_time(any_model, tokenizer, monkeypatch, batch_size):
    rows, at_once = random_rows(), []
    hook = any_model.get_output_embeddings().register_forward_hook(lambda module, inputs, out: at_once.append(out.shape[:-1]))
    monkeypatch.setattr(likelihood, "POSITIONS_AT_ONCE", 7)
    got = label_and_last_log_probs(any_model, tokenizer, rows, batch_size)
    hook.remove()
    assert max(shape[0] for shape in at_once if len(shape) == 1) == 7
    assert [total for total, _ in got] == pytest.approx(by_hand(any_model, rows), abs=1e-3, rel=1e-5)
    whole = [(ids, [IGNORE] * (len(ids) - 1) + labels[-1:]) for ids, labels in rows if labels[-1] != IGNORE]
    lasts = [last for (_, last), (_, labels) in zip(got, rows, strict=True) if labels[-1] != IGNORE]
    assert lasts == pytest.approx(by_hand(any_model, whole), abs=1e-3)


def test_the_first_tokens_log_probabilities_are_the_softmaxs(any_model, tokenizer):
    tokens = [5, 40, 200]
    got = first_token_log_probs(any_model, tokenizer, CONVERSATIONS, tokens, 3)
    for conversation, found in zip(CONVERSATIONS, got, strict=True):
        with torch.inference_mode():
            logits = any_model(torch.tensor([prompt_ids(tokenizer, conversation)])).logits[0, -1].float()
        assert found == pytest.approx(logits.log_softmax(-1)[tokens].tolist(), abs=1e-4)
