"""What a row of the bad-input table is: a public function with good arguments, and calls of it that must be refused."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import smartfrz_jax as sfj

NAN, INF = float("nan"), float("inf")


class Foreign:
    """What nobody can have meant."""


class Door(NamedTuple):
    """A public function, method or class.

    Attributes:
        name: Its name below ``smartfrz_jax``.
        good: Arguments that it takes, by name.
        on: What a method is called on.
        unchecked: Arguments of which any value is right, or whose errors come from elsewhere, with the reason.
    """

    name: str
    good: Callable[[], Mapping[str, Any]]
    on: Callable[[], Any] | None = None
    unchecked: Mapping[str, str] = {}

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        function = resolve(self.name)
        is_method = (self.on is not None or inspect.isclass(function)) and not inspect.ismethod(function)
        found = inspect.signature(function.__init__ if inspect.isclass(function) else function).parameters
        return dict(list(found.items())[1:] if is_method else found)

    def call(self, **changed: Any) -> Any:
        function = resolve(self.name)
        if self.on is not None:
            function = getattr(self.on(), self.name.rpartition(".")[2])
        bound = inspect.Signature(list(self.parameters.values())).bind_partial()
        given = {**self.good(), **changed}
        bound.arguments.update({name: given[name] for name in self.parameters if name in given})
        return function(*bound.args, **bound.kwargs)


class Case(NamedTuple):
    """A call that must be refused.

    Attributes:
        name: What is wrong, for the name of the test.
        argument: The argument that the message must name first.
        error: The exception.
        words: Texts that the message must contain: what was got, what was expected, the way out.
        call: The call.
    """

    name: str
    argument: str
    error: type[Exception]
    words: tuple[str, ...]
    call: Callable[[], Any]


def resolve(name: str) -> Any:
    found: Any = sfj
    for part in name.split("."):
        found = getattr(found, part)
    return found


def wrong_types(door: Door) -> Iterator[Case]:
    """Every argument in turn replaced by what is of another type or out of range, by its annotation."""
    for name, parameter in door.parameters.items():
        variadic = parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        if variadic or name in door.unchecked:
            continue
        for wrong in _wrong(str(parameter.annotation), parameter.default):
            if f"{name}={wrong}" in door.unchecked:
                continue
            text = "foreign" if isinstance(wrong, Foreign) else repr(wrong)
            error = (TypeError, ValueError)
            yield Case(
                f"{door.name}-{name}={text}", name, error, (), lambda name=name, wrong=wrong: door.call(**{name: wrong})
            )


def _wrong(annotation: str, default: Any) -> Iterator[Any]:
    yield Foreign()
    if default is not None and "None" not in annotation and "Any" not in annotation:
        yield None
    kind = annotation.strip("'\"").removesuffix(" | None")
    if kind in ("int", "float"):
        yield from ("3", NAN, -7)
    if kind == "int":
        yield 2.5
    if kind.startswith(("Callable", "Layers", "Frozen", "Mapping", "nnx.Module", "optax")):
        yield "text"


def says(message: str, argument: str) -> bool:
    """Whether a message names the argument before its first colon."""
    return re.match(rf"[^:]*\b{re.escape(argument)}\b[^:]*:", message) is not None
