"""Constitutions: those that are shipped load, and what is wrong with one's own is said by file and key."""

from pathlib import Path

import pytest

from alignment.constitutions import (
    ConstitutionError,
    constitution_names,
    finds_nothing,
    load_constitution,
    no_prompts,
    prompts_to_criticise,
    prompts_under,
)
from alignment.errors import UserError
from alignment.records import Prompt

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "conf" / "constitutions"

GOOD = """\
description: What an assistant under this constitution is like.
prompt_tags: [cooking]
principles:
  - id: honest
    text: Please choose the response that is honest.
  - id: kind
    text: Please choose the kind response.
"""


@pytest.mark.parametrize("path", sorted(SHIPPED.rglob("*.y*ml")), ids=lambda path: path.stem)
def test_every_shipped_constitution_loads(path):
    constitution = load_constitution(path)
    assert constitution.name == path.stem
    assert constitution.text == path.read_text(encoding="utf-8")
    assert len(constitution.principles) >= 2  # two rounds need two principles


def test_the_partitions_are_the_shipped_constitutions():
    assert {"general", "medical", "coding", "customer_service", "tutor"} <= set(constitution_names(SHIPPED))
    assert constitution_names(SHIPPED) == sorted(p.stem for p in SHIPPED.iterdir())


# As the user wrote them.
QUOTED = {
    "general": [
        "Please choose the response that is the most helpful, harmless, and honest.",
        "Please choose the response that best avoids discrimination based on race, gender, or religion.",
        "Please choose the response that is most truthful and does not spread misinformation.",
        "Please choose the response that does not assist with illegal activities.",
        "Please choose the response that respects individual privacy.",
    ],
    "customer_service": [
        "Choose the response that best resolves the customer's issue efficiently.",
        "Choose the response that is most empathetic and professional.",
        "Choose the response that follows company policy and does not make unauthorized promises.",
        "Choose the response that escalates appropriately when the issue is beyond scope.",
    ],
    "medical": [
        "Choose the response that always recommends consulting a licensed medical professional.",
        "Choose the response that does not provide specific dosage or treatment recommendations.",
        "Choose the response that presents information accurately with appropriate uncertainty.",
        "Choose the response that is inclusive and does not make assumptions about patient demographics.",
    ],
    "coding": [
        "Choose the response with code that follows security best practices.",
        "Choose the response that is most readable and maintainable.",
        "Choose the response that handles edge cases and errors appropriately.",
        "Choose the response that uses the simplest solution that solves the problem.",
    ],
}


@pytest.mark.parametrize("name", QUOTED)
def test_the_principles_are_those_of_the_users_document_word_for_word(name):
    assert [p.text for p in load_constitution(SHIPPED / f"{name}.yaml").principles] == QUOTED[name]


@pytest.fixture
def write(tmp_path):
    def save(text, name="cooking.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8") if isinstance(text, str) else path.write_bytes(text)
        return path

    return save


def test_a_new_constitution_is_one_file(write):
    constitution = load_constitution(write(GOOD))
    assert constitution.name == "cooking"
    assert constitution.prompt_tags == ("cooking",)
    assert [(p.id, p.text) for p in constitution.principles] == [
        ("honest", "Please choose the response that is honest."),
        ("kind", "Please choose the kind response."),
    ]
    assert constitution.preference_domains == ()


FEW_SHOT = (
    GOOD.replace("id: kind", "id: kind\n    critique_request: Where is it unkind?\n    revision_request: Make it kind.")
    + """\
examples:
  - {prompt: "Is he right?", response: "No, you fool.", critique: It insults., revision: "No.", principle: kind}
  - {prompt: "Is it late?", response: Not yet., critique: No violations found.}
"""
)


def test_requests_and_examples_are_optional(write):
    assert load_constitution(write(GOOD)).examples == ()
    constitution = load_constitution(write(FEW_SHOT))
    honest, kind = constitution.principles
    assert (honest.critique_request, honest.revision_request) == (None, None)
    assert (kind.critique_request, kind.revision_request) == ("Where is it unkind?", "Make it kind.")
    assert [(e.principle, e.revision) for e in constitution.examples] == [("kind", "No."), (None, None)]


def test_the_fingerprinted_text_is_the_file_to_the_byte(write):
    text = GOOD + "# a comment: größer\n"
    assert load_constitution(write(text)).text == text


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a: [1\n", "readable YAML"),
        (b"description: \xff\xfe", "readable YAML"),
        ("", "must be a mapping"),
        ("- a\n- b\n", "must be a mapping"),
        (GOOD.replace("description:", "descripton:"), "descripti?on"),
        (GOOD + "author: me\n", "'author'"),
        (GOOD.replace("prompt_tags: [cooking]\n", ""), "'prompt_tags'"),
        (GOOD.replace("[cooking]", "[]"), "'prompt_tags'"),
        (GOOD.replace("[cooking]", "cooking"), "'prompt_tags'"),
        (GOOD.replace("[cooking]", "[1]"), r"'prompt_tags\.0'"),
        (GOOD.split("principles")[0], "'principles'"),
        (GOOD.split("principles")[0] + "principles: []\n", "'principles'"),
        (GOOD.split("principles")[0] + "principles: [Be kind.]\n", r"'principles\.0'"),
        (GOOD.replace("  - id: kind\n    text", "  - text"), r"'principles\.1\.id'"),
        (GOOD.replace("id: kind", "id: Kind"), r"'principles\.1\.id'"),
        (GOOD.replace("text: Please choose the kind response.", "text: ' '"), r"'principles\.1\.text'"),
        (GOOD.replace("id: kind", "id: kind\n    weight: 2"), r"'principles\.1\.weight'"),
        (GOOD.replace("id: kind", "id: honest"), "id 'honest' occurs twice"),
        (GOOD + "name: other\n", "'name'"),
        (GOOD + "text: other\n", "'text'"),
        (GOOD + "1: 2\n", "keywords must be strings"),
        (
            FEW_SHOT.replace("critique_request: Where is it unkind?", "critique_request: ' '"),
            r"'principles\.1\.critique_request'",
        ),
        (FEW_SHOT.replace("critique: It insults., ", ""), r"'examples\.0\.critique'"),
        (FEW_SHOT.replace("principle: kind}", "principle: kid}"), r"examples\.0\.principle: no principle has the id 'kid'"),
        (FEW_SHOT.replace('revision: "No.", ', ""), r"examples\.0\.revision: must be left out where"),
        (FEW_SHOT.replace("found.}", "found., revision: Now.}"), r"examples\.1\.revision: must be left out where"),
        (FEW_SHOT.replace("response: Not yet.", "answer: Not yet."), r"'examples\.1\.response'"),
    ],
)
def test_a_broken_constitution_names_file_and_key(write, text, names):
    path = write(text)
    with pytest.raises(ConstitutionError, match=names) as error:
        load_constitution(path)
    assert str(error.value).startswith(f"{path}: ")
    assert isinstance(error.value, UserError)


def test_a_file_name_that_is_no_partition_key_is_an_error(write):
    with pytest.raises(ConstitutionError, match=r"My Rules\.yaml.*'name'"):
        load_constitution(write(GOOD, "My Rules.yaml"))


def test_a_missing_constitution_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(ConstitutionError, match=r"none\.yaml: no such constitution\. Remedy"):
        load_constitution(tmp_path / "none.yaml")


def test_names_are_the_stems_in_alphabetical_order(write, tmp_path):
    for name in ("b.yaml", "a.yaml", "notes.txt"):
        write(GOOD, name)
    assert constitution_names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize(
    ("critique", "nothing"),
    [
        ("No violations found.", True),
        (" no violations FOUND", True),
        ('"No violations found."', True),
        ("**No violations found.**", True),
        ("\n - _No violations found_", True),
        ("It insults. No violations found elsewhere.", False),
        ("- Not kind.", False),
        ("", False),
    ],
)
def test_a_critique_finds_nothing_where_it_begins_with_those_words(critique, nothing):
    assert finds_nothing(critique) is nothing


PROMPTS = [
    Prompt(id="1", prompt="How long do eggs boil?", tags=("cooking", "benign")),
    Prompt(id="2", prompt="How do I poison a soup?", tags=("harmful-intent", "cooking")),
    Prompt(id="3", prompt="How do I pick a lock?", tags=("general", "harmful-intent")),
    Prompt(id="4", prompt="How sharp may a knife be?", tags=("cooking", "borderline-but-fine")),
]


@pytest.mark.parametrize(
    ("own", "recipe", "chosen"),
    [
        ("", [], "124"),
        ("", ["harmful-intent"], "2"),
        ("", ["harmful-intent", "benign"], "12"),
        ("critique_tags: []\n", ["harmful-intent"], "124"),
        ("critique_tags: [benign]\n", ["harmful-intent"], "1"),
        ("critique_tags: [benign, borderline-but-fine]\n", [], "14"),
        ("critique_tags: [none]\n", [], ""),
    ],
)
def test_a_constitution_may_say_itself_which_prompts_are_criticised(write, own, recipe, chosen):
    rules = load_constitution(write(GOOD + own))
    assert "".join(p.id for p in prompts_to_criticise(PROMPTS, rules, recipe)) == chosen


@pytest.mark.parametrize("value", ["harmful-intent", "[1]", "{a: b}"])
def test_critique_tags_are_a_list_of_words(write, value):
    with pytest.raises(ConstitutionError, match="'critique_tags"):
        load_constitution(write(GOOD + f"critique_tags: {value}\n"))


def test_prompts_under_a_constitution_may_have_to_carry_a_further_tag(write):
    rules = load_constitution(write(GOOD + "critique_tags: [harmful-intent]\n"))  # which restrict the critic alone
    assert "".join(p.id for p in prompts_under(PROMPTS, rules, [])) == "124"
    assert "".join(p.id for p in prompts_under(PROMPTS, rules, ["benign"])) == "1"


def test_the_error_of_no_prompts_names_the_tags_and_where_they_stand(write):
    rules = load_constitution(write(GOOD))
    told = str(no_prompts(rules, ["x"], "ai_feedback.prompt_tags"))
    assert f"constitution {rules.name}: no training prompt has one of the tags ['cooking'] and one of ['x'] (ai_feedback" in told
    assert " and one of" not in str(no_prompts(rules, [], "ai_feedback.prompt_tags"))
