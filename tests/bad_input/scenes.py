"""Good arguments: small networks, layers, recordings and predictors, made once."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

import smartfrz_jax as sfj

X = np.ones((4, 2), np.float32)
TX = optax.sgd(0.1, momentum=0.9)


def forward(params: Any, x: Any) -> Any:
    return x @ params["a"]["kernel"] @ params["b"]["kernel"] @ params["c"]["kernel"]


def loss(params: Any, x: Any) -> Any:
    return (forward(params, x) ** 2).mean()


@functools.cache
def params() -> dict[str, Any]:
    return {name: {"kernel": np.full((2, 2), 0.5, np.float32)} for name in "abc"}


def of_another_network() -> dict[str, Any]:
    return {name: {"kernel": np.full((2, 2), 0.5, np.float32)} for name in "xyz"}


@functools.cache
def layers() -> sfj.Layers:
    return sfj.find_layers(params(), forward, X)


def other_layers() -> sfj.Layers:
    return sfj.Layers(tuple(sfj.Layer(name, (f"{name}/kernel",), (f"{name}/kernel",)) for name in "xyz"))


def frozen(*names: str) -> sfj.Frozen:
    return sfj.Frozen(layers(), frozenset(names))


def outputs(examples: int = 4) -> dict[str, np.ndarray]:
    return {name: np.eye(examples, 3, dtype=np.float32) for name in "abc"}


@functools.cache
def predictor() -> sfj.Predictor:
    config = sfj.predictor.PredictorConfig(size=4, hidden=2, features=2, head_hidden=2)
    return sfj.Predictor(config, rngs=nnx.Rngs(0))


def update(policy: sfj.Policy, **signals: Any) -> Any:
    """A policy's state, and its update."""
    given = {"step": 1, "params": params, "frozen": frozenset[str]()} | signals
    return policy.update(policy.init(layers(), params()), layers(), **given)


def recording(**changed: Any) -> sfj.learning.Recording:
    fields: dict[str, Any] = {
        "layers": ("a", "b"),
        "steps": np.arange(1, 9),
        "record_every": 1,
        "total_steps": 8,
        "weights": np.ones((8, 2, 4), np.float32),
        "start": np.zeros((2, 4), np.float32),
        "losses": np.ones(8, np.float32),
        "first_loss": 1.0,
        "cka": np.ones((8, 2), np.float32),
    }
    return sfj.learning.Recording(**fields | changed)


@functools.cache
def examples() -> sfj.learning.Examples:
    return sfj.learning.make_examples([recording()], window=2, min_records=2)


@functools.cache
def tailoring() -> sfj.predictor.Tailoring:
    return sfj.predictor.Tailoring.create(layers(), params(), size=4)


def observation() -> sfj.predictor.Observation:
    return examples().batch(np.arange(2))[0]


def freezer(**options: Any) -> sfj.Freezer:
    return sfj.Freezer(sfj.policies.never(), layers(), params(), **options)


@functools.cache
def account() -> sfj.Account:
    return sfj.account(params(), layers(), loss, X)


@functools.cache
def module() -> nnx.Module:
    return nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Linear(2, 2, rngs=nnx.Rngs(1)))


def nnx_loss(model: Any, x: Any) -> Any:
    return (model(x) ** 2).mean()


@functools.cache
def nnx_layers() -> sfj.Layers:
    return sfj.nnx.find_layers(module(), X)


def optimizer(**options: Any) -> sfj.nnx.Optimizer:
    return sfj.nnx.Optimizer(module(), TX, **{"layers": nnx_layers()} | options)


def block() -> nnx.Module:
    return nnx.Linear(2, 2, rngs=nnx.Rngs(0))


def another_model() -> nnx.Module:
    return nnx.Linear(2, 3, rngs=nnx.Rngs(0))


def nnx_freezer(policy: sfj.Policy | None = None) -> sfj.nnx.Freezer:
    return sfj.nnx.Freezer(module(), optimizer(), policy or sfj.policies.never())


def dense() -> nn.Module:
    return nn.Dense(2)


@functools.cache
def variables() -> Any:
    return jax.device_get(dense().init(jax.random.key(0), jnp.asarray(X)))


@functools.cache
def linen_layers() -> sfj.Layers:
    return sfj.linen.find_layers(dense(), variables(), X)


def train_state(**options: Any) -> sfj.linen.TrainState:
    fields = {"apply_fn": forward, "params": params(), "tx": TX, "layers": layers()}
    return sfj.linen.TrainState.create(**fields | options)


def linen_freezer() -> sfj.linen.Freezer:
    return sfj.linen.Freezer(train_state(), sfj.policies.never())
