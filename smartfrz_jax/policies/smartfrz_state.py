"""What the policy ``smartfrz`` keeps of a run: the side of it that observes and decides nothing."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from smartfrz_jax.layers.layers import Layers
from smartfrz_jax.policies.base import check_errors, check_finite
from smartfrz_jax.predictor.history import History
from smartfrz_jax.predictor.observation import Observation
from smartfrz_jax.predictor.probe import Probe, contributions, depths_of, spread
from smartfrz_jax.predictor.sampling import Tailoring
from smartfrz_jax.pytrees import checks, hosts
from smartfrz_jax.pytrees.types import PyTree

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


class SmartFrzState(struct.PyTreeNode):
    """State of :func:`~smartfrz_jax.smartfrz`.

    Attributes:
        tailoring: Positions of the sampled weights. They are saved with the run, not drawn again from the seed, so that
            a run resumed under another version of jax does not mix two samples in one history. ``None`` for a predictor
            that reads no weights, which is shown zeros.
        history: The recent records of every active layer.
        start: The sampled weights before the first step, float32 of shape ``(layers, size)``.
        records: Records so far, int32.
        losses: Mean training loss over the interval that ended with each of the last records, oldest first, float32 of
            shape ``(window,)``, on the device; NaN where it is unknown.
        first_loss: Mean training loss over the first interval, float32, on the device; NaN if unknown.
        loss_sum: Sum of the losses since the last record, float32, on the device.
        loss_count: How many of them are finite and in the sum, int32, on the device.
        loss_errors: Losses in a row, up to now, that were not finite, int32, on the device.
        start_params: All parameters before the first step, on the host; ``None`` if contributions are not measured.
        contribution: What the layers up to each had contributed when it was last measured, float32 of shape
            ``(layers,)``; NaN where it was not.
        streak: Freezing stages in a row at which the predictor found each layer ready, int32 of shape ``(layers,)``.
        frozen: Which layers are frozen, shape ``(layers,)``.
    """

    tailoring: Tailoring | None
    history: History
    start: Float[Array, "layers size"]
    records: Int[np.ndarray, ""]
    losses: Float[Array, " window"]
    first_loss: Float[Array, ""]
    loss_sum: Float[Array, ""]
    loss_count: Int[Array, ""]
    loss_errors: Int[Array, ""]
    start_params: PyTree
    contribution: Float[np.ndarray, " layers"]
    streak: Int[np.ndarray, " layers"]
    frozen: Bool[np.ndarray, " layers"]

    @classmethod
    def create(
        cls, layers: Layers, params: PyTree, *, window: int, size: int | None, seed: int, keep_start: bool
    ) -> SmartFrzState:
        """State before the first step.

        Args:
            layers: The network's layers.
            params: Its parameter pytree.
            window: Records to keep of a layer.
            size: Weights to sample of a layer; ``None`` for a predictor that reads none.
            seed: Seed of the sample.
            keep_start: Whether to keep all parameters as they are, to measure contributions.
        """
        tailoring = None if size is None else Tailoring.create(layers, params, size=size, seed=seed)
        return cls(
            tailoring=tailoring,
            history=History.create(len(layers), window, size or 1),
            # By way of the host: a state must not insist on the devices on which the parameters lie now.
            start=jax.device_put(hosts.fetch(_sampled(tailoring, layers, params))),
            records=np.zeros((), np.int32),
            losses=jax.device_put(np.full(window, np.nan, np.float32)),
            first_loss=jax.device_put(np.full((), np.nan, np.float32)),
            loss_sum=_zero(np.float32),
            loss_count=_zero(np.int32),
            loss_errors=_zero(np.int32),
            start_params=jax.tree.map(np.array, hosts.fetch(params)) if keep_start else None,
            contribution=np.full(len(layers), np.nan, np.float32),
            streak=np.zeros(len(layers), np.int32),
            frozen=np.zeros(len(layers), bool),
        )

    def with_loss(self, loss: Any) -> SmartFrzState:
        """Adds the loss of a step, without waiting for the device; one that is not finite is left out.

        Args:
            loss: A scalar; ``None`` if it is unknown.

        Raises:
            TypeError: If it is no number.
            ValueError: If it is not a scalar.
        """
        if loss is None:
            return self
        checks.scalar(loss, "loss", "a scalar; pass the mean over the batch")
        loss = hosts.own(loss) if isinstance(loss, jax.Array) else jax.device_put(np.float32(loss))
        loss_sum, loss_count, loss_errors = _add(self.loss_sum, self.loss_count, self.loss_errors, loss)
        return self.replace(loss_sum=loss_sum, loss_count=loss_count, loss_errors=loss_errors)

    def with_record(self, layers: Layers, params: PyTree) -> tuple[SmartFrzState, dict[str, jax.Array]]:
        """Adds a record of every active layer, and drops those of frozen ones, without waiting for the device.

        Args:
            layers: The network's layers.
            params: Its parameter pytree.

        Returns:
            The state, and what :meth:`check_record` is to look at.
        """
        weights = _sampled(self.tailoring, layers, params)
        losses, first_loss = _with_mean(self.losses, self.first_loss, self.loss_sum, self.loss_count)
        recorded = self.replace(
            history=self.history.record(weights, jax.device_put(~self.frozen)),
            records=np.asarray(self.records + 1, np.int32),
            losses=losses,
            first_loss=self.first_loss if self.records else first_loss,
            loss_sum=_zero(np.float32),
            loss_count=_zero(np.int32),
        )
        return recorded, {"finite": _rows_finite(weights), "errors": self.loss_errors}

    def check_record(
        self, layers: Layers, readings: Mapping[str, Any], *, step: int, policy: str, max_consecutive_errors: int
    ) -> None:
        """Checks a record that has arrived on the host.

        Args:
            layers: The network's layers.
            readings: From :meth:`with_record`.
            step: Number of train steps done then.
            policy: Name of the policy.
            max_consecutive_errors: Losses in a row that may be other than finite.

        Raises:
            FloatingPointError: If a sampled weight of an active layer is not finite, or more losses in a row were not.
        """
        check_finite(layers, ~self.frozen & ~np.asarray(readings["finite"]), what="params", policy=policy, step=step)
        check_errors(readings["errors"], max_consecutive_errors, what="loss", policy=policy, step=step)

    def with_contribution(self, layers: Layers, params: PyTree, probe: Probe, depths: int) -> SmartFrzState:
        """Measures what the layers up to some that are active have contributed.

        Args:
            layers: The network's layers.
            params: Its parameter pytree.
            probe: From such a pytree to the training loss.
            depths: Most depths at which to measure.

        Raises:
            ValueError: If a loss is not a finite scalar.
        """
        measured = contributions(layers, probe, params, self.start_params, depths=depths_of(~self.frozen, depths))
        return self.replace(contribution=spread(measured))

    def observation(self, progress: float) -> Observation:
        """What a predictor sees of every layer at the last record, on the device.

        Args:
            progress: Share of the run done by then; NaN if its length is unknown.
        """
        layers = len(self.frozen)
        records, mask = self.history.chronological()
        losses, first_loss = _of_each_layer(self.losses, self.first_loss, layers)
        rest = {
            "elapsed": np.full(layers, self.records, np.float32),
            "progress": np.full(layers, progress, np.float32),
            "depth": np.linspace(0, 1, layers, dtype=np.float32),
            "contribution": self.contribution,
        }
        known = {"records": records, "mask": mask, "start": self.start, "losses": losses, "first_loss": first_loss}
        return Observation(**known, **jax.device_put(rest))


def _sampled(tailoring: Tailoring | None, layers: Layers, params: PyTree) -> jax.Array:
    """Shape ``(layers, size)``; one zero for each layer without tailoring, as of no numbers there is no largest."""
    if tailoring is None:
        return jax.device_put(np.zeros((len(layers), 1), np.float32))
    sampled = tailoring(params)
    return sampled if sampled.is_fully_addressable else jax.device_put(hosts.fetch(sampled))


def _zero(dtype: Any) -> jax.Array:
    return jax.device_put(np.zeros((), dtype))


@jax.jit
def _add(
    total: jax.Array, count: jax.Array, errors: jax.Array, loss: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    finite = jnp.isfinite(loss)
    added = jnp.where(finite, total + loss.astype(jnp.float32), total)
    return added, count + finite.astype(jnp.int32), jnp.where(finite, 0, errors + 1)


@jax.jit
def _with_mean(
    losses: jax.Array, first_loss: jax.Array, total: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The losses with the mean of those since the last record in place of the oldest, and the mean; NaN of none."""
    mean = jnp.where(count > 0, total / count.astype(jnp.float32), jnp.full_like(first_loss, jnp.nan))
    return jnp.append(losses[1:], mean), mean


@functools.partial(jax.jit, static_argnums=2)
def _of_each_layer(losses: jax.Array, first_loss: jax.Array, layers: int) -> tuple[jax.Array, jax.Array]:
    return jnp.broadcast_to(losses, (layers, *losses.shape)), jnp.broadcast_to(first_loss, layers)


@jax.jit
def _rows_finite(weights: jax.Array) -> jax.Array:
    return jnp.isfinite(weights).all(axis=1)
