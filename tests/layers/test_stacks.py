"""Blocks whose stacked weights a loop reads row by row are one layer: what is frozen is frozen in all of them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax import linen
from smartfrz_jax.cost.check import Measured, check_saving, jaxpr_of
from smartfrz_jax.layers.stacks import name_of

pytestmark = pytest.mark.usefixtures("jax_defaults")

DEPTH, WIDTH = 3, 8
X = jnp.ones((16, WIDTH))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm(name="norm")(x)
        return x + nn.Dense(WIDTH, name="down")(nn.relu(nn.Dense(2 * WIDTH, name="up")(y))), None


class LinenNet(nn.Module):
    remat: bool = False
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(WIDTH, name="stem")(x)
        block = nn.scan(
            nn.remat(LinenBlock) if self.remat else LinenBlock,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=DEPTH,
        )
        x, _ = block(name="blocks")(x, None)
        return nn.Dense(3, name="head")(nn.LayerNorm(name="final")(x))


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs), nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)
        self.norm, self.drop = nnx.BatchNorm(WIDTH, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.down(self.drop(nnx.relu(self.up(self.norm(x)))))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.stem, self.head = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Linear(WIDTH, 3, rngs=rngs)
        self.blocks = nnx.split_rngs(splits=DEPTH)(nnx.vmap(NNXBlock))(rngs)

    def __call__(self, x):
        run = nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(lambda block, x: block(x))
        return self.head(run(self.blocks, self.stem(x)))


SHAPES = {"stem": (WIDTH, WIDTH), "up": (DEPTH, WIDTH, 16), "down": (DEPTH, 16, WIDTH), "head": (WIDTH, 3)}
PARAMS = {name: jax.random.normal(jax.random.key(0), shape) for name, shape in SHAPES.items()}


def block(x, up, down):
    return x + jnp.tanh(x @ up) @ down


def by_scan(params, x):
    rows = params["up"].astype(jnp.bfloat16).astype(jnp.float32), params["down"]
    x, _ = jax.lax.scan(lambda x, row: (block(x, *row), None), x @ params["stem"], rows)
    return x @ params["head"]


def by_index(params, x):
    x, _ = jax.lax.scan(
        lambda x, i: (block(x, params["up"][i], params["down"][i]), None), x @ params["stem"], jnp.arange(DEPTH)
    )
    return x @ params["head"]


def by_for_loop(params, x):
    x = jax.lax.fori_loop(0, DEPTH, lambda i, x: block(x, params["up"][i], params["down"][i]), x @ params["stem"])
    return x @ params["head"]


def by_stack(params, x):
    """Each parameter is one row: these are layers of their own."""
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.stack([params["stem"], params["b"], params["c"]]))
    return x @ params["head"]


def test_linen():
    for net in (LinenNet(), LinenNet(remat=True), LinenNet(axis=1)):
        variables = jax.eval_shape(net.init, jax.random.key(0), X)
        layers = linen.find_layers(net, variables, X)
        assert layers.names == ("stem", "blocks", "head")
        assert {name for name in layers[1].params if name.startswith("blocks")} == {
            f"blocks/{name}" for name in ("norm/scale", "norm/bias", "up/kernel", "up/bias", "down/kernel", "down/bias")
        }
        assert layers[1].kernels == ("blocks/up/kernel", "blocks/down/kernel")
        assert linen.find_layers(net, variables, X, granularity="block") == layers
    assert sfj.Frozen(layers, frozenset(layers.names[:1])).params == {"stem/kernel", "stem/bias"}


@pytest.mark.slow
def test_nnx():
    model = NNXNet(nnx.Rngs(0))
    layers = sfj.nnx.find_layers(model, X)
    assert layers.names == ("stem", "blocks", "head")
    assert set(layers[1].state) == {
        "blocks/norm/mean",
        "blocks/norm/var",
        "blocks/drop/rngs/count",
        "blocks/drop/rngs/key",
    }
    assert len(layers[1].params) == 6


@pytest.mark.parametrize("forward", [by_scan, by_index, by_for_loop, jax.jit(by_scan), jax.checkpoint(by_scan)])
def test_bare_pytrees(forward):
    assert sfj.find_layers(PARAMS, forward, X).names == ("stem", "up+down", "head")


def test_rows_that_are_stacked_in_the_step_are_layers_of_their_own():
    params = {"stem": PARAMS["stem"], "b": PARAMS["stem"], "c": PARAMS["stem"], "head": PARAMS["head"]}
    assert sfj.find_layers(params, by_stack, X).names == ("stem", "b", "c", "head")


def test_an_embedding_that_a_recurrence_looks_up_is_no_part_of_its_weights():
    params = {"table": jnp.ones((5, WIDTH)), "positions": jnp.ones((4, WIDTH)), "w": jnp.ones((WIDTH, WIDTH))}

    def forward(params, tokens):
        def step(x, inputs):
            token, position = inputs
            return jnp.tanh((x + params["table"][token] + position) @ params["w"]), None

        return jax.lax.scan(step, jnp.zeros(WIDTH), (tokens, params["positions"]))[0]

    assert set(sfj.find_layers(params, forward, jnp.arange(4)).names) == {"table", "positions", "w"}


def test_names():
    assert name_of(["net/blocks/a/w", "net/blocks/b/w"], ["net/head/w"]) == "net/blocks"
    assert name_of(["net/a/w", "net/b/w"], ["net/head/w"]) == "net/a+net/b"
    assert name_of(["net/a/w", "net/a/v/w"], ["net/a/x"]) == "net/a/w+net/a/v"
    assert name_of(["a", "b"], []) == "a+b"


def linen_loss():
    net = LinenNet()
    params = jax.eval_shape(net.init, jax.random.key(0), X)["params"]
    return (lambda params, x: jnp.square(net.apply({"params": params}, x)).mean()), params


LOSSES = {
    "linen": linen_loss,
    "scan": lambda: ((lambda params, x: jnp.square(by_scan(params, x)).mean()), PARAMS),
    "index": lambda: ((lambda params, x: jnp.square(by_index(params, x)).mean()), PARAMS),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOSSES)
def test_freezing_saves_what_is_predicted_without_a_warning(kind):
    """Freezing the stem saves nothing of the scan behind it, which goes on computing its input's gradient."""
    loss, params = LOSSES[kind]()
    layers = sfj.find_layers(params, loss, X)
    account = sfj.account(params, layers, loss, X, tx=optax.sgd(0.1))

    @functools.cache
    def measured(n):
        frozen = sfj.Frozen(layers, frozenset(layers.names[:n]))
        tx = sfj.freeze(optax.sgd(0.1), frozen)

        def step(params, opt_state, x):
            value, grads = sfj.value_and_grad(loss, frozen)(params, x)
            updates, opt_state = tx.update(grads, opt_state, params)
            return value, sfj.apply_updates(params, updates, frozen), opt_state

        args = params, jax.eval_shape(tx.init, params), X
        jitted = jax.jit(step)
        return Measured(frozen, sfj.program_cost(jitted, *args), jaxpr_of(jitted.trace(*args)))

    for n in range(1, 4):
        assert check_saving(account, measured(0), measured(n), notable=0.02) is None, n
    # By the equations themselves, those of scans as often as they run.
    by_equations = [sum_of(measured(n).jaxpr) for n in range(4)]
    predicted = [account.flops(measured(n).frozen).total for n in range(4)]
    assert predicted == pytest.approx(by_equations, rel=0.05)


def sum_of(closed):
    from smartfrz_jax.cost.step_program import StepProgram

    return StepProgram(closed, "cpu").cost()


@pytest.mark.slow
def test_a_scan_that_is_wholly_active_is_not_said_to_run_frozen_blocks():
    """Of blocks that are stacked in the step, the account takes each for itself, the first with nothing before it."""
    params = {name: jnp.ones((WIDTH, WIDTH)) for name in ("stem", "b", "c")}

    def loss(params, x):
        stacked = jnp.stack([params["b"], params["c"]])
        return jnp.square(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x @ params["stem"], stacked)[0]).mean()

    layers = sfj.find_layers(params, loss, X)

    def measured(*names):
        frozen = sfj.Frozen(layers, frozenset(names))
        jitted = jax.jit(sfj.value_and_grad(loss, frozen))
        return Measured(frozen, sfj.program_cost(jitted, params, X), jaxpr_of(jitted.trace(params, X)))

    account = sfj.account(params, layers, loss, X)
    assert account.scans == [{"b", "c"}]
    finding = check_saving(account, measured(), measured("stem"))
    assert finding is not None
    assert finding.cause == "scan"
    assert finding.layers == ("stem",)
    assert "blocks that train run in one scan" in finding.message
    finding = check_saving(account, measured(), measured("stem", "b"))
    assert finding is not None
    assert "frozen and active blocks are stacked" in finding.message
