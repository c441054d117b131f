"""Every policy, on a small network that really trains."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smartfrz_jax import Predictor, find_layers, policies
from smartfrz_jax.predictor import PredictorConfig

STEPS = 24
WIDTHS = (4, 8, 8, 6, 8, 6, 3)


def forward(params, x):
    return outputs(params, x)["dense5"]


def outputs(params, x):
    values = {}
    for i in range(len(WIDTHS) - 1):
        x = x @ params[f"dense{i}"]["kernel"] + params[f"dense{i}"]["bias"][None]
        values[f"dense{i}"] = x
        x = jnp.tanh(x)
    return values


@jax.jit
def train_step(params, active, x, y):
    """SGD; every gradient is computed, those of frozen layers do not count."""
    loss, grads = jax.value_and_grad(lambda p: jnp.mean(jnp.square(forward(p, x) - y)))(params)
    params = jax.tree.map(lambda p, g, a: p - 0.1 * g * a, params, grads, active)
    return params, grads, loss


@jax.jit
def loss_gradient(params):
    return jax.grad(lambda p: jnp.mean(jnp.square(forward(p, X) - Y)))(params)


rng = np.random.default_rng(0)
PARAMS = {
    f"dense{i}": {
        "kernel": jnp.asarray(rng.normal(size=(a, b)) / a**0.5, jnp.float32),
        "bias": jnp.zeros(b, jnp.float32),
    }
    for i, (a, b) in enumerate(itertools.pairwise(WIDTHS))
}
X = jnp.asarray(rng.normal(size=(16, WIDTHS[0])), jnp.float32)
Y = jnp.asarray(rng.normal(size=(16, WIDTHS[-1])), jnp.float32)
LAYERS = find_layers(PARAMS, forward, X)


@functools.cache
def eager_predictor():
    """Always confident that a layer can be frozen."""
    predictor = Predictor(PredictorConfig(size=16, hidden=8, features=4, head_hidden=4), rngs=nnx.Rngs(0))
    last = predictor.classifier.layers[2]
    last.bias[...] = jnp.array([0.0, 100.0])
    return predictor


def every(n):
    return set(range(n, STEPS + 1, n))


class Case(NamedTuple):
    make: callable  # keep -> Policy
    decides_at: set  # steps at which the frozen set may change
    returns: bool = False  # whether frozen layers train again in the conformance suite's run
    may_return: bool = False  # whether they may in others


CASES = {
    "never": Case(lambda keep=None: policies.never(), set()),
    "auto": Case(
        lambda keep=None: policies.auto(total_steps=STEPS, caution=0.95, keep=keep),
        {1, 9, 11, 15, 19, 24},
        returns=True,
    ),
    "freezeout": Case(
        lambda keep=None: policies.freezeout(total_steps=STEPS, t0=0.5, keep=keep), {12, 15, 17, 20, 22, 24}
    ),
    "freezeout_cubic": Case(
        lambda keep=None: policies.freezeout(total_steps=STEPS, t0=0.5, spacing="cubic", keep=keep),
        {3, 6, 9, 13, 18, 24},
    ),
    "autofreeze": Case(lambda keep=None: policies.autofreeze(4, keep=keep), every(4)),
    "similarity_guided": Case(
        lambda keep=None: policies.similarity_guided(outputs(PARAMS, X), 3, window=2, tolerance=0.1, keep=keep),
        every(3),
    ),
    "simfreeze": Case(
        lambda keep=None: policies.simfreeze(outputs(PARAMS, X), 3, window=2, tolerance=0.002, keep=keep),
        every(3),
        may_return=True,
    ),
    "smartfrz": Case(
        lambda keep=None: policies.smartfrz(
            eager_predictor(),
            total_steps=STEPS,
            schedule=policies.Schedule(record_every=2, evaluate_every=5, window=4),
            keep=keep,
        ),
        every(5),
    ),
    "smartfrz_paper": Case(
        lambda keep=None: policies.smartfrz(
            eager_predictor(), schedule=policies.Schedule(record_every=3, window=2, patience=1), order="any", keep=keep
        ),
        every(15),
    ),
    "progress": Case(
        lambda keep=None: policies.progress(total_steps=STEPS, coefficients=(-5.0, 10.0, -5.0), caution=0.4, keep=keep),
        {12, 14, 16, 19, 21, 24},
    ),
    "static_prefix": Case(
        lambda keep=None: policies.static_prefix([(0.25, 0.4), (0.5, 1.0)], total_steps=STEPS, keep=keep), {6, 12}
    ),
    "static_prefix_at_first": Case(
        lambda keep=None: policies.static_prefix([(0.0, 0.6), (0.25, 0.0), (0.5, 0.4)], total_steps=STEPS, keep=keep),
        {1, 6, 12},
        returns=True,
    ),
    "grades": Case(
        lambda keep=None: policies.grades(0.4, total_steps=STEPS, grace=0.25, evaluate_every=3, keep=keep), every(3)
    ),
    "relative_gradient_norm": Case(
        lambda keep=None: policies.relative_gradient_norm(0.6, 4, batches=2, keep=keep), every(4), returns=True
    ),
    "lisa": Case(lambda keep=None: policies.lisa(2, switch_every=4, keep=keep), {1} | every(4), returns=True),
    "lisa_few_sets": Case(
        lambda keep=None: policies.lisa(2, switch_every=4, max_sets=3, keep=keep), {1} | every(4), returns=True
    ),
    "badam": Case(lambda keep=None: policies.badam(5, keep=keep), {1} | every(5), returns=True),
    "hift": Case(lambda keep=None: policies.hift(2, switch_every=3, keep=keep), {1} | every(3), returns=True),
    "slimfit": Case(lambda keep=None: policies.slimfit(0.5, switch_every=4, keep=keep), {1} | every(4), returns=True),
    "random": Case(lambda keep=None: policies.random(0.4, total_steps=STEPS, keep=keep), set(range(STEPS + 1))),
}
every_policy = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
freezing_policy = pytest.mark.parametrize(
    "case", [c for n, c in CASES.items() if n != "never"], ids=[n for n in CASES if n != "never"]
)
