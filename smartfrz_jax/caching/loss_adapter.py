"""How a loss takes its parameters: a pytree, or a model that an adapter takes apart into one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

import jax

from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.layers.layers import Layers
from smartfrz_jax.layers.rows import stacked
from smartfrz_jax.pytrees import paths
from smartfrz_jax.pytrees.types import PyTree

Hold = Callable[[Frozen, PyTree], contextlib.AbstractContextManager[Any]]


class Static:
    """What is static of a model, with its hash, which takes longer than a small program."""

    def __init__(self, value: Any):
        self.value, self._hash = value, hash(value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Static) and self.value == other.value)


class TakenApart(NamedTuple):
    """Parameters, or a model, taken apart: once for all parts of a batch, as that takes longer than a small program.

    Attributes:
        static: What is static.
        variables: The arrays.
    """

    static: Static
    variables: PyTree


class LossAdapter(Protocol):
    """Between what users pass as parameters, and the pytree of arrays that a loss is traced with."""

    def split(self, params: PyTree) -> tuple[Hashable, PyTree]:
        """What is static of the parameters, or of the model, and their arrays."""
        ...

    def traceable(
        self, loss_fn: Callable[..., Any], frozen: Frozen, static: Any
    ) -> Callable[..., tuple[Any, dict[str, Any]]]:
        """A function of ``(variables, *inputs)`` to what the loss returns and the variables that it may have changed.

        Args:
            loss_fn: The user's loss.
            frozen: The frozen set; its layers run as they do when frozen.
            static: The first part of :meth:`split`.
        """
        ...

    def write(self, params: PyTree, variables: PyTree, updates: dict[str, Any]) -> None:
        """Writes changed variables back, where parameters are an object that the loss changes.

        Args:
            params: What the user passed.
            variables: The second part of :meth:`split`.
            updates: New values by name.
        """
        ...


@dataclasses.dataclass(frozen=True)
class PytreeLoss:
    """Of losses of ``(params, *inputs)``, which change nothing.

    Attributes:
        hold: From a frozen set and the parameters to a context in which its layers run as they do when frozen.
    """

    hold: Hold | None = None

    def split(self, params: PyTree) -> tuple[Hashable, PyTree]:
        """As of :class:`LossAdapter`."""
        return None, params

    def traceable(
        self, loss_fn: Callable[..., Any], frozen: Frozen, static: Any
    ) -> Callable[..., tuple[Any, dict[str, Any]]]:
        """As of :class:`LossAdapter`."""

        def run(variables: PyTree, *inputs: Any) -> tuple[Any, dict[str, Any]]:
            with contextlib.nullcontext() if self.hold is None else self.hold(frozen, variables):
                return loss_fn(variables, *inputs), {}

        return run

    def write(self, params: PyTree, variables: PyTree, updates: dict[str, Any]) -> None:
        """As of :class:`LossAdapter`."""


@dataclasses.dataclass(frozen=True)
class PartsLoss:
    """Of losses of parameters of which parts (rows, what lookups read) are in layers of their own: each a variable.

    Attributes:
        adapter: The adapter of the loss.
        layers: The layers.
    """

    adapter: LossAdapter
    layers: Layers

    def split(self, params: PyTree) -> tuple[Hashable, PyTree]:
        """As of :class:`LossAdapter`."""
        static, variables = self.adapter.split(params)
        return (static, jax.tree.structure(variables)), self.layers.unstacked(variables)

    def traceable(
        self, loss_fn: Callable[..., Any], frozen: Frozen, static: Any
    ) -> Callable[..., tuple[Any, dict[str, Any]]]:
        """As of :class:`LossAdapter`."""
        own, structure = static
        like = jax.tree.unflatten(structure, range(structure.num_leaves))
        run = self.adapter.traceable(loss_fn, Frozen(self.layers, frozen.names), own)

        of_parts = self.layers.of_unstacked(run, like)

        def with_updates(parts: PyTree, *inputs: Any) -> tuple[Any, dict[str, Any]]:
            out, updates = of_parts(parts, *inputs)
            return out, self.layers.unstacked(updates)

        return with_updates

    def write(self, params: PyTree, variables: PyTree, updates: dict[str, Any]) -> None:
        """As of :class:`LossAdapter`."""
        _, whole = self.adapter.split(params)
        new = paths.flatten(stacked({**variables, **updates}, whole, self.layers.stacks))
        changed = {row.array for layer in self.layers for row in layer.rows if row.name in updates}
        own = {name: leaf for name, leaf in new.items() if name in updates or name in changed}
        self.adapter.write(params, whole, own)
