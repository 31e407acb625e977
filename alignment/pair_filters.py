"""Which revisions are worth training on. Every pair left out is counted under its reason.

The reasons are the known failures of critique-and-revise with small models: nothing was revised, the revision echoes
the answer or the prompt, opens with "Sure, here is...", stops in mid-sentence, repeats itself, talks about the critique,
slips into another language (told by its script), or declines what there is no reason to decline. An initial answer that
already declined a harmful request leaves nothing to revise: of 40 pairs read by hand, 6 were such, and 4 of these revisions
were no better.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection
from difflib import SequenceMatcher
from typing import Literal

from pydantic import Field

from alignment.fingerprint import layout
from alignment.models import Config
from alignment.refusals import is_refusal
from alignment.splits import normalise

Reason = Literal[
    "unchanged",
    "empty",
    "truncated",
    "already_declined",
    "echo",
    "prompt_echo",
    "boilerplate",
    "meta",
    "repetitive",
    "off_language",
    "too_short",
    "over_refusal",
    "complies",
    "not_better",
]


HARMLESS = frozenset({"benign", "borderline-but-fine"})
HARMFUL = "harmful-intent"


class FilterSettings(Config):
    """Limits a revision must keep."""

    max_similarity: float = Field(
        0.8, gt=0, le=1, description="Share of words the revision may have in common, in order, with the initial answer"
    )
    min_words: int = Field(
        8,
        ge=1,
        description="A revision with fewer words is too short; a character of Chinese, Japanese or Thai, which put no spaces "
        "between words, counts as one",
    )
    max_repetition: float = Field(
        0.2,
        ge=0,
        le=1,
        description="Share of three-word sequences (six characters of Chinese, Japanese or Thai) that may be repeats of "
        "earlier ones",
    )
    min_same_script: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of the revision's letters that must be of the script (Latin, Cyrillic, ...) that most of the "
        "prompt is written in; 0: any",
    )
    keep_truncated: bool = Field(False, description="Keep pairs with an answer that was cut at its token limit")
    keep_already_declined: bool = Field(
        False, description="Keep pairs whose initial answer already declined a prompt tagged harmful-intent"
    )
    must_decline_harmful: bool = Field(
        False,
        description="Drop a revision that does not decline a prompt tagged harmful-intent: for small critics, whose revisions "
        "without a clear no mostly comply",
    )
    min_reward_gain: float = Field(0.0, description="The judge must score the revision higher by at least this")
    judge_pairs: bool = Field(
        False,
        description="Keep a pair only if the critic, asked which answer is better under the last principle, chooses the revision "
        "in both orders",
    )
    min_share_kept: float = Field(
        0.25, ge=0, le=1, **layout("The asset's check fails when a smaller share of the prompts ends in a pair")
    )


def reject_reason(
    prompt: str,
    initial: str,
    final: str,
    truncated: bool,
    reward_gain: float | None,
    settings: FilterSettings,
    tags: Collection[str] = (),
) -> Reason | None:
    """Why (prompt, initial -> final) is not worth training on, or None if it is.

    Args:
        reward_gain: the judge's score of `final` minus that of `initial`; None without a judge, and no gain is asked for.
        tags: of the prompt; a revision that declines a prompt tagged as harmless is an over-refusal, and an initial answer
            that declines one tagged as harmful needs no revision.
    """
    before, after = _words(initial), _words(final)
    if not before or not after:
        return "empty"
    if before == after:
        return "unchanged"
    if truncated and not settings.keep_truncated:
        return "truncated"
    if HARMFUL in tags and not settings.keep_already_declined and is_refusal(initial, len(initial)):
        return "already_declined"
    if len(after) < settings.min_words:
        return "too_short"
    if _similarity(before, after) > settings.max_similarity:
        return "echo"
    if _similarity(_words(prompt), after) > 0.6:
        return "prompt_echo"
    if _BOILERPLATE.match(final):
        return "boilerplate"
    if _META.search(final):
        return "meta"
    if _repetition(after) > settings.max_repetition:
        return "repetitive"
    if _same_script(prompt, final) < settings.min_same_script:
        return "off_language"
    if HARMLESS & set(tags) and is_refusal(final):
        return "over_refusal"
    if HARMFUL in tags and settings.must_decline_harmful and not is_refusal(final):
        return "complies"
    if reward_gain is not None and reward_gain < settings.min_reward_gain:
        return "not_better"
    return None


_BOILERPLATE = re.compile(
    r"\W*(sure|certainly|of course|okay|ok)?\W*(here('s| is| are)|this is) (a|the|my|an|your)?\s*"
    r"(revised|rewritten|rewrite|revision|improved|better|updated|new version)",
    re.IGNORECASE,
)
_META = re.compile(
    r"\b(critique|the principle|this principle|revised? (response|answer|version)|no violations? found|"
    r"(the|this|my|original|above) (assistant )?response (is|was|should|does|violates))\b"
    r"|^\W*(human|assistant|revision)\W*:",
    re.IGNORECASE | re.MULTILINE,
)


def _words(text: str) -> list[str]:
    return _WORD.findall(normalise(text))


# Scripts without spaces between words: Thai and Lao, Burmese, Khmer; Chinese characters with kana and bopomofo.
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
    r"\u2e80-\u312f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")


def _similarity(a: list[str], b: list[str]) -> float:
    return SequenceMatcher(None, a, b, autojunk=False).ratio()


def _repetition(words: list[str]) -> float:
    # A character is less than a word: of sequences of three, an ordinary Thai answer repeats a fifth.
    characters = sum(re.match(f"[{_UNSPACED}]", word) is not None for word in words)
    size = 6 if 2 * characters > len(words) else 3
    grams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _same_script(prompt: str, answer: str) -> float:
    # 1 where either has no letters: figures and code say nothing about the language.
    wanted, found = _scripts(prompt), _scripts(answer)
    if not wanted or not found:
        return 1.0
    (script, _), *_ = wanted.most_common(1)
    return found[script] / found.total()


def _scripts(text: str) -> Counter[str]:
    # A character's name begins with its script; NFKC first, since FULLWIDTH and MATHEMATICAL letters are Latin ones.
    names = (unicodedata.name(c, "").split() for c in unicodedata.normalize("NFKC", text) if c.isalpha())
    return Counter(_JAPANESE.get(name[0], name[0]) for name in names if name)


_JAPANESE = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "KATAKANA-HIRAGANA": "CJK"}  # one text mixes all of them
