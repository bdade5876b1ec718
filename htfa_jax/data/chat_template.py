"""Chat templates of others: small programs, run in Jinja's sandbox and with bounds.

The sandbox keeps a template from the machine, but not from its time and memory. So loops and macros
draw on a budget, texts have a greatest length, and what only pads texts is left out.
"""

from __future__ import annotations

import contextvars
import datetime
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

from jinja2 import Template, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from htfa_jax.errors import HTFAError

MAX_TEMPLATE = 200_000  # characters; the longest published ones have 20,000
# Characters that a template may write beside what was said, which it may write four times.
MAX_WRITTEN, TIMES = 200_000, 4
MAX_PRODUCT = 100_000  # length of a text or list that is repeated
MAX_BITS = 1000  # of a whole number
MAX_TEXT = 10_000_000  # characters of a text that a template puts together
# Parts of a template (nodes of its syntax tree) that it may pass while it writes, loops included: a
# second or two. The longest published template passes 5,000 for each turn.
MAX_WORK = 10_000_000
BESIDE = "chat_template.jinja"
# They make texts of any length out of nothing, and no published template has one of them.
PADDING_FILTERS = ("batch", "center", "format", "indent", "slice", "wordwrap", "xmlattr")
PADDING_METHODS = frozenset(
    ("center", "expandtabs", "format", "format_map", "ljust", "rjust", "translate", "zfill")
)
# What is left of the budget, of the template that this thread renders.
_left = contextvars.ContextVar("left of the budget of a chat template", default=MAX_WORK)


def _spend(work: int) -> None:
    _left.set(left := _left.get() - work)
    if left < 0:
        raise SecurityError("it goes on without end, or nearly so")


@pass_context
def _counted(_: Context, values: Iterable[Any], size: int) -> Iterable[Any]:
    """What a loop of so many nodes goes through, paid for. With a context: never folded early."""
    if isinstance(values, Sized):
        _spend(len(values) * size)
        return values
    return _counted_one_by_one(values, size)


def _counted_one_by_one(values: Iterable[Any], size: int) -> Iterator[Any]:
    for value in values:
        _spend(size)
        yield value


@pass_context
def _joined(_: Context, values: Iterable[Any], between: str = "", attribute: str = "") -> str:
    """Jinja's filter join and operator ~, with a greatest length."""
    if attribute:
        values = (value[attribute] for value in values)
    texts = [str(value) for value in values]
    _check_length(sum(map(len, texts)) + len(str(between)) * len(texts))
    return str(between).join(texts)


@pass_context
def _replaced(_: Context, text: Any, old: str, new: str, count: int = -1) -> str:
    """Jinja's filter replace, with a greatest length."""
    text, old, new = str(text), str(old), str(new)
    _check_length(len(text) + text.count(old) * len(new))
    return text.replace(old, new, count if count is not None else -1)


def _check_length(length: int) -> None:
    if length > MAX_TEXT:
        raise SecurityError(f"it puts {length} characters together, more than {MAX_TEXT}")


class _Bounded(NodeTransformer):
    """A template's syntax tree in which loops and joined texts are counted."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 (Jinja's name)
        """A loop pays for each turn by the size of its body."""
        if node.recursive:
            raise SecurityError("a recursive loop: no chat template needs one")
        size = 1 + sum(1 for part in node.body for _ in part.find_all(nodes.Node))
        node = self.generic_visit(node)
        node.iter = _filtered(node.iter, "counted", nodes.Const(size))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
        """`a ~ b` as a filter."""
        node = self.generic_visit(node)
        return _filtered(nodes.List(node.nodes), "join")


def _filtered(node: nodes.Expr, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, in which what makes much out of little is refused."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    size = 1  # nodes of the template: none of its macros has more

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """The sandbox's own judgement, and no methods that pad texts."""
        if isinstance(obj, str) and attr in PADDING_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Calls something for a template; macros, which may call themselves, pay for it."""
        if isinstance(__obj, Macro):
            _spend(__self.size)
        method, text = getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None)
        if isinstance(text, str) and method == "join":
            return _joined(__context, *args, between=text)
        if isinstance(text, str) and method == "replace":
            return _replaced(__context, text, *args)
        return super().call(__context, __obj, *args, **kwargs)

    def bounded(self, text: str) -> Template:
        """A template that is counted. Raises TemplateError, SecurityError and what constants do."""
        tree = _Bounded().visit(self.parse(text))
        self.size = sum(1 for _ in tree.find_all(nodes.Node))
        return Template.from_code(self, self.compile(tree), self.make_globals(None))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Computes; called by templates, and not for constants while they are compiled."""
        if operator == "+":
            lengths = [len(x) for x in (left, right) if isinstance(x, str | list | tuple)]
            fits = sum(lengths) <= MAX_TEXT
        elif operator == "%":
            fits = not isinstance(left, str)  # formats, with any width
        elif operator == "**":
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
        for name in PADDING_FILTERS:
            del environment.filters[name]
        environment.filters |= {
            "tojson": _tojson, "counted": _counted, "join": _joined, "replace": _replaced,
        }  # fmt: skip
        # Those that can do without have a date of their own: a prompt should not change by night.
        if "strftime_now" in text and not re.search(r"strftime_now is (not )?defined", text):
            environment.globals["strftime_now"] = _today
        try:
            self._template = environment.bounded(text)
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
        before = _left.set(MAX_WORK)
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
        finally:
            _left.reset(before)
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
