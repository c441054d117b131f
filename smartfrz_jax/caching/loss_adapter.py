"""How a loss takes its parameters: a pytree, or a model that an adapter takes apart into one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, Protocol

from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.pytrees.types import PyTree

Hold = Callable[[Frozen, PyTree], contextlib.AbstractContextManager[Any]]


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
