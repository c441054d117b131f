"""Policies that decide by values of the device, and do not make the training loop wait for them.

Phase one has the device compute what is to be read; phase two decides by it, at once or a fixed number of steps later.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from smartfrz_jax.layers.layers import Layers
from smartfrz_jax.policies.base import InitFn, Policy, decision
from smartfrz_jax.pytrees import checks, hosts
from smartfrz_jax.pytrees.types import PyTree

if TYPE_CHECKING:
    from jaxtyping import Array, Shaped

Readings = Mapping[str, "Shaped[Array, '...']"]
"""Arrays of the device by name, which a policy has asked for and not read."""


class DispatchFn(Protocol):
    """``dispatch(state, layers, *, step, params, ...) -> (names, state, readings)``."""

    def __call__(
        self, state: PyTree, layers: Layers, *, step: int, params: Callable[[], PyTree], **signals: Any
    ) -> tuple[frozenset[str], PyTree, Readings | None]:
        """Called once after every train step; reads nothing of the device.

        Args:
            state: State of the previous call of either phase.
            layers: The network's layers.
            step: Number of train steps done.
            params: As of ``update``.
            **signals: As of ``update``.

        Returns:
            Names of the layers that are frozen from now on, the new state, and what is to be read for a decision;
            ``None`` if there is none to be made.
        """
        ...


class ConcludeFn(Protocol):
    """``conclude(state, layers, readings, *, step) -> (names, state)``."""

    def __call__(
        self, state: PyTree, layers: Layers, readings: Mapping[str, np.ndarray], *, step: int
    ) -> tuple[frozenset[str], PyTree]:
        """Decides; ``dispatch`` may have been called again since.

        Args:
            state: State of the previous call of either phase.
            layers: The network's layers.
            readings: What was to be read, on the host.
            step: The step after which it was.

        Returns:
            Names of the layers that are frozen from now on, and the new state.
        """
        ...


class TwoPhase(NamedTuple):
    """A policy's ``update`` in two parts, so that what it reads can be read later than it is computed.

    Attributes:
        dispatch: Takes what a step shows, and dispatches what is to be read.
        conclude: Decides by what was read.
    """

    dispatch: DispatchFn
    conclude: ConcludeFn

    def update(
        self, state: PyTree, layers: Layers, *, step: int, params: Callable[[], PyTree], **signals: Any
    ) -> tuple[frozenset[str], PyTree]:
        """Both at once: waits for what is to be read. The ``update`` of the policy."""
        names, state, readings = self.dispatch(state, layers, step=step, params=params, **signals)
        if readings is None:
            return names, state
        return self.conclude(state, layers, hosts.fetch(dict(readings)), step=step)

    def policy(self, init: InitFn, options: Mapping[str, Any], needs: Collection[str] = ()) -> Policy:
        """The policy of these phases.

        Args:
            init: Makes the state.
            options: As of :class:`~smartfrz_jax.Policy`.
            needs: As of :class:`~smartfrz_jax.Policy`.
        """
        return Policy(init, self.update, frozenset(needs), options, self)


class Reading(NamedTuple):
    """What a policy has asked for and not read.

    Attributes:
        step: The step after which it did.
        values: Arrays by name.
    """

    step: int
    values: dict[str, Any]


class Decisions:
    """Asks a policy after every step, and has it conclude some steps later.

    A policy without two phases, and any policy with a delay of zero, reads what it needs at once.

    Args:
        policy: The policy.

    Attributes:
        readings: What is to be read, the earliest first. Part of a checkpoint.
    """

    def __init__(self, policy: Policy):
        self._policy = policy
        self.readings: tuple[Reading, ...] = ()

    def __call__(
        self, state: PyTree, layers: Layers, delay: int, *, step: int, params: Callable[[], PyTree], **signals: Any
    ) -> tuple[frozenset[str], PyTree]:
        """As ``update`` of the policy, with the steps between."""
        checks.count(delay, "delay", least=0)
        phases = self._policy.phases
        if phases is None or not (delay or self.readings):
            return decision(self._policy.update(state, layers, step=step, params=params, **signals))
        names, state, asked = phases.dispatch(state, layers, step=step, params=params, **signals)
        if asked is not None:
            self.readings += (Reading(step, dict(asked)),)
        while self.readings and self.readings[0].step + delay <= step:
            (at, values), *rest = self.readings
            self.readings = tuple(rest)
            names, state = phases.conclude(state, layers, hosts.fetch(values), step=at)
        return decision((names, state))

    def arrays(self) -> list[list[Any]]:
        """What a checkpoint keeps of the readings, beside :meth:`metadata`."""
        return [list(reading.values.values()) for reading in self.readings]

    def metadata(self) -> list[Any]:
        """The readings without their values, as JSON can hold them."""
        return [
            [step, [[name, list(np.shape(value)), str(value.dtype)] for name, value in values.items()]]
            for step, values in self.readings
        ]


def outline(metadata: Sequence[Any]) -> list[list[np.ndarray]]:
    """Zeros in place of what :meth:`Decisions.arrays` was when this was its metadata."""
    return [[np.zeros(shape, dtype) for _, shape, dtype in values] for _, values in metadata]


def restored(metadata: Sequence[Any], arrays: Sequence[Sequence[Any]]) -> tuple[Reading, ...]:
    """The readings of a checkpoint."""
    return tuple(
        Reading(step, {name: array for (name, _, _), array in zip(values, saved, strict=True)})
        for (step, values), saved in zip(metadata, arrays, strict=True)
    )
