"""Runs the chat template of a checkpoint with bounded work, by the rules of transformers' own sandbox.

A chat template is a program that comes with the weights. transformers keeps it from files and attributes, but not from
loops and texts without end. Here each loop, call, filter and operator pays for its work to a `WorkMeter` beforehand,
and a rendering ends when its allowance is used up. For that, the syntax tree of the template is extended before it is
compiled. Only filters, tests and methods with a known cost exist.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS
from jinja2.utils import Cycler, Joiner, pass_context

from service.chat_templates.filters import (
    ABSENT_FILTERS,
    ABSENT_TESTS,
    BEFOREHAND,
    CHEAP_FILTERS,
    CHEAP_TESTS,
    ITERATING_FILTERS,
    WIDTH_FILTERS,
    ChatNamespace,
    date_now,
    pay_replace,
    percent_format,
    raise_exception,
    to_json,
)
from service.chat_templates.syntax import ASSIGNED, CONCATENATED, COUNTED, MADE, READ, STEPS, extended
from service.chat_templates.work import STEP, TemplateTooExpensive, WorkMeter

MAX_TEMPLATE_CHARS = 65_536
"""The longest template that is compiled; those of well-known models have up to 20,000 characters."""

MAX_FILTER_INTEGER = 1_000
"""The largest integer argument of a filter, such as a width."""

STRING_METHODS = frozenset(
    {
        "capitalize",
        "casefold",
        "count",
        "endswith",
        "find",
        "index",
        "isalnum",
        "isalpha",
        "isdecimal",
        "isdigit",
        "islower",
        "isnumeric",
        "isspace",
        "istitle",
        "isupper",
        "join",
        "lower",
        "lstrip",
        "partition",
        "removeprefix",
        "removesuffix",
        "replace",
        "rfind",
        "rindex",
        "rpartition",
        "rsplit",
        "rstrip",
        "split",
        "splitlines",
        "startswith",
        "strip",
        "swapcase",
        "title",
        "upper",
    }
)
OTHER_METHODS: Mapping[type, frozenset[str]] = {
    dict: frozenset({"get", "items", "keys", "values", "copy"}),
    list: frozenset({"index", "count", "copy"}),
    tuple: frozenset({"index", "count"}),
    LoopContext: frozenset({"cycle", "changed"}),
    Cycler: frozenset({"next", "reset"}),
}


class GenerationTag(Extension):
    """The tag ``generation``, which marks what an assistant wrote; it prints what is inside."""

    tags = {"generation"}  # noqa: RUF012 - so declared by Jinja

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the body between the tags."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class BoundedTemplate:
    """A compiled chat template, of which each rendering has an allowance of work; several threads may render at once.

    Args:
        source: the chat template.

    Raises:
        TemplateTooExpensive: it is longer than ``MAX_TEMPLATE_CHARS``.
        Exception: whatever Jinja raises for a template that is not valid, or that uses what the sandbox has not.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TemplateTooExpensive
        self._environment = _BoundedEnvironment()
        with self._environment.metered(WorkMeter(0, 0)):  # for constant expressions, which are computed once
            self._template = self._environment.from_string(source)

    def render(self, variables: Mapping[str, Any], *, num_messages: int, num_chars: int) -> str:
        """Return the rendered text.

        Args:
            variables: what the template gets; plain values.
            num_messages: turns of the conversation.
            num_chars: characters of the conversation, tools included.

        Raises:
            TemplateTooExpensive: the rendering exceeds its allowance.
            Exception: whatever the template raises.
        """
        meter = WorkMeter(num_messages, num_chars)
        with self._environment.metered(meter):
            context = self._template.new_context(dict(variables))
            text = self._environment.concat(self._template.root_render_func(context))
        if len(text) > meter.max_chars:
            raise TemplateTooExpensive
        return text


class _Metered:
    """Makes a meter that of the running thread for as long as the context lasts."""

    def __init__(self, current: threading.local, meter: WorkMeter) -> None:
        self._current, self._meter = current, meter

    def __enter__(self) -> None:
        self._current.meter = self._meter

    def __exit__(self, *_: object) -> None:
        self._current.meter = None


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self) -> None:
        self._current = threading.local()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationTag, loopcontrols],
            finalize=self._printed,
        )
        self.concat = self._joined  # type: ignore[method-assign]
        functions = {name: function for name, function in FILTERS.items() if name not in ABSENT_FILTERS}
        functions |= {"tojson": to_json, "format": percent_format}
        self.filters = {name: self._paying_filter(name, function) for name, function in functions.items()}
        self.filters |= {
            COUNTED: self._counted,
            STEPS: self._steps,
            READ: self._read,
            MADE: self._made,
            ASSIGNED: self._assigned,
            CONCATENATED: self._concatenated,
        }
        tests: Mapping[str, Any] = TESTS
        self.tests = {
            name: test if name in CHEAP_TESTS else self._paying_test(test)
            for name, test in tests.items()
            if name not in ABSENT_TESTS
        }
        self.globals.pop("lipsum")
        self.globals |= {
            "dict": dict,
            "namespace": ChatNamespace,
            "raise_exception": raise_exception,
            "strftime_now": date_now,
        }
        self._functions = tuple(self.globals.values())

    def metered(self, meter: WorkMeter) -> _Metered:
        """Return the context in which this thread spends the work of a meter."""
        return _Metered(self._current, meter)

    @property
    def _meter(self) -> WorkMeter:
        meter: WorkMeter = self._current.meter
        return meter

    # --- What the syntax tree is extended by ---------------------------------------------------------------------

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        tree = extended(tree)
        tree.set_environment(self)
        return tree

    def _printed(self, value: Any) -> Any:
        self._current.meter.pay(value, STEP // 8)
        return value

    def _joined(self, pieces: Iterable[str]) -> str:
        meter, collected = self._meter, []
        for piece in pieces:
            meter.spend(len(piece) + 16)
            collected.append(piece)
        return "".join(collected)

    def _counted(self, values: Any, work: int) -> Any:
        return self._meter.counted(values, work)

    @pass_context  # which is not known before a rendering, so that the compiler cannot compute it once
    def _steps(self, _: Context, work: int) -> None:
        self._meter.spend(work)

    def _read(self, value: Any) -> Any:
        self._current.meter.pay(value, STEP // 8)
        return value

    _made = _read

    def _assigned(self, value: Any) -> Any:
        self._meter.weigh_entry(value)
        return value

    def _concatenated(self, values: Sequence[Any]) -> str:
        meter = self._meter
        meter.spend(STEP + sum(map(meter.weigh, values)))
        return "".join(map(str, values))

    # --- Filters and tests ------------------------------------------------------------------------------------------

    def _paying_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        passed = getattr(function, "jinja_pass_arg", None)
        num_passed = 0 if passed is None else 1
        pay = BEFOREHAND.get(name)
        iterates, is_cheap, has_width = (name in names for names in (ITERATING_FILTERS, CHEAP_FILTERS, WIDTH_FILTERS))

        def paying(*args: Any, **kwargs: Any) -> Any:
            meter = self._meter
            values = args[num_passed:]
            if is_cheap:
                meter.spend(STEP)
                return function(*args, **kwargs)
            meter.spend(STEP)
            for value in (*values, *kwargs.values()):
                meter.spend(meter.weigh_entry(value))
                if has_width and isinstance(value, int) and abs(value) > MAX_FILTER_INTEGER:
                    raise TemplateTooExpensive
            if iterates and values:
                values = (meter.counted(values[0]), *values[1:])
            if name == "join" and values:
                values = (list(values[0]), *values[1:])
            if pay is not None:
                pay(meter, *values, **kwargs)
            made = function(*args[:num_passed], *values, **kwargs)
            meter.check_number(made)
            meter.pay(made, 0)
            return made

        paying.__name__ = name
        if passed is not None:
            paying.jinja_pass_arg = passed  # type: ignore[attr-defined]
        return paying

    def _paying_test(self, test: Callable[..., Any]) -> Callable[..., Any]:
        passed = getattr(test, "jinja_pass_arg", None)

        def paying(*args: Any, **kwargs: Any) -> Any:
            meter = self._meter
            for value in args if passed is None else args[1:]:
                meter.pay(value, STEP // 8)
            return test(*args, **kwargs)

        if passed is not None:
            paying.jinja_pass_arg = passed  # type: ignore[attr-defined]
        return paying

    # --- Operators and calls ----------------------------------------------------------------------------------------

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute an operator after paying for its result."""
        meter = self._meter
        if type(left) is str and type(right) is str and operator == "+":
            meter.spend(STEP // 8 + 2 * (len(left) + len(right)))
            return left + right
        meter.check_number(left)
        meter.check_number(right)
        if type(left) is int and type(right) is int and operator in "+-":
            meter.spend(STEP // 8)
            return left + right if operator == "+" else left - right
        if operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(count, int):
                    meter.spend(meter.weigh(value) * max(count, 0))
        elif operator == "**" and not (isinstance(right, int | float) and abs(right) <= 64 and abs(left) < 2**64):
            raise TemplateTooExpensive
        elif operator == "%" and isinstance(left, str):
            meter.check_format(left, right)
        elif operator in "+-" and not isinstance(left, int | float):
            meter.spend(meter.weigh(left) + meter.weigh(right))
        made = super().call_binop(context, operator, left, right)
        meter.check_number(made)
        meter.pay(made, STEP // 8)
        return made

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return an entry; a tuple as its key takes as long as the tuple is large."""
        if isinstance(argument, tuple):
            self._meter.pay(argument, 0)
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return a method ``format`` that pays for its result."""
        method = super().wrap_str_format(value)
        return None if method is None else _BoundedFormat(self, value.__self__, method)

    def format_text(self, text: str, method: Callable[..., str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """Format a text after paying for it."""
        self._meter.check_format(text, *args, *kwargs.values())
        return method(*args, **kwargs)

    def call(self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: PYI063
        """Call what has a known cost, after paying for it."""
        meter = self._meter
        meter.spend(STEP)
        for value in (*args, *kwargs.values()):
            meter.spend(meter.weigh_entry(value))
        if isinstance(__obj, BuiltinMethodType | MethodType):
            if __obj.__name__ == "join" and args:
                args = (list(meter.counted(args[0])), *args[1:])
            self._pay_method(__obj, args)
        elif not self._is_function(__obj):
            raise SecurityError("Chat templates may call functions of the sandbox only.")
        made = super().call(__context, __obj, *args, **kwargs)
        meter.pay(made, 0)
        return made

    def _is_function(self, value: Any) -> bool:
        return isinstance(value, Macro | BlockReference | Undefined | Joiner | _BoundedFormat) or any(
            value is one for one in self._functions
        )

    def _pay_method(self, method: Any, args: Sequence[Any]) -> None:
        owner, name, meter = method.__self__, method.__name__, self._meter
        if isinstance(owner, str):
            if name not in STRING_METHODS:
                raise SecurityError("Chat templates may call methods with a known cost only.")
            meter.spend(len(owner))
            if name == "replace" and len(args) >= 2:
                pay_replace(meter, owner, *args[:2])
            elif name == "join" and args:
                meter.spend(len(owner) * len(args[0]) + sum(map(meter.weigh, args[0])))
            return
        names = next((known for kind, known in OTHER_METHODS.items() if isinstance(owner, kind)), frozenset())
        if name not in names:
            raise SecurityError("Chat templates may call methods with a known cost only.")
        meter.spend(meter.weigh(owner) if isinstance(owner, list | tuple) or name == "copy" else 0)


class _BoundedFormat:
    """The method ``format`` of a text."""

    def __init__(self, environment: _BoundedEnvironment, text: str, method: Callable[..., str]) -> None:
        self._environment, self._text, self._method = environment, text, method

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        return self._environment.format_text(self._text, self._method, args, kwargs)
