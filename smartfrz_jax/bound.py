"""Calls a program of ``nnx.jit`` again without taking the modules apart again.

``nnx.jit`` flattens every module at each call, which takes 20 to 30 microseconds of Python per variable. Here one
call in the usual way shows which array of the program belongs to which variable; later calls read and write those.
"""

from __future__ import annotations

import dataclasses
import operator
import weakref
from collections.abc import Callable, Iterable, Mapping
from itertools import repeat
from typing import Any

import jax
from flax import nnx

from smartfrz_jax.abstract import Arguments, is_node

PyTree = Any


class Watch:
    """What some modules are made of, to notice when it changes; not the values of their variables, only their types.

    Args:
        nodes: The modules.

    Attributes:
        variables: Their variables, each once.
    """

    def __init__(self, nodes: Iterable[Any]):
        self.variables: list[nnx.Variable[Any]] = []
        self._types: list[type] = []
        self._metadata: list[dict[str, Any]] = []
        self._dicts: list[tuple[dict[Any, Any], int, list[Any], list[Any]]] = []
        self._lists: list[tuple[list[Any], list[Any]]] = []
        self._seen: set[int] = set()
        for node in nodes:
            self._add(node)

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
            # NNX renews its note of the trace in which a module was made.
            names = sorted((name for name in contents if name != "_pytree__state"), key=str)
            self._dicts.append((contents, len(contents), names, [contents[name] for name in names]))
        for child in children:
            self._add(child)

    def matches(self, other: Watch) -> bool:
        """Whether another look found the same: pytrees among the attributes may be others with the same leaves."""
        return (
            len(self.variables) == len(other.variables)
            and all(map(operator.is_, self.variables, other.variables))
            and self._types == other._types
            and all(map(_is_same, self._metadata, other._metadata))
            and len(self._dicts) == len(other._dicts)
            and all(
                a[2] == b[2] and all(map(_is_same_tree, a[3], b[3]))
                for a, b in zip(self._dicts, other._dicts, strict=True)
            )
        )

    def is_unchanged(self) -> bool:
        """Whether all modules have the attributes, and all variables the metadata, that they had: the same objects."""
        return (
            all(
                len(contents) == size and all(map(operator.is_, map(contents.get, names, repeat(self)), values))
                for contents, size, names, values in self._dicts
            )
            and all(len(now) == len(then) and all(map(operator.is_, now, then)) for now, then in self._lists)
            and [type(variable.get_raw_value()) for variable in self.variables] == self._types
            and all(map(_is_same, (variable.get_metadata() for variable in self.variables), self._metadata))
        )


def _children(node: Any) -> tuple[Any, ...]:
    if isinstance(node, nnx.Pytree):
        return tuple(vars(node).values())
    level = jax.tree_util.default_registry.flatten_one_level(node)
    return () if level is None else tuple(level[0])


def _is_same_tree(a: Any, b: Any) -> bool:
    if a is b:
        return True
    (leaves_a, tree_a), (leaves_b, tree_b) = (jax.tree.flatten(tree, is_leaf=is_node) for tree in (a, b))
    return tree_a == tree_b and all(map(operator.is_, leaves_a, leaves_b))


def _is_same(now: Mapping[Any, Any], then: Mapping[Any, Any]) -> bool:
    return now.keys() == then.keys() and all(now[key] is value for key, value in then.items())


class Bound:
    """A compiled program bound to the variables of the modules that it was called with; made by :func:`bind`.

    It does not keep the modules alive, but what they are made of: to be dropped when they are.

    Args:
        nodes: The modules, in the order of the arguments.
        watch: What the modules are made of.
        program: What is known of the program, for the caller; an attribute too.
        compiled: The program, as ``jax.jit`` has it.
        inputs: For each of its arrays, its place among the variables followed by the leaves of the other arguments.
        in_tree: Structure of its positional and keyword arguments.
        targets: For each variable that it changes, the variable and the place of its new value among the results.
        outputs: For each array that the step returns, its place among the results.
        out_tree: Structure of what the step returns.
    """

    def __init__(
        self,
        nodes: list[weakref.ref[Any]],
        watch: Watch,
        *,
        program: Any,
        compiled: Any,
        inputs: list[int],
        in_tree: Any,
        targets: list[tuple[nnx.Variable[Any], int]],
        outputs: list[int],
        out_tree: Any,
    ):
        self.program = program
        self._nodes, self._watch, self._compiled = nodes, watch, compiled
        self._inputs, self._in_tree = inputs, in_tree
        self._targets = targets
        self._outputs, self._out_tree = outputs, out_tree

    def holds(self, parts: Arguments) -> bool:
        """Whether the program can be called with these arguments: the same modules, made of the same.

        Args:
            parts: Arguments of the structure and shapes for which the program was compiled, taken apart.
        """
        nodes = parts.nodes
        if len(nodes) != len(self._nodes) or not all(map(operator.is_, nodes, (node() for node in self._nodes))):
            return False
        if not self._watch.is_unchanged():
            now = Watch(nodes)
            if not self._watch.matches(now):
                return False
            self._watch = now  # other functions of nnx.jit renew pytrees among the attributes
        return True

    def __call__(self, parts: Arguments) -> Any:
        """Runs the step with arguments taken apart; changes variables and returns as the step itself would."""
        given = [variable.get_raw_value() for variable in self._watch.variables]
        given += jax.tree.leaves(parts.rest)
        pure_args, pure_kwargs = jax.tree.unflatten(self._in_tree, [given[place] for place in self._inputs])
        results = jax.tree.leaves(self._compiled(*pure_args, **pure_kwargs))
        for variable, place in self._targets:
            variable.set_raw_value(results[place])
        return jax.tree.unflatten(self._out_tree, [results[place] for place in self._outputs])


def bind(
    stage: Any, parts: Arguments, *, program: Any = None, on_end: Callable[[object], object] | None = None
) -> tuple[Any, Bound | None]:
    """Calls a compiled program of ``nnx.jit`` in the usual way, and watches what goes in and out.

    Args:
        stage: What ``step.lower(...).compile()`` gives for a step made by ``nnx.jit``.
        parts: The step's arguments, taken apart.
        program: What is known of the program, for the caller.
        on_end: Called, with a dead reference, when one of the modules is no more.

    Returns:
        What the step returns, and the bound program. ``None`` in its place if not every array could be attributed: two
        variables share one, the step returns modules or changes what they are made of. Nor is a program bound to lone
        variables among the arguments: it could not tell when they are no more.
    """
    watch = Watch(parts.nodes)
    before = [variable.get_raw_value() for variable in watch.variables]
    given = [*before, *jax.tree.leaves(parts.rest)]
    spy = _Spy(stage.compiled)
    out = dataclasses.replace(stage, compiled=spy)(*parts.args)
    arrays = [value for value in given if jax.tree.leaves(value)]  # optax puts empty nodes where a layer is frozen
    place_in = {id(value): place for place, value in enumerate(given)}
    place_out = {id(value): place for place, value in enumerate(spy.results)}
    after = [variable.get_raw_value() for variable in watch.variables]
    targets = [
        (variable, place_out[id(value)])
        for variable, value in zip(watch.variables, after, strict=True)
        if id(value) in place_out
    ]
    outputs, out_tree = jax.tree.flatten(out, is_leaf=is_node)
    now = Watch(parts.nodes)
    is_clear = (
        not any(isinstance(node, nnx.Variable) for node in parts.nodes)
        and len(set(map(id, arrays))) == len(arrays)
        and all(id(value) in place_in for value in spy.arguments)
        and all(
            id(new) in place_out or new is old or not (jax.tree.leaves(new) or jax.tree.leaves(old))
            for new, old in zip(after, before, strict=True)
        )
        and all(id(value) in place_out for value in outputs)
        and place_out.keys() <= {id(value) for value in (*after, *outputs)}  # nothing that it computes is lost
        and watch.matches(now)
    )
    if not is_clear:
        return out, None
    bound = Bound(
        [weakref.ref(node, on_end) for node in parts.nodes],
        now,
        program=program,
        compiled=stage.compiled,
        inputs=[place_in[id(value)] for value in spy.arguments],
        in_tree=spy.in_tree,
        targets=targets,
        outputs=[place_out[id(value)] for value in outputs],
        out_tree=out_tree,
    )
    return out, bound


class _Spy:
    """A compiled program that remembers what went in and out."""

    def __init__(self, compiled: Any):
        self._compiled = compiled
        self.arguments: list[Any] = []
        self.results: list[Any] = []
        self.in_tree: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.arguments, self.in_tree = jax.tree.flatten((args, kwargs))
        out = self._compiled(*args, **kwargs)
        self.results = jax.tree.leaves(out)
        return out
