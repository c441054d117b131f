"""Layers' outputs of which CKA is known in closed form."""

import jax.numpy as jnp
import numpy as np

from smartfrz_jax import Layer, Layers

NAMES = ("a", "b", "c", "d")
LAYERS = Layers(tuple(Layer(name, (name,), (name,)) for name in NAMES))
PARAMS = {name: jnp.ones((2, 2)) for name in NAMES}
rng = np.random.default_rng(0)
# Columns are orthogonal and centred.
BASIS = np.linalg.qr(np.concatenate([np.ones((12, 1)), rng.normal(size=(12, 4))], axis=1))[0][:, 1:]
REFERENCE = {name: jnp.asarray(BASIS[:, :1], jnp.float32) for name in NAMES}


def features(cka):
    """One feature per layer, at an angle to the reference's such that their linear CKA is cos^2 = ``cka``."""
    return {
        name: jnp.asarray(np.sqrt(c) * BASIS[:, :1] + np.sqrt(1 - c) * BASIS[:, 1:2], jnp.float32)
        for name, c in zip(NAMES, cka, strict=True)
    }


def run(policy, curve, every=1):
    """The frozen layers after each step, the last state, and the steps at which outputs were computed."""
    state, decisions, calls = policy.init(LAYERS, PARAMS), [], []
    for step in range(1, len(curve) * every + 1):

        def compute(step=step):
            calls.append(step)
            return features(curve[step // every - 1])

        names, state = policy.update(state, LAYERS, step=step, params=lambda: PARAMS, features=compute)
        decisions.append("".join(sorted(names)))
    return decisions, state, calls
