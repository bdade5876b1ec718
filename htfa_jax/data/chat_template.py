"""Chat templates of others: small programs, run in Jinja's sandbox and with bounds.

The sandbox keeps a template from the machine. What it cannot do is tell how long a template will
take: a loop in a loop may go on for hours.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from htfa_jax.errors import HTFAError

MAX_TEMPLATE = 200_000  # characters; the longest published ones have 20,000
# Characters that a template may write beside what was said, which it may write four times.
MAX_WRITTEN, TIMES = 200_000, 4
MAX_PRODUCT = 100_000  # length of a text or list that is repeated
MAX_BITS = 1000  # of a whole number
BESIDE = "chat_template.jinja"


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, in which what makes much out of little is refused."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Multiplies; called by templates, and not for constants while they are compiled."""
        if operator == "**":
            size = _bits(left) * max(int(right), 1) if isinstance(right, int) else 0
            fits = size <= MAX_BITS
        elif isinstance(left, int) and isinstance(right, int):
            fits = _bits(left) + _bits(right) <= MAX_BITS
        else:
            lengths = [len(x) for x in (left, right) if isinstance(x, str | list | tuple | bytes)]
            numbers = [x for x in (left, right) if isinstance(x, int)]
            fits = sum(lengths) * max([1, *numbers]) <= MAX_PRODUCT
        if not fits:
            raise SecurityError(f"{operator} makes too much out of little")
        return super().call_binop(context, operator, left, right)


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


class _Generation(Extension):
    """`{% generation %}`, with which transformers counts an answer's tokens; it writes nothing."""

    tags = frozenset({"generation"})

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """The statements between the tags."""
        line = next(parser.stream).lineno
        inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(inside, lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)  # fmt: skip


def _today(form: str) -> str:
    return datetime.datetime.now().strftime(form)


class ChatTemplate:
    """A template with the names that transformers gives it.

    Args:
      text: of it.
      where: its folder, which messages name.
      error: what is raised whatever is wrong with it.
    """

    def __init__(self, text: str, where: Path, error: type[HTFAError]):
        self.where, self.error = where, error
        if len(text) > MAX_TEMPLATE:
            raise error(
                f"the chat template of {where} has {len(text)} characters, more than {MAX_TEMPLATE}"
            )

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        del environment.globals["lipsum"]  # texts as long as one likes
        environment.globals["raise_exception"] = raise_exception
        environment.filters["tojson"] = _tojson
        # Those that can do without have a date of their own: a prompt should not change by night.
        if "strftime_now" in text and not re.search(r"strftime_now is (not )?defined", text):
            environment.globals["strftime_now"] = _today
        try:
            self._template = environment.from_string(text)
        except Exception as problem:  # Jinja computes constants while it compiles
            raise error(f"the chat template of {where} is wrong: {_said(problem)}") from problem

    def render(
        self, messages: Sequence[Mapping[str, Any]], prompt: bool, special: Mapping[str, str]
    ) -> str:
        """The text of some turns; `prompt` opens an assistant turn behind them.

        Args:
          messages: `role` and `content` of each: a text, or a list of one part with `text`.
          prompt: as said.
          special: the tokenizer's own tokens by their names.
        """
        contents = (m["content"] for m in messages)
        length_of_all = sum(len(c if isinstance(c, str) else c[0]["text"]) for c in contents)
        most = MAX_WRITTEN + TIMES * length_of_all
        given = {"messages": messages, "add_generation_prompt": prompt}
        pieces, length = [], 0
        try:
            for piece in self._template.generate(
                **{**special, **given, "tools": None, "documents": None}
            ):
                pieces.append(piece)
                length += len(piece)
                if length > most:
                    raise self.error(
                        f"the chat template of {self.where} writes more than {most} characters"
                    )
        except HTFAError:
            raise
        except Exception as problem:  # whatever the template's expressions come to
            raise self.error(
                f"the chat template of {self.where} fails: {_said(problem)}"
            ) from problem
        return "".join(pieces)


def template_text(folder: Path, settings: Mapping[str, Any], error: type[HTFAError]) -> str:
    """The template of a tokenizer's folder: a file of its own, or in tokenizer_config.json.

    Raises `error` if there is none, or none that can be read.
    """
    beside = folder / BESIDE
    if beside.is_file():
        return read_template(beside, error)
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {str(t.get("name"))[:80]: t for t in template if isinstance(t, dict)}
        template = named.get("default", {}).get("template")
    if not isinstance(template, str):
        raise error(
            f"{folder} has no chat template: put one into tokenizer_config.json "
            f"(chat_template) or into {BESIDE}"
        )
    return template


def read_template(path: Path, error: type[HTFAError]) -> str:
    """The text of a template's file. Raises `error` if it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{path} is not UTF-8: {problem}") from problem
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror or problem}") from problem


def _said(problem: Exception) -> str:
    return str(problem)[:300] or type(problem).__name__
