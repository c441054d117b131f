"""What modules are made of, and programs bound to the modules that they were called with.

As long as modules are made of the same, calling a program is reading and writing their variables.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, compress
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.core import Tracer

from smartfrz_jax.programs.arguments import Arguments, is_node

# Slots that methods of variables read and write after microseconds of Python; None if some NNX has no such slots.
_RAW_VALUE: Any = vars(nnx.Variable).get("_raw_value")
_METADATA: Any = vars(nnx.Variable).get("_var_metadata")
_RENEWED = "_pytree__state"  # NNX's note of the trace in which a module was made


class Watch:
    """What some modules are made of, to notice when it changes; not the values of their variables, only their types.

    Args:
        nodes: The modules.

    Attributes:
        variables: Their variables, each once; for modules made of the same in the same order.
    """

    def __init__(self, nodes: Iterable[Any]):
        self.variables: list[nnx.Variable[Any]] = []
        self._types: list[type] = []
        self._metadata: list[dict[str, Any]] = []
        self._dicts: list[dict[Any, Any]] = []
        self._lists: list[tuple[list[Any], list[Any]]] = []
        self._seen: set[int] = set()
        for node in nodes:
            self._add(node)
        self._sizes = list(map(len, self._dicts))
        self._names = list(chain.from_iterable(self._dicts))
        self._watched = [name != _RENEWED for name in self._names]
        self._values = list(self._values_now())
        self._sorted = [[(name, contents[name]) for name in _names(contents)] for contents in self._dicts]
        has_slots = _RAW_VALUE and _METADATA and all(issubclass(type(v), nnx.Variable) for v in self.variables)
        self._write = _RAW_VALUE.__set__ if has_slots else nnx.Variable.set_raw_value
        self._get_raw_value = _RAW_VALUE.__get__ if has_slots else nnx.Variable.get_raw_value
        self._get_metadata = _METADATA.__get__ if has_slots else nnx.Variable.get_metadata

    def _add(self, node: Any) -> None:
        if id(node) in self._seen:
            return
        self._seen.add(id(node))
        if isinstance(node, nnx.Variable):
            self.variables.append(node)
            self._types.append(type(node.get_raw_value()))
            self._metadata.append(dict(node.get_metadata()))
            return
        children, contents = _children(node), node if isinstance(node, dict) else getattr(node, "__dict__", None)
        if isinstance(node, list):
            self._lists.append((node, list(node)))
        elif contents and children:
            self._dicts.append(contents)
        for child in children:
            self._add(child)

    def _values_now(self) -> Iterable[Any]:
        return compress(chain.from_iterable(contents.values() for contents in self._dicts), self._watched)

    def raw_values(self) -> list[Any]:
        """The values of the variables, as ``get_raw_value`` gives them."""
        return list(map(self._get_raw_value, self.variables))

    def set_raw_values(self, places: list[int], values: list[Any]) -> None:
        """Gives some variables new values, as ``set_raw_value`` does, but checks the trace for the first alone.

        Args:
            places: Which of the variables.
            values: Their values.

        Raises:
            flax.errors.TraceContextError: If the variables are of another trace than the caller.
        """
        write: Callable[[Any, Any], None] = nnx.Variable.set_raw_value
        for place, value in zip(places, values, strict=True):
            write(self.variables[place], value)
            write = self._write

    def matches(self, other: Watch) -> bool:
        """Whether another look found the same: pytrees among the attributes may be others with the same leaves."""
        return (
            len(self.variables) == len(other.variables)
            and all(map(operator.is_, self.variables, other.variables))
            and list(map(_kind, self._types)) == list(map(_kind, other._types))
            and all(map(_is_same, self._metadata, other._metadata))
            and list(map(len, self._sorted)) == list(map(len, other._sorted))
            and all(
                name == its_name and _is_same_tree(value, its_value)
                for (name, value), (its_name, its_value) in zip(
                    chain.from_iterable(self._sorted), chain.from_iterable(other._sorted), strict=True
                )
            )
        )

    def is_unchanged(self) -> bool:
        """Whether all modules have the attributes, and all variables the metadata, that they had: the same objects."""
        try:
            # Each line is one pass in C: this runs before every step.
            return (
                list(map(len, self._dicts)) == self._sizes
                and list(chain.from_iterable(self._dicts)) == self._names
                and all(map(operator.is_, self._values_now(), self._values))
                and all(len(now) == len(then) and all(map(operator.is_, now, then)) for now, then in self._lists)
                and list(map(type, self.raw_values())) == self._types
                and list(map(self._get_metadata, self.variables)) == self._metadata
            )
        except (TypeError, ValueError):  # metadata that is another object and cannot be compared
            return False


def _names(contents: Mapping[Any, Any]) -> list[Any]:
    return sorted((name for name in contents if name != _RENEWED), key=str)


def _children(node: Any) -> tuple[Any, ...]:
    if isinstance(node, nnx.Pytree):
        return tuple(vars(node)[name] for name in _names(vars(node)))
    level = jax.tree_util.default_registry.flatten_one_level(node)
    return () if level is None else tuple(level[0])


def _kind(of: type) -> type:
    """The type, or that of all arrays."""
    return jax.Array if issubclass(of, jax.Array | Tracer | np.ndarray) else of


def _is_same_tree(a: Any, b: Any) -> bool:
    if a is b:
        return True
    (leaves_a, tree_a), (leaves_b, tree_b) = (jax.tree.flatten(tree, is_leaf=is_node) for tree in (a, b))
    return tree_a == tree_b and all(map(operator.is_, leaves_a, leaves_b))


def _is_same(now: Mapping[Any, Any], then: Mapping[Any, Any]) -> bool:
    return now.keys() == then.keys() and all(now[key] is value for key, value in then.items())


class Bound:
    """A program bound to the modules that it was called with.

    It does not keep the modules alive, but what they are made of: to be dropped when they are.

    Args:
        args: The arguments with the modules.
        watch: What these are made of.
        program: The program; an attribute too.
        on_end: Called, with a dead reference, when one of the modules is no more.
    """

    def __init__(self, args: Arguments, watch: Watch, program: Any, on_end: Callable[[object], object]):
        self.program, self.watch = program, watch
        self._nodes = [weakref.ref(node, on_end) for node in args.nodes]

    def holds(self, args: Arguments) -> bool:
        """Whether the program can be called with these arguments: the same modules, made of the same.

        Args:
            args: Arguments of the structure and shapes for which the program was compiled.
        """
        nodes = args.nodes
        if len(nodes) != len(self._nodes) or not all(map(operator.is_, nodes, (node() for node in self._nodes))):
            return False
        if not self.watch.is_unchanged():
            now = Watch(nodes)
            if not self.watch.matches(now):
                return False
            self.watch = now  # functions of nnx.jit renew pytrees among the attributes
        return True


class Bounds(dict[Any, Bound]):
    """Bound programs by the batch's shapes and the modules; gone when the modules are."""

    def bind(self, args: Arguments, watch: Watch, program: Any) -> None:
        """Binds a program, unless there are lone variables among the arguments: nothing tells when they are no more."""
        if not args.nodes or any(isinstance(node, nnx.Variable) for node in args.nodes):
            return
        me, call = weakref.ref(self), args.call

        def drop(_: object) -> None:
            bounds = me()
            if bounds is not None:
                bounds.pop(call, None)

        self[call] = Bound(args, watch, program, drop)
