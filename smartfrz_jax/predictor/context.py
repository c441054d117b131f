"""The context of a layer's records: where in the run it stands, and how ready it looks.

Whether a layer can be frozen depends on the regime of the run: in a network that came well trained the first layers are
ready at once. These numbers are to tell it, for layers of networks never seen: none depends on the order of the
positions or on the scale of the layer's weights, and all are bounded.

In what follows ``W_0`` is the start, ``W_t`` the newest record, ``D`` the ``k`` successive differences in the window,
``W_s`` where the first of them begins, ``net = W_t - W_s``, and ``|x|`` a root mean square.

==================  ==================================================================================================
``progress``        share of the run that is done
``depth``           place of the layer, 0 to 1
``displacement``    log of ``|W_t - W_0|`` relative to ``sqrt(|W_0|^2 + |W_t - W_0|^2)``
``growth``          log of ``|W_t| / |W_0|``
``step``            log of ``|D| / |W_t|``
``drift``           log of ``|net| / (|D| sqrt(k))``: 0 for a random walk, more if straighter, less if it oscillates
``wander``          the same from the start on: log of ``|W_t - W_0| / (|D| sqrt(elapsed))``
``persistence``     mean cosine between successive differences
``slowing``         change of ``|D|`` from the older to the newer half of the window, relative to their sum
``outward``         cosine between ``net`` and ``W_s - W_0``: whether the layer still goes where it went before
``spreading``       change from ``|W_s - W_0|`` to ``|W_t - W_0|`` relative to their sum
``recent``          ``|net|`` relative to ``|net| + |W_s - W_0|``
``radial``          cosine between ``net`` and ``W_t``: growth, or shrinking by weight decay
``tails_start``     log kurtosis of ``W_0``: 0.59 if uniform, 1.1 if normal, more in trained layers
``tails``           log kurtosis of ``W_t``
``shape_start``     mean magnitude relative to root mean square of ``W_0``: 0.87 if uniform, 0.80 if normal
``shape``           the same of ``W_t``
``loss_level``      log of the loss (newer half of the window) relative to the first
``loss_slope``      change of the loss from the older to the newer half of the window, relative to their sum
``loss_noise``      log of the root mean square of its successive differences relative to its mean
``records``         log of one plus the number of records
``contribution``    what the front up to the layer has contributed, relative to the first loss, as ``sign(x) log(1 +
                    200 |x|)``
==================  ==================================================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from smartfrz_jax.predictor.encoding import Encoding, count, over, rms, rms_step, successive_differences, window_begin
from smartfrz_jax.predictor.observation import Observation

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

_STEEPNESS = 200.0  # half a per cent of the first loss is where small contributions end
# A predictor is told if one of these is unknown.
FLAGGED = ("progress", "drift", "outward", "loss_level", "loss_slope", "contribution")


def context_names(encoding: Encoding) -> tuple[str, ...]:
    """Names of the numbers that :func:`encode_context` gives."""
    return (
        *(("progress",) if encoding.progress else ()),
        *(("depth",) if encoding.depth else ()),
        *encoding.regime_names,
    )


def encode_context(encoding: Encoding, observation: Observation) -> tuple[Float[Array, " c"], Bool[Array, " c"]]:
    """The context of one layer's records.

    Args:
        encoding: What of it is wanted.
        observation: What is known of one layer.

    Returns:
        The numbers, float32, in the order of :func:`context_names`, zero where unknown, and which are known: not
        progress and loss if they were not given, nor directions of a layer that has not moved.
    """
    numbers: dict[str, tuple[jax.Array, jax.Array]] = {}
    if encoding.progress:
        known = jnp.isfinite(observation.progress)
        numbers["progress"] = jnp.clip(jnp.where(known, observation.progress, 0.0), 0.0, 1.0), known
    if encoding.depth:
        numbers["depth"] = jnp.clip(observation.depth, 0.0, 1.0), jnp.bool_(True)
    if encoding.reads_weights and encoding.regime_names:
        numbers |= _movement(observation) | _shape(observation)
    if encoding.regime_names:
        numbers |= _loss(observation)
        numbers["contribution"] = _contribution(observation)
        numbers["records"] = jnp.log1p(jnp.sum(observation.mask, dtype=jnp.float32)), jnp.bool_(True)
    names = context_names(encoding)
    if not names:
        return jnp.zeros(0), jnp.zeros(0, bool)
    known = jnp.stack([numbers[name][1] for name in names])
    return jnp.where(known, jnp.stack([numbers[name][0] for name in names]), 0.0), known


def _movement(observation: Observation) -> dict[str, tuple[jax.Array, jax.Array]]:
    start, newest = observation.start, jnp.where(observation.mask[-1], observation.records[-1], 0.0)
    steps, exists = successive_differences(observation)
    begin, step = window_begin(observation), rms_step(observation)
    net, away, before = newest - begin, newest - start, begin - start
    older, newer = _halves(exists)
    # Of differences that follow each other; a product with a missing one is zero.
    cosines = jax.vmap(_cosine)(steps[1:], steps[:-1])
    pairs = exists[1:] & exists[:-1] & _moves(steps[1:]) & _moves(steps[:-1])
    moved = step > 0
    return {
        "displacement": (_log_ratio(rms(away), jnp.hypot(rms(start), rms(away)), -14.0, 0.0), jnp.bool_(True)),
        "growth": (_log_ratio(rms(newest), rms(start), -4.0, 4.0), jnp.bool_(True)),
        "step": (_log_ratio(step, rms(newest), -16.0, 4.0), exists.any()),
        "drift": (_log_ratio(rms(net), step * jnp.sqrt(count(exists)), -4.0, 4.0), moved),
        "wander": (_log_ratio(rms(away), step * jnp.sqrt(jnp.maximum(observation.elapsed, 1.0)), -8.0, 8.0), moved),
        "persistence": (jnp.sum(jnp.where(pairs, cosines, 0.0)) / count(pairs), pairs.any()),
        "slowing": (_change(_rms_of(steps, older), _rms_of(steps, newer)), moved),
        "outward": (_cosine(net, before), (rms(net) > 0) & (rms(before) > 0)),
        "spreading": (_change(rms(before), rms(away)), moved),
        "recent": (over(rms(net), rms(net) + rms(before)), moved),
        "radial": (_cosine(net, newest), moved),
    }


def _shape(observation: Observation) -> dict[str, tuple[jax.Array, jax.Array]]:
    start, newest = observation.start, jnp.where(observation.mask[-1], observation.records[-1], 0.0)
    numbers = {}
    for end, weights in (("_start", start), ("", newest)):
        unit = over(weights, rms(weights))
        centred = weights - jnp.mean(weights)
        standard = over(centred, rms(centred))
        numbers["tails" + end] = jnp.log(jnp.maximum(jnp.mean(standard**4), 1.0)), rms(centred) > 0
        numbers["shape" + end] = jnp.mean(jnp.abs(unit)), rms(weights) > 0
    return numbers


def _loss(observation: Observation) -> dict[str, tuple[jax.Array, jax.Array]]:
    exists = observation.mask & jnp.isfinite(observation.losses)
    losses = jnp.where(exists, observation.losses, 0.0)
    older, newer = _halves(exists)
    pairs = exists[1:] & exists[:-1]
    noise = jnp.sqrt(jnp.sum(jnp.where(pairs, jnp.diff(losses) ** 2, 0.0)) / count(pairs))
    now = _mean_of(losses, newer)
    first = jnp.where(jnp.isfinite(observation.first_loss), observation.first_loss, 0.0)
    return {
        "loss_level": (_log_ratio(now, first, -12.0, 4.0), exists.any() & (first > 0) & (now > 0)),
        "loss_slope": (_change(_mean_of(losses, older), now), exists.any()),
        "loss_noise": (_log_ratio(noise, jnp.abs(_mean_of(losses, exists)), -12.0, 4.0), pairs.any()),
    }


def _contribution(observation: Observation) -> tuple[jax.Array, jax.Array]:
    known = jnp.isfinite(observation.contribution) & (observation.first_loss > 0)  # false if that is NaN
    share = jnp.where(known, observation.contribution, 0.0) / jnp.where(known, observation.first_loss, 1.0)
    return jnp.sign(share) * jnp.log1p(_STEEPNESS * jnp.abs(share)), known


def _halves(exists: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The older and the newer half of what exists; of an odd number neither has the middle, of one both have it."""
    half = jnp.maximum(jnp.sum(exists) // 2, 1)
    return exists & (jnp.cumsum(exists) <= half), exists & (jnp.cumsum(exists[::-1])[::-1] <= half)


def _mean_of(values: jax.Array, chosen: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(chosen, values, 0.0)) / count(chosen)


def _rms_of(rows: jax.Array, chosen: jax.Array) -> jax.Array:
    return rms(jnp.where(chosen[:, None], rows, 0.0)) * jnp.sqrt(len(chosen) / count(chosen))


def _moves(rows: jax.Array) -> jax.Array:
    return jnp.any(rows != 0, axis=-1)


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.clip(jnp.mean(over(a, rms(a)) * over(b, rms(b))), -1.0, 1.0)


def _change(before: jax.Array, after: jax.Array) -> jax.Array:
    """Relative to the sum of magnitudes, so from -1 to 1; zero if both are."""
    return over(after - before, jnp.abs(after) + jnp.abs(before))


def _log_ratio(a: jax.Array, b: jax.Array, least: float, most: float) -> jax.Array:
    """``log(a / b)`` within bounds: the least for ``0 / b``, the most for ``a / 0``, zero for ``0 / 0``."""
    ratio = jnp.log(jnp.where(a > 0, a, 1.0)) - jnp.log(jnp.where(b > 0, b, 1.0))
    ratio = jnp.where(a > 0, jnp.where(b > 0, ratio, most), jnp.where(b > 0, least, 0.0))
    return jnp.clip(ratio, least, most)
