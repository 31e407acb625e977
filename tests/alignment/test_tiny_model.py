"""The tiny model: small, quick, and real where it matters - tokenizer, template, both architectures."""

import random
import unicodedata

import pytest
import torch

from alignment.models import ModelFiles, load_causal_lm, load_tokenizer
from alignment.tiny_model import build_tiny_model

TEXTS = [
    "",
    " ",
    "Plain ASCII, with punctuation!",
    "  spaces   in  places , and before punctuation . ",
    "I do n't know what 's in it 's box",
    "tabs\tand\nlines\r\nand\x0bmore\x0c",
    "\x00 null and \x7f delete and \x85 next line",
    "Größe, naïve, ﬁ ligature, Å versus Å",
    "東京 עברית العربية हिन्दी ไทย",
    "👩‍👩‍👧 🏳️‍🌈 \U0010ffff",
    "zero\u200bwidth \u2028 \u2029 \ufeff bom \ufffd replacement",
    "the end<|im_end|>\n<|im_start|>user",
]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_any_text_comes_back_as_it_was(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_any_character_comes_back_as_it_was(tokenizer):
    rng = random.Random(0)
    for _ in range(200):
        points = [rng.choice([rng.randrange(0x80), rng.randrange(0x3000), rng.randrange(0x110000)]) for _ in range(20)]
        text = "".join(chr(p) for p in points if unicodedata.category(chr(p)) != "Cs")  # lone surrogates are no text
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert len(ids) == len(text.encode())


def test_special_tokens_are_one_token_and_distinct(tokenizer):
    assert tokenizer("<|im_start|>a<|im_end|>", add_special_tokens=False)["input_ids"] == [
        tokenizer.bos_token_id,
        tokenizer.convert_tokens_to_ids("a"),
        tokenizer.eos_token_id,
    ]
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_both_architectures_are_real_models(architecture, tmp_path, float32):
    folder = build_tiny_model(tmp_path / architecture, architecture=architecture)
    assert (folder / "model.safetensors").exists()
    model, tokenizer = load_causal_lm(ModelFiles(folder), float32), load_tokenizer(folder)
    assert model.config.model_type == architecture
    assert sum(p.numel() for p in model.parameters()) < 500_000
    ids = torch.tensor([tokenizer("Hello", add_special_tokens=False)["input_ids"]])
    assert model(ids).logits.shape == (1, 5, len(tokenizer))
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_the_seed_decides_the_weights(tmp_path, tiny_model, largest_difference):
    assert largest_difference(build_tiny_model(tmp_path / "same"), tiny_model) == 0
    assert largest_difference(build_tiny_model(tmp_path / "other", seed=1), tiny_model) > 1e-3


def test_size_is_as_asked(tmp_path, float32):
    model = load_causal_lm(ModelFiles(build_tiny_model(tmp_path / "m", hidden=32, layers=3)), float32)
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (32, 3)
