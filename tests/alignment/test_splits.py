"""The split: by the prompt's words alone, near the fraction that was asked for, the same for ever."""

import random

import pytest

from alignment.splits import normalise, position, split_of

PROMPTS = [f"{verb} {thing} {i}" for verb in ("Explain", "Draw", "Sell", "Cook", "Bring me") for i, thing in
           enumerate(["eggs", "the moon", "a bicycle", "Größe", "東京"] * 200)]  # fmt: skip


@pytest.mark.parametrize(
    "variant",
    [
        "  how LONG do\teggs boil\n",
        "How long -- do eggs, boil?!",
        "how_long_do_eggs_boil",
        "\u201chow long do \uff45\uff47\uff47\uff53 boil\u201d",  # typographic quotes, full-width letters
    ],
)
def test_same_place_whatever_case_punctuation_and_whitespace(variant):
    prompt = "How long do eggs boil?"
    assert normalise(variant) == normalise(prompt) == "how long do eggs boil"
    assert position(variant) == position(prompt)


def test_same_side_of_any_split_for_variants_of_generated_prompts():
    rng = random.Random(0)
    for prompt in rng.sample(PROMPTS, 300):
        variant = "  ".join(rng.choice([str.upper, str.lower, str.title])(word) for word in prompt.split()) + "?! "
        fraction = rng.random()
        assert split_of(variant, fraction) == split_of(prompt, fraction)


def test_other_words_other_place():
    assert len({position(prompt) for prompt in PROMPTS}) == len(set(PROMPTS)) == 5000


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.2, 0.5])
def test_fraction_is_near_the_one_asked_for(fraction):
    heldout = sum(split_of(prompt, fraction) == "heldout" for prompt in PROMPTS)
    spread = (fraction * (1 - fraction) * len(PROMPTS)) ** 0.5
    assert abs(heldout - fraction * len(PROMPTS)) < 4 * spread


def test_ends_of_the_scale():
    assert all(0 <= position(prompt) < 1 for prompt in PROMPTS)
    assert {split_of(prompt, 0.0) for prompt in PROMPTS} == {"train"}
    assert {split_of(prompt, 1.0) for prompt in PROMPTS} == {"heldout"}


def test_a_larger_held_out_part_holds_the_smaller():
    small, large = ({p for p in PROMPTS if split_of(p, fraction) == "heldout"} for fraction in (0.1, 0.2))
    assert small < large


@pytest.mark.parametrize(
    ("prompt", "place", "salted"),
    [
        ("How long do eggs boil?", 0.6164444524663008, 0.8737319421309726),
        ("Explain photosynthesis to a child.", 0.9140003262930936, 0.9837161370557979),
        ("Größe", 0.5323091676262668, 0.022725003225872835),
        ("", 0.378086107689905, 0.6758958214613673),
    ],
)
def test_known_values(prompt, place, salted):
    """A change here moves prompts from training to evaluation: models trained before have seen them."""
    assert position(prompt) == place
    assert position(prompt, salt="other") == salted


def test_splits_under_two_salts_are_independent():
    both = sum(position(p) < 0.5 and position(p, "other") < 0.5 for p in PROMPTS)
    assert abs(both / len(PROMPTS) - 0.25) < 0.03
