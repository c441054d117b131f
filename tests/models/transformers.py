"""Tiny transformers of the tests."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.bert import Bert
from models.deit import DeiT
from models.llama import Llama
from smartfrz_jax.pytrees import paths

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(4, 8, 8, 3)), jnp.float32)
IDS = jnp.asarray(RNG.integers(0, 20, size=(4, 6)), jnp.int32)
MASK = jnp.asarray(np.arange(6)[None] < np.array([6, 4, 3, 1])[:, None], jnp.int32)
# Compiles in half the time; the results are the same.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def tiny_deit(**kwargs):
    settings = {"image_size": 8, "patch_size": 4, "dim": 8, "depth": 2, "heads": 2, "num_classes": 3}
    return DeiT(**{**settings, "rngs": nnx.Rngs(0), **kwargs})


def tiny_bert(**kwargs):
    settings = {"vocab_size": 20, "max_positions": 8, "dim": 8, "depth": 2, "heads": 2, "hidden": 12, "num_classes": 3}
    return Bert(**{**settings, "rngs": nnx.Rngs(0), **kwargs})


def tiny_llama(**kwargs):
    settings = {"vocab_size": 20, "dim": 16, "depth": 2, "heads": 4, "kv_heads": 2, "hidden": 12, "rope_theta": 50.0}
    return Llama(**{**settings, "tied": True, "rngs": nnx.Rngs(0), **kwargs})


def evaluated(model):
    model.eval()
    return model


def lively(make):
    """A network with weights so large that whatever is wrong shows in the output."""
    rng = np.random.default_rng(1)

    def draw(name, leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        values = 0.4 * rng.normal(size=leaf.shape) + name.endswith("scale")
        return jnp.asarray(values if jnp.issubdtype(leaf.dtype, jnp.floating) else np.zeros(leaf.shape), leaf.dtype)

    graphdef, state = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graphdef, paths.tree_map(draw, nnx.as_pure(state)))


@partial(jax.jit, static_argnums=0, compiler_options=QUICKLY)
def run(graphdef, state, *inputs):
    return nnx.merge(graphdef, state)(*inputs)


def call(model, *inputs):
    return run(*nnx.split(model), *inputs)


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for param in eqn.params.values():
            if hasattr(inner := getattr(param, "jaxpr", param), "eqns"):
                yield from equations(inner)


def forward_jaxpr(make, inputs):
    graphdef, state = nnx.split(nnx.eval_shape(make))
    return jax.make_jaxpr(lambda state: nnx.merge(graphdef, state, copy=True)(*inputs))(state).jaxpr
