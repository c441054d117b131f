"""Networks whose layers freeze and return."""

import jax.numpy as jnp
import optax
from flax import nnx

import smartfrz_jax as sfj
from tests.freezing.mlp import LAYERS, PARAMS, X, mlp, mlp_params

GRADS = [mlp_params() for _ in range(12)]
OPTIMIZERS = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam in bfloat16": optax.adam(0.1, mu_dtype=jnp.bfloat16),
    "MultiSteps": optax.MultiSteps(optax.sgd(0.1, momentum=0.9), every_k_schedule=2),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=0.1, weight_decay=0.1),
}


def make(tx, returning="kept"):
    return sfj.linen.TrainState.create(apply_fn=mlp, params=PARAMS, tx=tx, layers=LAYERS, returning=returning)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.middle = nnx.Linear(4, 4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.middle(nnx.relu(self.norm(self.stem(x))))))


TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.05))


def make_nnx(tx=TX, returning="kept"):
    model = Net(nnx.Rngs(0))
    layers = sfj.nnx.find_layers(model, X)
    return model, sfj.nnx.Optimizer(model, tx, wrt=nnx.Param, layers=layers, returning=returning)
