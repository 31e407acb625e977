"""Chat templates for models that come without one.

`chatml` marks turns with tokens of its own, which no text can spell and whose embeddings have to be learnt
(`alignment.added_tokens`). `plain` marks turns with ordinary words and ends an answer with the model's own EOS: nothing has to
be learnt but the format, and a text that contains "### Assistant:" looks like a turn. Both trim the texts, since a line break
at a text's start would melt into one token with the template's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class ChatTemplate:
    """A template's text, the special tokens it needs, and the one that ends an assistant turn (empty: the model's EOS)."""

    text: str
    tokens: tuple[str, ...] = ()
    eos_token: str = ""


# What a shipped template needs, by its name; the text is in templates/.
SHIPPED = {"chatml": (("<|im_start|>", "<|im_end|>"), "<|im_end|>"), "plain": ((), "")}


def shipped_chat_template(name: str) -> ChatTemplate:
    """One of `SHIPPED`."""
    text = files("alignment").joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(text, *SHIPPED[name])
