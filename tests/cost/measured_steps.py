"""A small network, and the cost of steps that train it."""

import functools

import jax
import jax.numpy as jnp
import optax

import smartfrz_jax as sfj
from smartfrz_jax.cost.check import Measured, check_saving, jaxpr_of

WIDTHS = dict(zip("abcd", [(24, 32), (32, 32), (32, 40), (40, 10)], strict=True))
PARAMS = {name: {"kernel": jnp.ones(sizes) / sizes[0], "bias": jnp.zeros(sizes[1])} for name, sizes in WIDTHS.items()}
X, Y = jnp.ones((64, 24)), jnp.zeros(64, jnp.int32)
ADAM = optax.adam(1e-3)
QUICKLY = {"xla_backend_optimization_level": "0"}


def loss_fn(params, x, y):
    for name in "abc":
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"][None])
    logits = x @ params["d"]["kernel"] + params["d"]["bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


LAYERS = sfj.find_layers(PARAMS, loss_fn, X, Y)


@functools.cache
def account(tx=ADAM):
    return sfj.account(PARAMS, LAYERS, loss_fn, X, Y, tx=tx)


def frozen_set(names):
    return sfj.Frozen(LAYERS, frozenset(names))


def measured(frozen, step, *args):
    """The compiled step, its jaxpr beside it."""
    jitted = jax.jit(step, compiler_options=QUICKLY)
    return Measured(frozen, sfj.program_cost(jitted, *args), jaxpr_of(jitted.trace(*args)))


def trained(frozen, grads_of=None, tx=None, log=None, returned=None):
    """A step of the bare pytree with its gradients, its optimizer and its further results as they are given."""
    grads_of = grads_of or sfj.value_and_grad(loss_fn, frozen)
    tx = tx or sfj.freeze(ADAM, frozen)

    def step(params, opt_state, x, y, *args):
        loss, grads = grads_of(params, x, y, *args)
        if returned:
            return loss, returned(grads)
        updates, new_state = tx.update(grads, opt_state, params)
        return sfj.apply_updates(params, updates, frozen), new_state, loss, log(grads) if log else None

    return step, jax.eval_shape(tx.init, PARAMS)


def program(names, make=trained, extra=(), **kwargs):
    frozen = frozen_set(names)
    step, opt_state = make(frozen, **kwargs)
    return measured(frozen, step, PARAMS, opt_state, X, Y, *extra)


every_grad = jax.value_and_grad(loss_fn)
# For programs that several tests compare.
shared_program = functools.cache(program)


def unfrozen():
    return shared_program("")


def check(after):
    """What is found, and that the message says what was predicted and measured."""
    finding = check_saving(account(), unfrozen(), after, notable=0.5)
    assert finding is not None
    assert finding.layers == tuple(sorted(after.frozen.names))
    for word in ("Predicted: ", "measured: ", "Cause: ", "Cure: "):
        assert word in finding.message
    return finding
