"""What models are asked, from the templates in `templates/`, and the seed that an answer is sampled with."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template


def request(name: str, **values: Any) -> str:
    """The request `templates/<name>.jinja` with these values, which are never templates themselves.

    Raises:
        jinja2.UndefinedError: the template names a value that is not given.
    """
    return _template(name).render(**values)


def seed_of(seed: int, *names: object) -> int:
    """The seed (63 bits) of one answer: a hash of the stage's seed and of what the answer is, so that no order plays a part."""
    digest = hashlib.sha256("\0".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@cache
def _template(name: str) -> Template:
    from jinja2 import StrictUndefined, Template

    text = files("alignment").joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8")
    return Template(text, undefined=StrictUndefined)
