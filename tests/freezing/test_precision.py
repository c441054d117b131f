"""Freezing with computation in bfloat16, accumulated gradients, and blocks that are computed twice to save memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax import Frozen
from smartfrz_jax.cost.measured import program_cost
from smartfrz_jax.pytrees import paths

pytestmark = [pytest.mark.usefixtures("jax_defaults"), pytest.mark.slow]

WIDTH, BATCH, BLOCKS = 32, 256, 3
UNIT = 2 * BATCH * WIDTH * WIDTH  # FLOPs of one layer's forward pass
X = jax.random.normal(jax.random.key(0), (BATCH, WIDTH))
Y = jax.random.normal(jax.random.key(1), (BATCH, WIDTH))
INNER = tuple(f"blocks/{i}/{linear}" for i in range(BLOCKS) for linear in ("inner", "outer"))
NAMES = (*INNER, "head")
MOMENTUM = optax.sgd(0.1, momentum=0.9)


class Block(nnx.Module):
    def __init__(self, dtype, rngs):
        self.inner = nnx.Linear(WIDTH, WIDTH, use_bias=False, dtype=dtype, rngs=rngs)
        self.outer = nnx.Linear(WIDTH, WIDTH, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return x + self.outer(jnp.tanh(self.inner(x)))


class Net(nnx.Module):
    def __init__(self, rngs, dtype=jnp.float32, remat=False):
        self.blocks = nnx.List([Block(dtype, rngs) for _ in range(BLOCKS)])
        self.head = nnx.Linear(WIDTH, WIDTH, use_bias=False, dtype=dtype, rngs=rngs)
        self.call = nnx.remat(Block.__call__) if remat else Block.__call__

    def __call__(self, x):
        for block in self.blocks:
            x = self.call(block, x)
        return self.head(x)


def make(tx=MOMENTUM, frozen=(), **kwargs):
    model = Net(nnx.Rngs(0), **kwargs)
    optimizer = sfj.nnx.Optimizer(model, tx, layers=sfj.nnx.find_layers(model, X))
    optimizer.freeze(model, list(frozen))
    return model, optimizer


def loss_fn(model, x, y):
    return jnp.square(model(x).astype(jnp.float32) - y).mean()


def step(model, optimizer, x, y):
    loss, grads = optimizer.value_and_grad(loss_fn)(model, x, y)
    optimizer.update(model, grads)
    return loss


train_step = nnx.jit(step)


def arrays(module):
    return {name: np.array(leaf) for name, leaf in paths.flatten(nnx.as_pure(nnx.state(module))).items()}


def expected_units(frozen) -> int:
    """Forward; weight gradients of active layers; activation gradients of all behind the first active one."""
    active = [i for i, name in enumerate(NAMES) if name not in frozen]
    return len(NAMES) + len(active) + (len(NAMES) - 1 - active[0] if active else 0)


FROZEN_SETS = (NAMES[:2], NAMES[:4], NAMES[2:4], NAMES[:6])


def test_layers_are_in_forward_order():
    assert make()[1].frozen.layers.names == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_flops_fall_by_the_work_for_frozen_layers_in_either_precision(dtype):
    for frozen in ((), *FROZEN_SETS):
        flops = program_cost(train_step, *make(frozen=frozen, dtype=dtype), X, Y).flops / UNIT
        # Beside the matrix products: tanh, sums, the update, and for bfloat16 the casts, each of which XLA counts.
        assert expected_units(frozen) <= flops <= 1.09 * expected_units(frozen)


@pytest.mark.parametrize("frozen", FROZEN_SETS[1:3], ids=["prefix", "middle"])
def test_float32_parameters_stay_and_train_when_computation_is_in_bfloat16(frozen):
    model, optimizer = make(optax.adamw(1e-3, weight_decay=0.1), frozen, dtype=jnp.bfloat16)
    before = arrays(model)
    losses = [float(train_step(model, optimizer, X, Y)) for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    for name, leaf in arrays(model).items():
        assert leaf.dtype == np.float32
        assert np.array_equal(leaf, before[name]) == (name.rpartition("/")[0] in frozen), name
    moments = {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(optimizer)) if leaf.ndim}
    assert moments == {"float32"}


def test_gradients_of_active_layers_in_bfloat16_are_those_without_freezing():
    model, optimizer = make(dtype=jnp.bfloat16)
    _, everything = optimizer.value_and_grad(loss_fn)(model, X, Y)
    optimizer.freeze(model, list(NAMES[:4]))
    _, grads = optimizer.value_and_grad(loss_fn)(model, X, Y)
    everything = paths.flatten(nnx.as_pure(everything))
    for name, grad in paths.flatten(nnx.as_pure(grads)).items():
        frozen = name.rpartition("/")[0] in NAMES[:4]
        np.testing.assert_array_equal(grad, jnp.zeros_like(grad) if frozen else everything[name], err_msg=name)


def gradients(model, x, y):
    return {name: np.asarray(leaf) for name, leaf in paths.flatten(nnx.as_pure(nnx.grad(loss_fn)(model, x, y))).items()}


@pytest.mark.slow
def test_multi_steps_keeps_what_it_has_accumulated_for_active_layers_when_others_freeze_half_way():
    """By hand: the two micro-batches' mean gradient, for layers that are active at the second."""
    half = BATCH // 2
    model, optimizer = make(optax.MultiSteps(MOMENTUM, every_k_schedule=2))
    before = arrays(model)
    first, second = (gradients(model, X[part], Y[part]) for part in (slice(half), slice(half, None)))
    train_step(model, optimizer, X[:half], Y[:half])
    accumulated = {name: leaf for name, leaf in arrays(optimizer).items() if "acc_grads" in name and np.any(leaf)}
    assert len(accumulated) == len(NAMES)
    optimizer.freeze(model, list(NAMES[:4]))
    after = arrays(optimizer)
    assert [name for name in after if "acc_grads" in name] == [
        name for name in accumulated if name.split("acc_grads/")[1].rpartition("/")[0] in NAMES[4:]
    ]
    assert all(np.array_equal(after[name], leaf) for name, leaf in accumulated.items() if name in after)
    train_step(model, optimizer, X[half:], Y[half:])
    for name, leaf in arrays(model).items():
        if name.rpartition("/")[0] in NAMES[:4]:
            np.testing.assert_array_equal(leaf, before[name], err_msg=name)
        else:
            expected = before[name] - 0.1 * (first[name] + second[name]) / 2
            np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-6, err_msg=name)
    for frozen in FROZEN_SETS[1:3]:
        flops = program_cost(train_step, *make(optax.MultiSteps(MOMENTUM, 2), frozen), X, Y).flops / UNIT
        assert expected_units(frozen) <= flops <= 1.08 * expected_units(frozen)


MICRO = 4


def accumulate(model, optimizer, x, y):
    """A step over micro-batches, in a loop that XLA sees as such."""
    graphdef, state = nnx.split(model)

    def micro_step(total, batch):
        loss, grads = optimizer.value_and_grad(loss_fn)(nnx.merge(graphdef, state, copy=True), *batch)
        return jax.tree.map(jnp.add, total, grads), loss

    zeros = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
    total, losses = jax.lax.scan(micro_step, zeros, (x.reshape(MICRO, -1, WIDTH), y.reshape(MICRO, -1, WIDTH)))
    optimizer.update(model, jax.tree.map(lambda grad: grad / MICRO, total))
    return losses.mean()


@pytest.mark.slow
def test_gradients_accumulated_by_a_scan():
    jitted = nnx.jit(accumulate)
    costs = {}
    for frozen in ((), *FROZEN_SETS):
        model, optimizer = make(frozen=frozen)
        before = arrays(model)
        flops = program_cost(jitted, model, optimizer, X, Y).flops * MICRO / UNIT
        costs[frozen] = flops
        jitted(model, optimizer, X, Y)
        # The whole batch at once gives the same mean.
        reference, reference_optimizer = make(frozen=frozen)
        train_step(reference, reference_optimizer, X, Y)
        expected = arrays(reference)
        for name, leaf in arrays(model).items():
            assert np.array_equal(leaf, before[name]) == (name.rpartition("/")[0] in frozen), name
            np.testing.assert_allclose(leaf, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
        # One turn of the loop, which is what XLA counts; and updates once, which count four times here.
        assert expected_units(frozen) <= flops <= 1.12 * expected_units(frozen)
    assert sorted(costs, key=costs.get) == sorted(costs, key=expected_units)


def test_no_sum_is_carried_for_frozen_layers():
    """Neither memory nor additions: XLA finds that the accumulated zeros are zeros."""
    carried = {}
    for frozen in ((), NAMES[:4]):
        text = nnx.jit(accumulate).lower(*make(frozen=frozen), X, Y).compile().compiled.as_text()
        (loop,) = re.findall(r" = \((.*?)\) while\(", text)
        carried[frozen] = loop.count(f"f32[{WIDTH},{WIDTH}]")
    assert carried[()] - carried[NAMES[:4]] == 4


@pytest.mark.slow
def test_accumulation_in_a_bare_pytree():
    params = {name: {"kernel": jnp.eye(WIDTH) * 0.5} for name in "abcd"}

    def apply_fn(params, x):
        for name in "abcd":
            x = jnp.tanh(x @ params[name]["kernel"])
        return x

    def step(state, x, y):
        def micro_step(total, batch):
            x, y = batch
            loss, grads = state.value_and_grad(lambda params: jnp.square(apply_fn(params, x) - y).mean())(state.params)
            return jax.tree.map(jnp.add, total, grads), loss

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        total, losses = jax.lax.scan(micro_step, zeros, (x.reshape(MICRO, -1, WIDTH), y.reshape(MICRO, -1, WIDTH)))
        return state.apply_gradients(grads=jax.tree.map(lambda grad: grad / MICRO, total)), losses.mean()

    layers = sfj.find_layers(params, apply_fn, X)
    state = sfj.linen.TrainState.create(apply_fn=apply_fn, params=params, tx=MOMENTUM, layers=layers)
    flops = []
    for frozen in ("", "ab", "abcd"):
        state = state.freeze(Frozen(layers, frozenset(frozen)))
        flops.append(program_cost(jax.jit(step), state, X, Y).flops * MICRO / UNIT)
        after, _ = jax.jit(step)(state, X, Y)
        for name in "abcd":
            unchanged = np.array_equal(after.params[name]["kernel"], state.params[name]["kernel"])
            assert unchanged == (name in frozen)
    np.testing.assert_allclose(flops, [4 + 4 + 3, 4 + 2 + 1, 4], rtol=0.12)


def products(jitted, *args) -> int:
    """Matrix products that XLA is asked for; on CPUs it finds by itself which of them are computed twice."""
    return jitted.lower(*args).lowered.as_text().count("stablehlo.dot_general")


@pytest.mark.slow
def test_blocks_that_are_recomputed_have_the_same_gradients_and_frozen_ones_are_not_recomputed():
    for blocks in range(BLOCKS + 1):
        frozen = NAMES[: 2 * blocks]
        plain, remat = make(frozen=frozen), make(frozen=frozen, remat=True)
        # Of each live block the inner layer, for the derivative of tanh.
        assert products(train_step, *remat, X, Y) - products(train_step, *plain, X, Y) == BLOCKS - blocks
        assert products(train_step, *plain, X, Y) == expected_units(frozen)
        for _ in range(2):
            train_step(*plain, X, Y)
            train_step(*remat, X, Y)
        expected = arrays(plain[0])
        for name, leaf in arrays(remat[0]).items():
            np.testing.assert_allclose(leaf, expected[name], rtol=1e-6, atol=1e-7, err_msg=name)
    flops = [program_cost(train_step, *make(frozen=names, remat=True), X, Y).flops for names in (NAMES[:2], NAMES[:4])]
    assert flops[1] < flops[0]


def test_a_frozen_block_behind_a_live_one_is_recomputed_for_its_activation_gradient():
    plain, remat = make(frozen=NAMES[2:4]), make(frozen=NAMES[2:4], remat=True)
    assert products(train_step, *remat, X, Y) - products(train_step, *plain, X, Y) == BLOCKS


def test_one_checkpoint_over_frozen_and_live_layers_computes_the_frozen_ones_twice():
    """What it keeps is its inputs alone. The cure is a checkpoint for each block, as above."""

    @nnx.jit
    def whole(model, optimizer, x, y):
        loss, grads = optimizer.value_and_grad(nnx.remat(loss_fn))(model, x, y)
        optimizer.update(model, grads)
        return loss

    for frozen in (NAMES[:2], NAMES[:4], NAMES[:6]):
        plain, remat = make(frozen=frozen), make(frozen=frozen)
        assert products(whole, *remat, X, Y) - products(train_step, *plain, X, Y) == len(NAMES)


GRADIENT_POLICIES = {
    "autofreeze": lambda: sfj.policies.autofreeze(3, keep=()),
    "grades": lambda: sfj.policies.grades(1e3, total_steps=9, grace=0.3, evaluate_every=3),
    "relative_gradient_norm": lambda: sfj.policies.relative_gradient_norm(0.9, 3, batches=2),
}
PRECISIONS = {"higher": (jnp.bfloat16, jnp.float32), "lower": (jnp.float32, jnp.bfloat16)}


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("make_policy", GRADIENT_POLICIES.values(), ids=GRADIENT_POLICIES)
@pytest.mark.parametrize("door", ["nnx", "linen"])
def test_runs_with_gradients_of_another_precision_than_their_parameters_go_on(door, make_policy, dtypes, tmp_path):
    dtype, of_grads = dtypes
    params = {name: {"kernel": jnp.eye(4, dtype=dtype)} for name in "abc"}
    x = jnp.ones((2, 4), dtype)

    def grads(like, step):
        rng = np.random.default_rng(step)
        return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), of_grads), like)

    def nnx_run():
        model = nnx.Sequential(
            *(nnx.Linear(4, 4, use_bias=False, param_dtype=dtype, rngs=nnx.Rngs(n)) for n in range(3))
        )
        optimizer = sfj.nnx.Optimizer(model, MOMENTUM, layers=sfj.nnx.find_layers(model, x))
        freezer = sfj.nnx.Freezer(model, optimizer, make_policy())

        def advance(steps):
            for step in steps:
                optimizer.update(model, grads(nnx.state(model, nnx.Param), step))
                freezer.step()
            return arrays(model) | arrays(optimizer)

        return freezer, advance, freezer.save, freezer.restore

    def linen_run():
        layers = sfj.find_layers(params, lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"] @ p["c"]["kernel"], x)
        options = {"apply_fn": None, "params": params, "tx": MOMENTUM, "layers": layers, "keep_grads": True}
        states = [sfj.linen.TrainState.create(**options)]
        freezer = sfj.linen.Freezer(states[0], make_policy())

        def advance(steps):
            for step in steps:
                states.append(freezer.step(states[-1].apply_gradients(grads=grads(params, step))))
            return {jax.tree_util.keystr(at): leaf for at, leaf in jax.tree_util.tree_leaves_with_path(states[-1])}

        return (
            freezer,
            advance,
            lambda path: freezer.save(path, states[-1]),
            lambda path: states.append(freezer.restore(path, states[0])),
        )

    make_run = {"nnx": nnx_run, "linen": linen_run}[door]
    freezer, advance, save, _ = make_run()
    advance(range(1, 6))  # copies of the gradients are kept for step 6
    save(tmp_path / "run")
    again, go_on, _, restore = make_run()
    restore(tmp_path / "run")
    expected, now = advance(range(6, 10)), go_on(range(6, 10))
    assert freezer.events == again.events
    assert freezer.events
    assert now.keys() == expected.keys()
    for name, leaf in expected.items():
        assert now[name].dtype == leaf.dtype
        np.testing.assert_array_equal(now[name], leaf, err_msg=name)
