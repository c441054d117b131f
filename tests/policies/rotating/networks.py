"""Layers as of a small language model: embedding, blocks of two layers each, last norm, head."""

import jax.numpy as jnp

from smartfrz_jax import Layer, Layers

BLOCKS = 5
NAMES = (
    "embed",
    *(f"blocks/{number}/{part}" for number in range(BLOCKS) for part in ("attention", "mlp")),
    "norm",
    "head",
)
LAYERS = Layers(tuple(Layer(name, (f"{name}/kernel",), (f"{name}/kernel",)) for name in NAMES))
PARAMS = {f"{name}/kernel": jnp.ones(2) for name in NAMES}


def trained(policy, steps):
    """The blocks, by number, and the other layers, by name, that train after each of some steps."""
    state, sets = policy.init(LAYERS, PARAMS), []
    for step in steps:
        frozen, state = policy.update(state, LAYERS, step=step, params=lambda: PARAMS)
        active = set(NAMES) - frozen
        blocks = {int(name.split("/")[1]) for name in active if name.startswith("blocks")}
        assert {name for name in active if name.startswith("blocks")} == {
            f"blocks/{number}/{part}" for number in blocks for part in ("attention", "mlp")
        }
        sets.append((blocks, {name for name in active if not name.startswith("blocks")}))
    return sets
