"""From conversations to token ids: one way to render text for training, scoring and sampling alike.

A reward model scores exactly the text it was trained on and a policy is prompted exactly as it was fine-tuned, because
everything goes through these functions (the failure otherwise: scores of text built with another template, or without
EOS).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignment.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100


class TemplateError(UserError):
    """The chat template cannot be used for training; the message says why and what to do."""


@dataclass(frozen=True)
class Example:
    """A tokenised conversation: `input_ids` and `labels`, both of length T; labels are -100 outside assistant turns."""

    input_ids: list[int]
    labels: list[int]


_NOT_APPENDING = (
    "the chat template renders the start of a conversation differently from the whole; assistant tokens cannot be told "
    "apart. Remedy: set base_model.chat_template to a template that only appends."
)


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
        TemplateError: the template renders the conversation differently once it is answered.
    """
    prompt = prompt_ids(tokenizer, messages)
    whole = conversation_ids(tokenizer, [*messages, {"role": "assistant", "content": answer}])
    if whole[: len(prompt)] != prompt:
        raise TemplateError(_NOT_APPENDING)
    return prompt, whole[len(prompt) :]


def training_example(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> Example:
    """Tokenise a conversation with the loss on assistant tokens only, each turn's EOS included.

    The spans are found by rendering every prefix, so any template works whose rendering of a prefix is a prefix of the
    whole rendering; no `{% generation %}` markers are needed.

    Raises:
        TemplateError: the template renders a prefix differently, or ends no assistant turn with EOS.
    """
    ids = _render(tokenizer, messages, generation_prompt=False)
    eos = tokenizer.eos_token_id
    labels = [IGNORE] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = len(_common_prefix(ids, _render(tokenizer, messages[:i], generation_prompt=True)))
        if start != len(_render(tokenizer, messages[:i], generation_prompt=True)):
            raise TemplateError(_NOT_APPENDING)
        turn_end = len(_common_prefix(ids, _render(tokenizer, messages[: i + 1], generation_prompt=False)))
        if eos not in ids[start:turn_end]:
            raise TemplateError(
                f"the chat template does not end an assistant turn with EOS {tokenizer.eos_token!r}, so the model would "
                "never learn to stop. Remedy: add eos_token to the template, or set base_model.eos_token to the token that "
                "ends a turn."
            )
        end = ids.index(eos, start) + 1
        labels[start:end] = ids[start:end]
    last = _last(ids, eos) + 1
    return Example(ids[:last], labels[:last])


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], generation_prompt: bool) -> list[int]:
    text = tokenizer.apply_chat_template(plain_text(tokenizer, messages), tokenize=False, add_generation_prompt=generation_prompt)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def plain_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Messages whose texts spell no special token.

    A text that spells one ("<|im_end|>") must not become one: it would end or open a turn. A zero-width space after its
    first character keeps it readable and makes it ordinary text.
    """
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    specials = sorted((t for t in added | set(tokenizer.all_special_tokens) if len(t) > 1), key=len, reverse=True)
    out = []
    for message in messages:
        content = message["content"]
        for special in specials:
            if special in content:
                content = content.replace(special, special[0] + "\u200b" + special[1:])
        out.append({"role": message["role"], "content": content})
    return out


def _common_prefix(a: list[int], b: list[int]) -> list[int]:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return a[:n]


def _last(ids: list[int], token: int) -> int:
    for i in range(len(ids) - 1, -1, -1):
        if ids[i] == token:
            return i
    return len(ids) - 1
