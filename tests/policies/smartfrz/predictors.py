"""Predictors whose decisions are known, and runs of the policy with them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from smartfrz_jax import Layer, Layers, Predictor, policies
from smartfrz_jax.predictor import PredictorConfig

NAMES = ("a", "b", "c", "d")
LAYERS = Layers(tuple(Layer(name, (name,), (name,)) for name in NAMES))
SIZE = 8
CONFIG = PredictorConfig(size=SIZE, hidden=4, features=4, head_hidden=4)
START = {name: jnp.ones((4, 4)) for name in NAMES}


def smartfrz(predictor, **options):
    """The policy, of options that are not grouped."""
    fields = [field.name for field in dataclasses.fields(policies.Schedule) if field.name in options]
    schedule = policies.Schedule(**{name: options.pop(name) for name in fields})
    return policies.smartfrz(predictor, schedule=schedule, **options)


class StillnessPredictor(Predictor):
    """Confident if the records differ little from the newest: simple enough to say by hand what it must answer.

    ``bound`` stands in a parameter, so that it goes through ``nnx.jit`` as weights do.
    """

    traces = 0

    def __init__(self, bound=0.5, config=CONFIG):
        super().__init__(config, rngs=nnx.Rngs(0))
        self.bound = nnx.Param(jnp.float32(bound))

    def __call__(self, observation):
        type(self).traces += 1
        records, mask = observation.records, observation.mask
        moved = jnp.max(jnp.where(mask[:, None], jnp.abs(records - records[-1:]), 0.0))
        return 100 * jnp.stack([moved, self.bound[...]])  # so large that it is sure, on either side


class WeightPredictor(Predictor):
    """The newest weight of a layer says how ready it is: it is the logit."""

    def __init__(self):
        super().__init__(CONFIG, rngs=nnx.Rngs(0))

    def __call__(self, observation):
        return jnp.stack([jnp.float32(0), observation.records[-1, 0]])


def params_at(step, speeds):
    return {name: jnp.full((4, 4), step * speed, jnp.float32) for name, speed in zip(NAMES, speeds, strict=True)}


def run(policy, steps, speeds=(0.0, 0.0, 0.0, 0.0)):
    """``speeds``: how far a layer's weights move per step; a function of the step, or four numbers."""
    state, decisions, states = policy.init(LAYERS, START), [], []
    position = np.zeros(4)
    for step in range(1, steps + 1):
        position += speeds(step) if callable(speeds) else speeds
        names, state = policy.update(
            state, LAYERS, step=step, params=lambda position=position: params_at(1, position), loss=np.float32(1 / step)
        )
        decisions.append("".join(sorted(names)))
        states.append(state)
    return decisions, states
