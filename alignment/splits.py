"""One split for everything: a prompt is train or held-out by a hash of its normalised text.

The same prompt therefore falls on the same side in demonstrations, preferences, critiques and prompts, whatever file it
stands in and whatever else is added later; nothing can leak from training into evaluation.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from typing import Literal

Split = Literal["train", "heldout"]


def normalise(text: str) -> str:
    """Case-folded NFKC text with every run of non-word characters collapsed to one space.

    >>> normalise("  What's  UP, Doc?! ")
    'what s up doc'
    """
    plain = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"[\W_]+", " ", plain).strip()


def folded(text: str) -> str:
    """Case-folded text with every run of white space collapsed to one space: what two copies of one text have in common.

    >>> folded("  What's  UP, Doc?! ")
    "what's up, doc?!"
    """
    return " ".join(text.casefold().split())


def position(prompt: str, salt: str = "split") -> float:
    """A uniform number in [0, 1) that depends on nothing but the normalised prompt and the salt."""
    digest = hashlib.sha256(f"{salt}\0{normalise(prompt)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of(prompt: str, heldout_fraction: float) -> Split:
    """Which side of the split a prompt is on. `heldout_fraction` must be the same for every data set of a pipeline."""
    return "heldout" if position(prompt) < heldout_fraction else "train"


def split_of_turns(prompts: Iterable[str], heldout_fraction: float) -> Split:
    """The side of a conversation: held-out as soon as one of its user turns is, so that none of them is ever trained on."""
    return "heldout" if any(split_of(p, heldout_fraction) == "heldout" for p in prompts) else "train"
