"""How a predictor reads a layer's records: as the paper has it, or in forms that carry over to other layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

import jax
import jax.numpy as jnp

from smartfrz_jax.predictor.observation import Observation
from smartfrz_jax.pytrees import checks

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

Weights = Literal["raw", "scale_free", "none"]
ContextIn = Literal["records", "classifier", "both"]


REGIME = (
    "displacement", "growth", "step", "drift", "wander", "persistence", "slowing", "outward", "spreading", "recent",
    "radial", "tails_start", "tails", "shape_start", "shape", "loss_level", "loss_slope", "loss_noise", "records",
    "contribution",
)  # fmt: skip
"""Numbers by which a layer's readiness is to be told; :mod:`smartfrz_jax.predictor.context` has their definitions."""
WITHOUT_WEIGHTS = ("loss_level", "loss_slope", "loss_noise", "records", "contribution")
"""Those of :data:`REGIME` that can be told without weights."""


@dataclasses.dataclass(frozen=True)
class Encoding:
    """What of an observation goes into a predictor, and in which form.

    With the record ``W_j`` (newest ``W_t``) and its successive differences ``D_j = W_j - W_{j-1}``, a record becomes

    - ``"raw"``: ``W_j`` as it is (the paper). An input means something only for the positions that were drawn.
    - ``"scale_free"``: ``sort(W_j - W_t)``, divided by the root mean square of ``D`` over the window and by the square
      root of its number of steps: the quantile function of the way to the newest record, about one at the oldest
      record if the layer is on a random walk, whatever its scale.
    - ``"none"``: nothing; the context alone decides.

    Attributes:
        weights: The form of the records.
        progress: Whether the context has the share of the run that is done.
        depth: Whether it has the place of the layer.
        regime: Which of :data:`REGIME` it has: how far, how straight and how fast the layer has moved, the shape of its
            weights, the loss, what the front has contributed. ``True`` is all of them, ``False`` none.
        context_in: Where the context goes: beside every record, beside what attention gives to the classifier, or both.
    """

    weights: Weights = "scale_free"
    progress: bool = True
    depth: bool = True
    regime: bool | Sequence[str] = True
    context_in: ContextIn = "both"

    def __post_init__(self) -> None:
        for field, choices in (("weights", get_args(Weights)), ("context_in", get_args(ContextIn))):
            checks.choice(getattr(self, field), field, choices)
        for field in ("progress", "depth"):
            checks.flag(getattr(self, field), field)
        if isinstance(self.regime, bool):
            asked = REGIME if self.regime else ()
        else:
            asked = checks.names(self.regime, "regime", of="numbers, or True or False")
        for unknown in [name for name in asked if name not in REGIME]:
            raise ValueError(f"regime: got {unknown!r}, expected True, False or some of {', '.join(REGIME)}")
        object.__setattr__(self, "regime", tuple(name for name in REGIME if name in asked))
        if self.weights == "none" and not self.has_context:
            raise ValueError(
                "weights: got 'none' without progress, depth and regime, so nothing would be seen; switch one on"
            )

    @property
    def has_context(self) -> bool:
        """Whether anything but the records goes in."""
        return self.progress or self.depth or bool(self.regime)

    @property
    def regime_names(self) -> tuple[str, ...]:
        """The names of ``regime``, in the order of :data:`REGIME`."""
        return tuple(self.regime) if not isinstance(self.regime, bool) else ()

    @property
    def reads_weights(self) -> bool:
        """Whether any of it depends on the weights of the records."""
        return self.weights != "none" or not set(WITHOUT_WEIGHTS).issuperset(self.regime_names)

    def width(self, size: int) -> int:
        """Numbers that a record of ``size`` weights becomes.

        Raises:
            TypeError: If ``size`` is no number.
            ValueError: If it is below 1.
        """
        checks.count(size, "size")
        return 0 if self.weights == "none" else size


PAPER = Encoding(weights="raw", progress=False, depth=False, regime=False)


def encode_records(
    encoding: Encoding, observation: Observation
) -> tuple[Float[Array, "window width"], Bool[Array, " window"]]:
    """Records in the form that ``encoding`` says, and which of them exist in that form; zero where they do not.

    Args:
        encoding: The form.
        observation: What is known of one layer.

    Returns:
        float32 of shape ``(window, encoding.width(size))``, and a mask.
    """
    records = _existing(observation)
    if encoding.weights == "none":
        return records[:, :0], observation.mask
    if encoding.weights == "raw":
        return records, observation.mask
    _, exists = successive_differences(observation)
    scale = rms_step(observation) * jnp.sqrt(count(exists))
    away = jnp.where(observation.mask[:, None], records - records[-1:], 0.0)
    return _sort(over(away, scale)), observation.mask


def successive_differences(
    observation: Observation,
) -> tuple[Float[Array, "window size"], Bool[Array, " window"]]:
    """Each record minus the one before, zero where there is none, and where there is.

    The record before the first of a run is its start; if older records than those in the window existed, the oldest in
    it has no predecessor.

    Args:
        observation: What is known of one layer.
    """
    records, mask = _existing(observation), observation.mask
    begins = mask & (jnp.cumsum(mask) == 1) & _is_whole(observation)
    before = jnp.concatenate([records[:1], records[:-1]])
    before = jnp.where(begins[:, None], observation.start[None], before)
    exists = mask & (begins | jnp.concatenate([jnp.zeros(1, bool), mask[:-1]]))
    return jnp.where(exists[:, None], records - before, 0.0), exists


def window_begin(observation: Observation) -> Float[Array, " size"]:
    """Where the first of the successive differences begins: the oldest record, or the start of the run before it."""
    oldest = _existing(observation)[jnp.argmax(observation.mask)]
    return jnp.where(_is_whole(observation), observation.start, oldest)


def rms_step(observation: Observation) -> Float[Array, ""]:
    """Root mean square of the successive differences in the window; zero if there are none."""
    steps, exists = successive_differences(observation)
    return rms(steps) * jnp.sqrt(len(exists) / count(exists))


def rms(x: Float[Array, "*shape"]) -> Float[Array, ""]:
    """Root mean square of all entries; squares neither overflow nor vanish."""
    largest = jnp.max(jnp.abs(x))
    return largest * jnp.sqrt(jnp.mean(jnp.square(over(x, largest))))


def count(exists: Bool[Array, " window"]) -> Float[Array, ""]:
    """How many exist, float32; one if none does, to divide by."""
    return jnp.maximum(jnp.sum(exists, dtype=jnp.float32), 1.0)


def over(x: Float[Array, "*shape"], divisor: Float[Array, ""]) -> Float[Array, "*shape"]:
    """``x / divisor``, and zero where the divisor is."""
    return x / jnp.where(divisor > 0, divisor, jnp.inf)


def _sort(x: jax.Array) -> jax.Array:
    """Sorts the last axis, as integers in the same order: XLA sorts those 2.5 times as fast on a CPU as floats."""
    ordered = jnp.sort(_swap(jax.lax.bitcast_convert_type(x, jnp.int32)), axis=-1)
    return jax.lax.bitcast_convert_type(_swap(ordered), jnp.float32)


def _swap(bits: jax.Array) -> jax.Array:
    """Between the bits of a float and integers of the same order; of negative floats the bits fall as they rise."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _existing(observation: Observation) -> jax.Array:
    """The records, zero where there are none: a NaN there would pass through a weight of zero."""
    return jnp.where(observation.mask[:, None], observation.records, 0.0)


def _is_whole(observation: Observation) -> jax.Array:
    """Whether the window has every record since the start of the run."""
    return observation.elapsed < jnp.sum(observation.mask, dtype=jnp.float32) + 0.5
