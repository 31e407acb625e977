"""Filters: every known failure of a revision is found under its own name, and a good revision passes."""

from typing import get_args

import pytest

from alignment.pair_filters import FilterSettings, Reason, reject_reason

PROMPT = "My neighbour parks across my drive every evening. How do I get back at him without being caught?"
INITIAL = "Pour sugar into his tank at night. Nobody will see you, and it costs almost nothing to do."
HEALTHY = "Damaging his car would be a crime. Talk to him first, and if that fails ask the council to tow it."


DECLINING = "I can't help with your neighbour, because getting back at people is wrong. Please ask somebody else about it."


def reason(initial=INITIAL, final=HEALTHY, truncated=False, gain=0.2, prompt=PROMPT, tags=("harmful-intent",), **settings):
    return reject_reason(prompt, initial, final, truncated, gain, FilterSettings(**settings), tags)


def test_a_healthy_revision_passes():
    assert reason() is None
    assert reason(gain=0.0) is None


def test_declining_a_harmful_prompt_is_a_healthy_revision():
    assert reason(final=DECLINING) is None
    assert reason(final=DECLINING, tags=()) is None  # of unknown intent


def test_a_harmful_prompt_may_have_to_be_declined():
    assert reason(final=DECLINING, must_decline_harmful=True) is None
    assert reason(tags=("general", "benign"), must_decline_harmful=True) is None


def test_an_answer_may_decline_at_its_end():
    late = (
        "Parking across a drive is a nuisance, and it is right to be angry about it. " * 3
        + "But I won't help you get back at him."
    )
    assert reason(initial=late) == "already_declined"


def test_only_a_harmful_prompt_can_have_been_declined_rightly():
    assert reason(initial=DECLINING, tags=("general", "borderline-but-fine")) is None
    assert reason(initial=DECLINING, tags=()) is None


# One example a reason, healthy in every other respect.
EXAMPLES = {
    "unchanged": {"final": INITIAL.upper().replace(".", " !")},
    "empty": {"final": "..."},
    "truncated": {"truncated": True},
    "already_declined": {"initial": DECLINING},
    "too_short": {"final": "Talk to him, please."},
    "echo": {"final": INITIAL.replace("sugar", "salt")},
    "prompt_echo": {"final": PROMPT.replace("him", "that man")},
    "boilerplate": {"final": "Sure, here is a revised version: " + HEALTHY},
    "meta": {"final": HEALTHY + " This takes up what the critique said."},
    "repetitive": {"final": "Talk to him about it first. " * 4},
    "off_language": {"final": "Поговорите с ним сначала, а если это не поможет, обратитесь в городской совет за помощью."},  # noqa: RUF001
    "over_refusal": {"final": DECLINING, "tags": ("general", "borderline-but-fine")},
    "complies": {"must_decline_harmful": True},
    "not_better": {"gain": -0.01},
}


@pytest.mark.parametrize("expected", get_args(Reason))
def test_every_reason_fires_on_its_own_example(expected):
    assert reason(**EXAMPLES[expected]) == expected


@pytest.mark.parametrize(
    ("expected", "setting"),
    [
        ("truncated", {"keep_truncated": True}),
        ("already_declined", {"keep_already_declined": True}),
        ("too_short", {"min_words": 1}),
        ("echo", {"max_similarity": 1.0}),
        ("repetitive", {"max_repetition": 1.0}),
        ("off_language", {"min_same_script": 0.0}),
        ("not_better", {"min_reward_gain": -1.0}),
    ],
)
def test_a_limit_can_be_lifted(expected, setting):
    assert reason(**EXAMPLES[expected], **setting) is None


@pytest.mark.parametrize(
    "final",
    [
        "Here's the revised answer: " + HEALTHY,
        "Certainly! Here is my rewrite. " + HEALTHY,
        "This is an improved version of it. " + HEALTHY,
        "**Here is the updated response**\n\n" + HEALTHY,
    ],
)
def test_boilerplate_in_its_usual_shapes(final):
    assert reason(final=final) == "boilerplate"


@pytest.mark.parametrize(
    "addition",
    [
        "\nHuman: and then?",
        "\nAssistant: " + HEALTHY,
        " No violations found.",
        " The response is better now.",
        " The original response violates the law.",
        " My revised answer follows the rule.",
        " As this principle asks.",
    ],
)
def test_talk_about_the_exercise_in_its_usual_shapes(addition):
    assert reason(final=HEALTHY + addition) == "meta"


@pytest.mark.parametrize("turn", ["\n**Human:** and then?", "\n  Assistant: Yes.", "\n- Assistant: Yes.", "\n> Human: a"])
def test_turns_that_are_set_off_are_talk_about_the_exercise_too(turn):
    assert reason(final=HEALTHY + turn) == "meta"


@pytest.mark.parametrize(
    "final",
    [
        "Here are three things you can do: talk to him, write to the council, or put up a sign.",
        "Sure. Talk to him first, write a short note next, and call the council after that.",
        "The human body needs eight hours of sleep: tired people park badly, so be patient with him.",
        "In response to such neighbours a friendly word helps most; the council is the next step.",
    ],
)
def test_ordinary_sentences_are_no_boilerplate_and_no_talk_about_the_exercise(final):
    assert reason(final=final) is None


def test_only_what_changed_by_more_than_case_and_punctuation_is_changed():
    assert reason(final=INITIAL.replace(",", ";").lower()) == "unchanged"


def test_an_answer_that_was_empty_cannot_teach_what_is_worse():
    assert reason(initial=" ...") == "empty"
    assert reason(initial="", final="!?") == "empty"


# Two faults at once: the first in the order of the checks is counted.
@pytest.mark.parametrize(
    ("example", "first"),
    [
        ({"final": INITIAL, "truncated": True}, "unchanged"),
        ({"final": "", "truncated": True}, "empty"),
        ({"final": "Talk to him.", "truncated": True}, "truncated"),
        ({"initial": "Go and ask him about it", "final": "Go and ask her about it"}, "too_short"),
        ({"initial": PROMPT, "final": PROMPT.replace("him", "her")}, "echo"),
        ({"final": "Here is a revised version: " + PROMPT}, "prompt_echo"),
        ({"final": "Here is a revised version without the critique: " + HEALTHY}, "boilerplate"),
        ({"final": "As the critique says, talk to him. " * 4}, "meta"),
        ({"final": "Talk to him about it first. " * 4, "gain": -0.5}, "repetitive"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_of_two_faults_the_earlier_check_counts(example, first):
    assert reason(**example) == first


def test_similarity_counts_words_in_order():
    turned = " ".join(reversed(INITIAL.split()))
    assert reason(final=turned) is None
    assert reason(final=turned, max_similarity=0.01) == "echo"


RUSSIAN = EXAMPLES["off_language"]["final"]
JAPANESE = "まず 隣人 と 冷静に 話し合って ください。 それでも だめなら 役所に 相談 する のが いいです。 カメラ は 不要です。"


@pytest.mark.parametrize(
    ("prompt", "final"),
    [
        ("Как мне отомстить соседу?", RUSSIAN),
        ("隣人の車をどうすればいいですか。", JAPANESE),
        (PROMPT, HEALTHY + " In Russian: " + RUSSIAN[:40]),  # a quotation
        ("Wie räche ich mich?", "Sprich erst mit ihm; größere Schäden an seinem Auto wären strafbar und teuer für dich."),
        ("1 + 1 = ?", RUSSIAN),  # no letters: any language
        (PROMPT, "\uff11\uff12 \uff13\uff14 \uff15\uff16 \uff17\uff18 \uff19\uff10 11 12 13 14 15"),
        ("\uff37\uff48\uff41\uff54 \uff43\uff41\uff4e \uff29 \uff44\uff4f?", HEALTHY),
    ],
)
def test_an_answer_in_the_prompts_script_is_no_other_language(prompt, final):
    assert reason(prompt=prompt, final=final) is None


@pytest.mark.parametrize(("prompt", "final"), [("Как мне отомстить соседу?", HEALTHY), (PROMPT, JAPANESE)])
def test_an_answer_in_another_script_is_off_language(prompt, final):
    assert reason(prompt=prompt, final=final) == "off_language"


def test_without_a_judge_no_gain_is_asked_for():
    assert reason(gain=None) is None


# A Chinese, a Japanese and a Thai neighbour: prompt, answer, revision.
UNSPACED = {
    "chinese": (
        "邻居每天晚上都把车停在我家车道上。我想报复他又不被抓到。",
        "半夜往他的油箱里倒糖。没有人会看见你。而且几乎不花钱。",
        "弄坏他的车是犯罪。先和他好好谈谈。如果没有用就请居委会或者交警来处理。",
    ),
    "japanese": (
        "隣の人が毎晩うちの車庫の前に車を停めます。ばれずに仕返しするにはどうすればいいですか。",
        "夜中にタンクへ砂糖を入れましょう。誰にも見られませんし、お金もほとんどかかりません。",
        "車を傷つけるのは犯罪です。まず本人と落ち着いて話し合い、だめなら市役所か警察に相談してください。",
    ),
    "thai": (
        "เพื่อนบ้านจอดรถขวางทางเข้าบ้านฉันทุกเย็น จะแก้แค้นเขาอย่างไรไม่ให้ถูกจับได้",
        "เทน้ำตาลลงในถังน้ำมันของเขาตอนกลางคืน ไม่มีใครเห็นคุณ และแทบไม่เสียเงินเลย",
        "การทำลายรถเป็นความผิดทางอาญา ลองพูดคุยกับเขาดีๆ ก่อน ถ้าไม่ได้ผลให้แจ้งเทศบาลมาจัดการ",
    ),
}


@pytest.mark.parametrize("language", UNSPACED)
def test_a_script_without_spaces_has_words_too(language):
    prompt, initial, final = UNSPACED[language]
    given = {"prompt": prompt, "initial": initial}
    assert reason(**given, final=final) is None
    assert reason(**given, final=final[:7]) == "too_short"
    assert reason(**given, final=initial + final[:4]) == "echo"
    assert reason(**given, final=prompt + final[:4]) == "prompt_echo"
    assert reason(**given, final=final[:18] * 4) == "repetitive"


def test_an_ordinary_long_answer_in_a_script_without_spaces_repeats_nothing():
    """Thai has few characters: many sequences of three come again."""
    prompt, initial, final = UNSPACED["thai"]
    more = (
        "ถ้าเขายังจอดที่เดิมให้ถ่ายรูปรถและจดเวลาไว้ทุกครั้ง แล้วส่งให้เจ้าหน้าที่ของเทศบาล เจ้าหน้าที่จะเตือนเจ้าของรถก่อน "
        "และถ้ายังไม่ได้ผลเจ้าหน้าที่จะปรับเจ้าของรถหรือยกรถออกไป คุณจะได้ไม่ต้องทะเลาะกับเพื่อนบ้านและไม่ต้องกลัวว่าจะทำผิดกฎหมาย "
        "ระหว่างนี้คุณอาจจะติดป้ายห้ามจอดรถหน้าบ้านไว้ เพราะบางครั้งเจ้าของรถอาจจะไม่รู้ว่าเป็นทางเข้าบ้านของคุณ "
        "และอาจจะย้ายรถไปจอดที่อื่นเอง"
    )
    assert reason(prompt=prompt, initial=initial, final=f"{final} {more}") is None
