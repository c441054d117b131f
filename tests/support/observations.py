"""Observations for tests, with everything unknown that is not said."""

import jax
import numpy as np

from smartfrz_jax.predictor.observation import Observation


def observation_of(records, mask=None, **known) -> Observation:
    """Of one layer from ``records`` of shape ``(window, size)``, or of several with leading axes."""
    records = np.asarray(records, np.float32)
    batch = records.shape[:-2]
    fields = {
        "mask": np.ones(records.shape[:-1], bool) if mask is None else np.asarray(mask),
        "start": np.zeros((*batch, records.shape[-1])),
        "elapsed": np.full(batch, 1000.0),
        "losses": np.full(records.shape[:-1], np.nan),
        "first_loss": np.full(batch, np.nan),
        "progress": np.full(batch, np.nan),
        "depth": np.full(batch, 0.5),
        "contribution": np.full(batch, np.nan),
    } | known
    fields = {name: np.asarray(value, None if name == "mask" else np.float32) for name, value in fields.items()}
    return jax.tree.map(jax.numpy.asarray, Observation(records=records, **fields))


def walk(seed, window=9, size=12, batch=(), drift=0.3) -> Observation:
    """Layers on a random walk with drift from a start, everything known, the last step of the window the latest."""
    rng = np.random.default_rng(seed)
    start = rng.standard_normal((*batch, size))
    steps = 0.1 * (rng.standard_normal((*batch, window, size)) + drift)
    return observation_of(
        start[..., None, :] + np.cumsum(steps, axis=-2),
        start=start,
        elapsed=np.full(batch, window),
        losses=np.sort(rng.uniform(0.5, 2, (*batch, window)))[..., ::-1],
        first_loss=np.full(batch, 2.1),
        progress=rng.uniform(0.1, 0.9, batch),
        depth=rng.uniform(0, 1, batch),
        contribution=rng.normal(0, 0.1, batch),
    )
