"""What a callback is: told of the metrics of every step, and of what freezes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from smartfrz_jax.pytrees import checks


class FreezeEvent(NamedTuple):
    """Layers that froze, or train again, from the same moment on.

    Attributes:
        step: Number of train steps done before.
        names: Names of the layers that froze, front to back.
        returned: Names of the layers that train again.
    """

    step: int
    names: tuple[str, ...]
    returned: tuple[str, ...] = ()


class Callback(Protocol):
    """Any object with these two methods can be a callback of a ``Freezer``.

    Example:
        >>> class Printer:
        ...     def on_step(self, step, metrics):
        ...         print(step, float(metrics["loss"]))
        ...
        ...     def on_freeze(self, event):
        ...         print("frozen from now on:", *event.names)
    """

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Called after every train step.

        Args:
            step: Number of train steps done.
            metrics: Scalars by name, such as ``loss``: numbers, or arrays of JAX that may still be computed.
        """

    def on_freeze(self, event: FreezeEvent) -> None:
        """Called when layers freeze or train again; after :meth:`on_step` of the step before."""


def check_callbacks(callbacks: Any) -> tuple[Callback, ...]:
    """Callbacks as a tuple.

    Raises:
        TypeError: If one lacks a method.
    """
    expected = (
        "a sequence of objects with the methods on_step and on_freeze, such as smartfrz_jax.callbacks.TensorBoard"
    )
    checks.instance(callbacks, Iterable, "callbacks", expected)
    found = tuple(callbacks)
    for one in found:
        if isinstance(one, type) or not all(callable(getattr(one, name, None)) for name in ("on_step", "on_freeze")):
            raise TypeError(f"callbacks: got {checks.got(one)} among them, expected {expected}")
    return found


def tell_step(callbacks: Iterable[Callback], step: int, frozen_layers: int, loss: Any, metrics: Any) -> None:
    """Tells callbacks of a step: its metrics, the loss if there is one, and how many layers it had frozen."""
    known = ({} if loss is None else {"loss": loss}) | {"frozen_layers": frozen_layers} | dict(metrics or {})
    for callback in callbacks:
        callback.on_step(step, known)
