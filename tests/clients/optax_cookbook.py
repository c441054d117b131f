"""Patterns of optax's cookbook over bare pytrees, and LoRA by hand, at toy size: one function makes one run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

import smartfrz_jax as sfj
from smartfrz_jax.freezing.migrate import unfrozen_opt_state
from tests.clients.doors import BareRun, Freezing

_RNG = np.random.default_rng(0)
X, Y = (jnp.asarray(_RNG.standard_normal(shape), jnp.float32) for shape in ((8, 6), (8, 3)))
NAMES = ("first", "second", "head")


def normal(*shape):
    return jnp.asarray(0.4 * _RNG.standard_normal(shape), jnp.float32)


def make_params():
    widths = dict(zip(NAMES, ((6, 8), (8, 8), (8, 3)), strict=True))
    return {name: {"kernel": normal(*width), "bias": normal(width[1])} for name, width in widths.items()}


def forward(params, x):
    for name in NAMES[:-1]:
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def loss_fn(params, x, y):
    return jnp.square(forward(params, x) - y).mean()


PARAMS = make_params()
FROZEN = ("first",)


def begin(door, tx, make_step, params=PARAMS, batch=(X, Y), frozen=FROZEN, held=(), run=BareRun):
    """A run with some layers held from the start, by the frozen set if the door has one."""
    start = None
    if isinstance(door, Freezing):
        layers = sfj.find_layers(params, forward if params is PARAMS else adapted, X)
        start = sfj.Frozen(layers, frozenset(name for name in layers.names if name.startswith(held or "none")))
    params = jax.tree.map(jnp.copy, params)  # a step may overwrite them
    opt_state = jax.tree.map(jnp.copy, door.bare(tx, start).tx.init(params))
    return run(make_step, tx, (params, opt_state), batch, start, frozen)


def plain(door, tx, gradients, more=lambda loss: {}):
    """A step that takes gradients in one way or another."""

    def make_step(frozen):
        bare = door.bare(tx, frozen)

        def step(params, opt_state, x, y):
            loss, grads = gradients(bare.value_and_grad, params, x, y)
            updates, opt_state = bare.tx.update(grads, opt_state, params, **more(loss))
            return bare.apply_updates(params, updates), opt_state, loss

        return step

    return begin(door, tx, make_step)


def adversarial_training(door):
    """A gradient with respect to the inputs, then one with respect to the parameters at the inputs it leads to."""

    def gradients(value_and_grad, params, x, y):
        worse = x + 0.1 * jnp.sign(jax.grad(loss_fn, argnums=1)(params, x, y))
        return value_and_grad(lambda params: 0.5 * (loss_fn(params, x, y) + loss_fn(params, worse, y)))(params)

    return plain(door, optax.adam(1e-2), gradients)


def meta_learning(door):
    """The loss after one step of gradient descent, differentiated through it."""

    def after_a_step(params, x, y):
        slopes = jax.grad(loss_fn)(params, x[:4], y[:4])
        adapted = jax.tree.map(lambda param, slope: param - 0.1 * slope, params, slopes)
        return loss_fn(adapted, x[4:], y[4:])

    def gradients(value_and_grad, params, x, y):
        return value_and_grad(after_a_step)(params, x, y)

    return plain(door, optax.adam(1e-2), gradients)


def private(door):
    """Gradients of every example, clipped one by one; noise."""

    def gradients(value_and_grad, params, x, y):
        losses, grads = jax.vmap(value_and_grad(loss_fn), in_axes=(None, 0, 0))(params, x[:, None], y[:, None])
        return losses.mean(), grads

    aggregate = optax.contrib.differentially_private_aggregate(1.0, 0.1, key=jax.random.key(0))
    return plain(door, optax.chain(aggregate, optax.sgd(0.1)), gradients)


def plateau(door):
    """The optimizer gets the loss."""
    tx = optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=1, cooldown=0, rtol=0.5))

    def gradients(value_and_grad, params, x, y):
        return value_and_grad(loss_fn)(params, x, y)

    return plain(door, tx, gradients, lambda loss: {"value": loss})


def accumulation(door):
    """One update every two steps."""

    def gradients(value_and_grad, params, x, y):
        return value_and_grad(loss_fn)(params, x, y)

    return plain(door, optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2), gradients)


def line_search(door):
    """L-BFGS, which takes value and gradient from what its line search computed last.

    With a frozen set, the function that it searches along has the frozen parameters stopped, and what reads the state
    is given the optimizer's own.
    """
    tx = optax.lbfgs(memory_size=2)

    def make_step(frozen):
        bare = door.bare(tx, frozen)

        def step(params, opt_state, x, y):
            def loss_of(params):
                return loss_fn(params if frozen is None else frozen.stop_gradient(params), x, y)

            own = opt_state if frozen is None else unfrozen_opt_state(opt_state, tx, params, frozen.layers)
            loss, grads = optax.value_and_grad_from_state(loss_of)(params, state=own)
            updates, opt_state = bare.tx.update(grads, opt_state, params, value=loss, grad=grads, value_fn=loss_of)
            return bare.apply_updates(params, updates), opt_state, loss

        return step

    return begin(door, tx, make_step)


@dataclasses.dataclass
class LookaheadRun(BareRun):
    """Its parameters are two sets; the frozen set is of the fast one's optimizer, inside of ``optax.lookahead``."""

    def freeze(self):
        params, opt_state = self.carry
        fast = self.carry = params.fast, opt_state.fast_state
        names = super().freeze()
        # Where fast and slow weights are the same, the optimizer does not move either.
        slow = {**params.slow, **{name: jax.tree.map(jnp.copy, fast[0][name]) for name in self.frozen}}
        self.carry = optax.LookaheadParams(params.fast, slow), opt_state._replace(fast_state=self.carry[1])
        return tuple(
            {name.replace("params/", f"params/{part}/") for part in ("fast", "slow") for name in some} for some in names
        )


def lookahead(door):
    """Fast and slow weights; every other step both meet."""
    fast = optax.adam(1e-2)

    def make_step(frozen):
        bare = door.bare(fast, frozen)
        tx = optax.lookahead(bare.tx, sync_period=2, slow_step_size=0.5)

        def step(params, opt_state, x, y):
            loss, grads = bare.value_and_grad(loss_fn)(params.fast, x, y)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.LookaheadParams(*map(bare.apply_updates, params, updates)), opt_state, loss

        return step

    run = begin(door, fast, make_step, run=LookaheadRun)
    params = optax.LookaheadParams(run.carry[0], jax.tree.map(jnp.copy, PARAMS))
    tx = optax.lookahead(door.bare(fast, run.start).tx, sync_period=2, slow_step_size=0.5)
    run.carry = params, tx.init(params)
    return run


LORA = {
    "base": PARAMS,
    "lora": {
        name: {"a": normal(PARAMS[name]["kernel"].shape[0], 2), "b": normal(2, PARAMS[name]["kernel"].shape[1])}
        for name in NAMES
    },
}


def adapted(params, x):
    """The network with the product of two small matrices added to each kernel."""
    base, lora = params["base"], params["lora"]
    kernels = {name: base[name]["kernel"] + lora[name]["a"] @ lora[name]["b"] for name in NAMES}
    return forward({name: {"kernel": kernels[name], "bias": base[name]["bias"]} for name in NAMES}, x)


def lora(door):
    """The base is held: by hand with Flax's door, by the frozen set with ours."""
    by_hand = not isinstance(door, Freezing)
    adam = optax.adam(1e-2)
    held = optax.multi_transform({"lora": adam, "base": optax.set_to_zero()}, {"base": "base", "lora": "lora"})
    tx = held if by_hand else adam

    def make_step(frozen):
        bare = door.bare(tx, frozen)

        def loss_of(params, x, y):
            base = jax.lax.stop_gradient(params["base"]) if by_hand else params["base"]
            return jnp.square(adapted({**params, "base": base}, x) - y).mean()

        def step(params, opt_state, x, y):
            loss, grads = bare.value_and_grad(loss_of)(params, x, y)
            updates, opt_state = bare.tx.update(grads, opt_state, params)
            return bare.apply_updates(params, updates), opt_state, loss

        return step

    return begin(door, tx, make_step, LORA, frozen=("lora/first", "lora/second"), held="base")


EXAMPLES = (adversarial_training, meta_learning, private, plateau, accumulation, line_search, lookahead, lora)
