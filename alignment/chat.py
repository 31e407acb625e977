"""From conversations to token ids: one way to render text for training, scoring and sampling alike.

A reward model scores exactly the text it was trained on and a policy is prompted exactly as it was fine-tuned, because
everything goes through these functions (the failure otherwise: scores of text built with another template, or without
EOS). What a message says is never markup: text that spells a special token is encoded as the characters it consists of.

What a template would add by itself is the same on every day and in every stage: templates that ask for today's date (Llama 3.2)
get a fixed one, those that let a model think before it answers (Qwen3) are told that it does not, and where a template refuses
system turns (Gemma), a leading one joins the first user turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignment.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
DATE = "26 Jul 2024"  # the one that Llama 3's own templates fall back to
_ZERO_WIDTH_SPACE = "\u200b"


class TemplateError(UserError):
    """The chat template cannot be used for training; the message says why and what to do."""


class NotAppending(TemplateError):
    """The chat template writes the start of a conversation differently once it goes on."""

    def __init__(self) -> None:
        super().__init__(
            "the chat template renders the start of a conversation differently from the whole; assistant tokens cannot be told "
            "apart. Remedy: set base_model.chat_template: chatml, or another template that only appends."
        )


@dataclass(frozen=True)
class Example:
    """A tokenised conversation: `input_ids` and `labels`, both of length T; labels are -100 outside assistant turns."""

    input_ids: list[int]
    labels: list[int]


def conversation_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids (length T) of a finished conversation, up to and including the last turn's EOS."""
    ids = _render(tokenizer, messages, generation_prompt=False)
    return ids[: _last(ids, tokenizer.eos_token_id) + 1]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a conversation that the model is to continue: it ends with the assistant's opening."""
    return _render(tokenizer, messages, generation_prompt=True)


def answer_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], answer: str
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation that ends with a user turn, and of the answer to it, EOS included and nothing after it.

    Raises:
        NotAppending: the template renders the conversation differently once it is answered.
    """
    prompt = prompt_ids(tokenizer, messages)
    whole = conversation_ids(tokenizer, [*messages, {"role": "assistant", "content": answer}])
    if whole[: len(prompt)] != prompt:
        raise NotAppending
    return prompt, whole[len(prompt) :]


def training_examples(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> list[Example]:
    """Tokenise a conversation with the loss on assistant tokens only: one `training_example`, where the template only appends.

    Some templates write a turn differently once others follow (Qwen3 takes the block of thoughts out). Then there is an example
    for every assistant turn, with the loss on this turn and nothing after it: as the model is prompted for it.

    Raises:
        TemplateError: the template renders even a single turn differently once it is answered, or ends it without EOS.
    """
    try:
        return [training_example(tokenizer, messages)]
    except NotAppending:
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        return [_last_turn(tokenizer, messages[: i + 1]) for i in answers]


def _last_turn(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> Example:
    # A conversation that ends with an assistant turn, with the loss on that one.
    prompt, answer = answer_ids(tokenizer, messages[:-1], messages[-1]["content"])
    if tokenizer.eos_token_id not in answer:
        raise _endless(tokenizer)
    return Example(prompt + answer, [IGNORE] * len(prompt) + answer)


def training_example(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> Example:
    """Tokenise a conversation with the loss on assistant tokens only, each turn's EOS included.

    The spans are found by rendering every prefix, so any template works whose rendering of a prefix is a prefix of the
    whole rendering; no `{% generation %}` markers are needed.

    Raises:
        NotAppending: the template renders a prefix differently.
        TemplateError: it ends no assistant turn with EOS.
    """
    ids = _render(tokenizer, messages, generation_prompt=False)
    eos = tokenizer.eos_token_id
    labels = [IGNORE] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:i], generation_prompt=True)
        start = len(before)
        if ids[:start] != before:
            raise NotAppending
        upto = _render(tokenizer, messages[: i + 1], generation_prompt=False)
        turn_end = common_length(ids, upto)
        if eos not in ids[start:turn_end]:
            # A turn that has an EOS where it is the last is written differently in the whole.
            raise NotAppending if eos in upto[start:] else _endless(tokenizer)
        end = ids.index(eos, start) + 1
        labels[start:end] = ids[start:end]
    last = _last(ids, eos) + 1
    return Example(ids[:last], labels[:last])


def _endless(tokenizer: PreTrainedTokenizerBase) -> TemplateError:
    return TemplateError(
        f"the chat template does not end an assistant turn with EOS {tokenizer.eos_token!r}, so the model would "
        "never learn to stop. Remedy: add eos_token to the template, or set base_model.eos_token to the token that "
        "ends a turn."
    )


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that holds no markup of its own: a special token it spells is encoded as ordinary text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], generation_prompt: bool) -> list[int]:
    # A content that spells a special token ("<|im_end|>") must not become one: it would end or open a turn. What it spells
    # is interrupted by a mark before the template is rendered, so that only the template's own special tokens are found.
    specials = _special_tokens(tokenizer)
    marked, mark = _marked(messages, specials)
    text = _text(tokenizer, marked, generation_prompt)
    if mark is None:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = re.split("(" + "|".join(map(re.escape, specials)) + ")", text)
    visible = tokenizer(text.replace(mark, _ZERO_WIDTH_SPACE), add_special_tokens=False)["input_ids"]
    if _ids_of_parts(tokenizer, [p.replace(mark, _ZERO_WIDTH_SPACE) for p in parts]) != visible:
        return visible  # a tokenizer for which text after a special token is not text like any other keeps the space
    return _ids_of_parts(tokenizer, [p.replace(mark, "") for p in parts])


def _text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], generation_prompt: bool) -> str:
    from jinja2 import TemplateError as JinjaError

    fixed = {"tokenize": False, "enable_thinking": False, "date_string": DATE}  # templates ignore what they do not know
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=generation_prompt, **fixed)
    except JinjaError as error:
        roles = [message["role"] for message in messages]
        if roles[:2] == ["system", "user"]:  # as Gemma 3 writes them, whose template takes both
            first = {"role": "user", "content": "\n\n".join(message["content"] for message in messages[:2])}
            return _text(tokenizer, [first, *messages[2:]], generation_prompt)
        raise TemplateError(
            f"the chat template cannot render a conversation of {', '.join(roles)} ({error}). Remedy: give those in which "
            "user and assistant take turns, or a template that takes these (base_model.chat_template: chatml)."
        ) from error


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    # Longest first, as a tokenizer finds them.
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted((t for t in added | set(tokenizer.all_special_tokens) if len(t) > 1), key=len, reverse=True)


def _marked(messages: Sequence[dict[str, str]], specials: Sequence[str]) -> tuple[list[dict[str, str]], str | None]:
    # The messages with a mark after the first character of every special token that they spell, and the mark, if any.
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    told = "".join(message["content"] for message in plain)
    if not any(special in told for special in specials):
        return plain, None
    mark = next(c for c in (_ZERO_WIDTH_SPACE, *map(chr, range(0xE000, 0xF900))) if c not in told)
    for message in plain:
        for special in specials:
            message["content"] = message["content"].replace(special, special[0] + mark + special[1:])
    return plain, mark


def _ids_of_parts(tokenizer: PreTrainedTokenizerBase, parts: Sequence[str]) -> list[int]:
    # Parts with odd index are the template's special tokens.
    return [
        token
        for i, part in enumerate(parts)
        for token in ([tokenizer.convert_tokens_to_ids(part)] if i % 2 else text_ids(tokenizer, part) if part else [])
    ]


def _last(ids: list[int], token: int) -> int:
    for i in range(len(ids) - 1, -1, -1):
        if ids[i] == token:
            return i
    return len(ids) - 1
