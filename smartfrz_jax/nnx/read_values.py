"""The values of the variables that the frozen front of a model reads, to notice when something else sets them."""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from smartfrz_jax.pytrees import hosts, paths


class WrittenError(ValueError):
    """A step changes, outside of its loss, what frozen layers read."""


class ReadValues:
    """The values that some variables of a model had when they were last noted.

    They are compared where they are other arrays than then: an evaluation in ``nnx.jit`` puts the same values into the
    model anew. So what it replaces stays in memory until the next step. Neither outlives the model.

    Args:
        names: Names of the variables.
    """

    def __init__(self, names: Collection[str]):
        self._names = names
        self._noted: list[Any] = []
        self._model: Callable[[], Any] = _nothing
        self._found: list[_Found] = []

    def note(self, model: nnx.Module) -> None:
        """From now on, these are the values of the variables; after each step, so the way to them is not checked."""
        is_known = self._model() is model and self._found
        self._noted[:] = self._found[0].values if is_known else self._of(model)

    def are_of(self, model: nnx.Module) -> bool:
        """Whether the variables of a model have the values that were noted."""
        now = self._of(model)
        if len(now) != len(self._noted):
            return False
        others = [(then, value) for then, value in zip(self._noted, now, strict=True) if then is not value]
        return all(_may_be_equal(then, value) for then, value in others) and _are_equal(others)

    def _of(self, model: nnx.Module) -> list[Any]:
        if self._model() is not model or not self._found or not self._found[0].is_unchanged():
            self._found = [_Found(model, self._names)]
            held = self._found, self._noted
            try:  # what it is made of must not outlive it
                self._model = weakref.ref(model, lambda _: [each.clear() for each in held])
            except TypeError:  # a container of modules, which is looked through each time
                return self._found.pop().values
        return self._found[0].values


class _Found:
    """Some variables of a model, and the way to them.

    Attributes:
        variables: The variables, by name.
    """

    def __init__(self, model: nnx.Module, names: Collection[str]):
        flat = nnx.to_flat_state(nnx.state(model, graph=True))
        known = {paths.SEPARATOR.join(map(str, path)): (path, variable) for path, variable in flat}
        homes = {home: known[home] for home in sorted({_home(name, known) for name in names} - {""})}
        self.variables: dict[str, Any] = {home: variable for home, (_, variable) in homes.items()}
        steps = [step for path, _ in homes.values() for step in _way(model, path)]
        once = {(id(contents), key): (contents, key, child) for contents, key, child in steps}
        self._contents, self._keys, self._children = zip(*once.values(), strict=True) if once else ((), (), ())

    @property
    def values(self) -> list[Any]:
        """Their values; the leaves of those that are pytrees."""
        return jax.tree.leaves([variable.get_raw_value() for variable in self.variables.values()])

    def is_unchanged(self) -> bool:
        """Whether the way still leads to the same variables."""
        try:
            # One pass in C: this runs before every step.
            return all(map(operator.is_, map(operator.getitem, self._contents, self._keys), self._children))
        except (KeyError, IndexError):
            return False


def unwritten(train_step: Callable[..., Any], names: Collection[str]) -> Callable[..., Any]:
    """A step that cannot be traced if it changes some variables of the model.

    Args:
        train_step: The plain step, of ``(model, optimizer, *inputs)``.
        names: Names of the variables.

    Returns:
        The same step. It raises a :class:`WrittenError` if it changes one of them.
    """

    @functools.wraps(train_step)
    def checked(model: nnx.Module, *args: Any) -> Any:
        variables = _Found(model, names).variables
        before = {name: variable.get_raw_value() for name, variable in variables.items()}
        out = train_step(model, *args)
        for name, variable in variables.items():
            if variable.get_raw_value() is not before[name]:
                raise WrittenError(
                    f"make_step: the step changes {name!r} outside of the loss, and frozen layers read it, so that "
                    "activations are others in every step; freeze only layers before the place where it is read"
                )
        return out

    return checked


def _home(name: str, known: Collection[str]) -> str:
    """Name of the variable with a leaf of that name; empty if there is none."""
    while name and name not in known:
        name = name.rpartition(paths.SEPARATOR)[0]
    return name


def _way(model: nnx.Module, path: Sequence[Any]) -> Iterator[tuple[Any, Any, Any]]:
    """What is looked up, where, and what is there, on the way to a variable."""
    node: Any = model
    for key in path:
        contents: Any = node if isinstance(node, dict | list | tuple) else vars(node)
        place = str(key) if isinstance(contents, dict) and key not in contents else key
        node = contents[place]
        yield contents, place, node


def _may_be_equal(then: Any, value: Any) -> bool:
    """Whether two values can be compared, where they lie: arrays of one kind, none of them donated."""
    if not (isinstance(then, jax.Array) and isinstance(value, jax.Array)):
        return type(then) is type(value) and np.array_equal(then, value)
    kinds = [(array.shape, array.dtype, array.sharding) for array in (then, value)]
    return kinds[0] == kinds[1] and not (then.is_deleted() or value.is_deleted())


def _are_equal(pairs: Sequence[tuple[Any, Any]]) -> bool:
    """Whether arrays are equal, pair by pair, bit for bit but for the signs of zeros and kinds of NaN."""
    return all(hosts.fetch([_is_equal(a, b) for a, b in pairs if isinstance(a, jax.Array)]))


@jax.jit
def _is_equal(a: jax.Array, b: jax.Array) -> jax.Array:
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = map(jax.random.key_data, (a, b))
    return jnp.array_equal(a, b, equal_nan=jnp.issubdtype(a.dtype, jnp.inexact))


def _nothing() -> None:
    return None
