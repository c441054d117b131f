import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training import train_state
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import smartfrz_jax as sfj
from smartfrz_jax.pytrees import paths

pytestmark = pytest.mark.usefixtures("jax_defaults")


class Block(nn.Module):
    """Flags given in the constructor or with the call; names that sort against the order of use."""

    by_call: bool

    @nn.compact
    def __call__(self, x, train):
        y = nn.Conv(4, (3, 3), use_bias=False, name="z_first")(x)
        if self.by_call:
            y = nn.BatchNorm(name="norm")(y, not train)
            y = nn.Dropout(0.5)(y, deterministic=not train)
        else:
            y = nn.BatchNorm(use_running_average=not train, name="norm")(y)
            y = nn.Dropout(0.5, deterministic=not train)(y)
        y = nn.Conv(4, (3, 3), use_bias=False, name="a_second")(nn.relu(y))
        y = nn.BatchNorm(use_running_average=not train, use_bias=False, use_scale=False, name="plain_norm")(y)
        return x + nn.relu(y)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.relu(nn.Conv(4, (3, 3), name="stem")(x))
        x = Block(by_call=True, name="y_block")(x, train)
        x = Block(by_call=False, name="x_block")(x, train)
        x = x.reshape(x.shape[0], -1, 4)
        x = x + nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, name="attend")(x, deterministic=not train)
        return nn.Dense(3, name="b_head")(x.mean(1))


NAMES = (
    "stem", "y_block/z_first", "y_block/a_second", "x_block/z_first", "x_block/a_second",
    "attend/query", "attend/key", "attend/value", "attend/out", "b_head",
)  # fmt: skip
X = jax.random.normal(jax.random.key(0), (8, 6, 6, 1))
Y = jax.random.normal(jax.random.key(1), (8, 3))
NET = Net()  # one object for all tests, for its apply function is static in the state
TX = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, weight_decay=0.1))


class State(sfj.linen.TrainState):
    batch_stats: Any = None


@functools.cache
def found():
    variables = NET.init(jax.random.key(2), X, train=False)
    return variables, sfj.linen.find_layers(NET, variables, X)


def make(**options):
    variables, layers = found()
    return State.create(
        apply_fn=NET.apply, params=variables["params"], tx=TX, layers=layers, batch_stats=variables["batch_stats"],
        **options,
    )  # fmt: skip


def plain_step(state, x, y, key):
    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        out, updates = state.apply_fn(variables, x, rngs={"dropout": key}, mutable=["batch_stats"])
        return jnp.square(out - y).mean(), updates

    (loss, updates), grads = state.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=updates["batch_stats"]), loss


train_step = jax.jit(plain_step)


def steps(state, n, start=0, freezer=None):
    for step in range(start, start + n):
        state, _ = train_step(state, X, Y, jax.random.key(step))
        if freezer is not None:
            state = freezer.step(state)
    return state


@pytest.mark.slow
def test_layers_are_in_forward_order_whatever_their_names():
    layers = make().frozen.layers
    assert layers.names == NAMES
    assert set(layers[1].params) == {"y_block/z_first/kernel", "y_block/norm/scale", "y_block/norm/bias"}


def test_find_layers_needs_params():
    with pytest.raises(ValueError, match=r"variables: got the keys 'stem'.*expected 'params'"):
        sfj.linen.find_layers(NET, {"stem": {}}, X)


def test_find_layers_takes_flags_by_position():
    variables = NET.init(jax.random.key(0), X, train=False)
    assert [sfj.linen.find_layers(NET, variables, X, train).names for train in (True, False)] == [NAMES, NAMES]


def test_find_layers_passes_random_keys_on():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dropout(0.5, deterministic=False)(nn.Dense(4)(x))
            return nn.Dense(2)(x + jax.random.normal(self.make_rng("noise"), x.shape))

    x, key = jnp.ones((2, 3)), jax.random.key(0)
    variables = jax.eval_shape(Noisy().init, {"params": key, "noise": key, "dropout": key}, x)
    assert sfj.linen.find_layers(Noisy(), variables, x, rngs={"noise": key}).names == ("Dense_0", "Dense_1")


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [NAMES[:2], NAMES[:5], ("y_block/a_second", "x_block/z_first"), NAMES])
def test_frozen_parameters_and_statistics_do_not_change_in_a_single_bit_and_others_do(frozen):
    state = steps(make(), 2).freeze(frozen)
    after = steps(state, 3, start=2)
    held = state.frozen.params
    for name, leaf in paths.flatten(state.params).items():
        assert np.array_equal(leaf, paths.flatten(after.params)[name]) == (name in held), name
    # The normalisation that belongs to a layer, by where it stands in the block.
    conv_of = {"norm": "z_first", "plain_norm": "a_second"}
    for name, leaf in paths.flatten(state.batch_stats).items():
        block, norm, _ = name.split("/")
        frozen_norm = f"{block}/{conv_of[norm]}" in frozen
        assert np.array_equal(leaf, paths.flatten(after.batch_stats)[name]) == frozen_norm, name


@pytest.mark.slow
def test_frozen_dropout_is_off():
    state = make()

    def losses(state):
        return {float(train_step(state, X, Y, jax.random.key(i))[1]) for i in range(3)}

    assert len(losses(state.freeze(NAMES[:5]))) == 3  # the dropout of the attention is still on
    assert len(losses(state.freeze(NAMES[:-1]))) == 1


@pytest.mark.slow
def test_flags_of_modules_are_as_before_outside_of_the_step():
    state = make().freeze(NAMES[:-1])
    with sfj.linen.hold(state.frozen):
        pass
    out = [
        NET.apply({"params": state.params, "batch_stats": state.batch_stats}, X, rngs={"dropout": jax.random.key(i)},
                  mutable=["batch_stats"])[0]
        for i in range(2)
    ]  # fmt: skip
    assert not np.array_equal(*out)


@pytest.mark.slow
def test_one_program_per_frozen_set_and_cost_falls():
    traces = []

    def counted(*args):
        traces.append(1)
        return plain_step(*args)

    programs = sfj.TrainStep(counted)
    state = make()
    for frozen in (NAMES[:3], (), NAMES[:5], NAMES[:3]):
        state = state.freeze(sfj.Frozen(state.frozen.layers, frozenset(frozen)))
        for step in range(2):
            state, _ = programs(state, X, Y, jax.random.key(step))
    assert len(traces) == len(programs.programs) == 3
    flops = {len(program.frozen.names): program.cost.flops for program in programs.programs}
    assert flops[5] < flops[3] < flops[0]


@settings(max_examples=8, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.slow
def test_any_order_of_freezing_saving_and_restoring_is_the_straight_run(tmp_path_factory, data):
    """Property: a run interrupted anywhere, with anything frozen at any time, ends in the same bits."""
    freezes = data.draw(st.dictionaries(st.integers(1, 5), st.sets(st.sampled_from(NAMES[:4]), min_size=1), max_size=2))
    saves = data.draw(st.sets(st.integers(1, 5), min_size=1, max_size=2))

    def run(saves):
        state = make()
        freezer = sfj.linen.Freezer(state, sfj.Policy(lambda layers, params: (), decide))
        for step in range(1, 7):
            state = freezer.step(train_step(state, X, Y, jax.random.key(step))[0])
            if step in saves:
                path = tmp_path_factory.mktemp("run") / "checkpoint"
                freezer.save(path, state)
                state = make()
                freezer = sfj.linen.Freezer(state, sfj.Policy(lambda layers, params: (), decide))
                state = freezer.restore(path, state)
        return state

    def decide(policy_state, layers, *, step, **signals):
        return frozenset().union(*(names for at, names in freezes.items() if at <= step)), policy_state

    straight, interrupted = run(()), run(saves)
    assert jax.tree.structure(straight) == jax.tree.structure(interrupted)
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(straight), jax.tree.leaves(interrupted), strict=True
    ):
        np.testing.assert_array_equal(leaf, other, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_policies_that_look_at_gradients_need_a_state_that_keeps_them():
    with pytest.raises(ValueError, match="keep_grads=True"):
        sfj.linen.Freezer(make(), sfj.autofreeze(evaluate_every=2))
    plain = train_state.TrainState.create(apply_fn=None, params={"a": jnp.ones((2, 2))}, tx=TX)
    with pytest.raises(TypeError, match=r"state: got flax.training.train_state.TrainState"):
        sfj.linen.Freezer(plain, sfj.policies.never())


def test_a_freezer_in_a_compiled_step_is_refused():
    state = make()
    freezer = sfj.linen.Freezer(state, sfj.policies.never())
    with pytest.raises(TypeError, match=r"state: got a tracer, .*outside of jax.jit"):
        jax.jit(freezer.step)(state)
    with pytest.raises(TypeError, match=r"loss: got a tracer, .*outside of jax.jit"):
        jax.jit(lambda loss: freezer.step(state, loss=loss).step)(1.0)
    assert freezer.steps == 0


def test_another_optimizer_in_the_state_is_not_undone_in_silence():
    state = make()
    with pytest.raises(ValueError, match=r"tx: got another one .*TrainState.create\(tx=..., frozen=state.frozen\)"):
        state.replace(tx=optax.sgd(0.0)).freeze(["stem"])
    assert state.replace(step=state.step + 1).freeze(["stem"]).frozen.names == {"stem"}


@pytest.mark.slow
def test_autofreeze_sees_the_gradients_of_the_active_layers():
    state = make(keep_grads=True)
    freezer = sfj.linen.Freezer(state, sfj.autofreeze(evaluate_every=3, percentile=90))
    state = steps(state, 13, freezer=freezer)  # the last freeze is followed by one more step
    assert freezer.events
    assert set(state.grads) == set(state.frozen.active_leaves(state.params))
    assert all(float(jnp.abs(grad).max()) > 0 for name, grad in state.grads.items() if name.endswith("kernel"))


@pytest.mark.slow
def test_a_bare_pytree_trains_and_freezes():
    params = {"z": {"w": jnp.eye(3) * 0.5, "b": jnp.zeros(3)}, "a": {"w": jnp.ones((3, 1))}}

    def apply_fn(params, x):
        return jnp.tanh(x @ params["z"]["w"] + params["z"]["b"]) @ params["a"]["w"]

    x = jax.random.normal(jax.random.key(0), (16, 3))
    layers = sfj.find_layers(params, apply_fn, x)
    state = sfj.linen.TrainState.create(apply_fn=apply_fn, params=params, tx=optax.adam(0.05), layers=layers)
    freezer = sfj.linen.Freezer(state, sfj.static_prefix([(0.0, 0.5)], total_steps=20, keep=()))

    @jax.jit
    def step(state):
        loss, grads = state.value_and_grad(lambda p: jnp.square(state.apply_fn(p, x) - x.sum(1, keepdims=True)).mean())(
            state.params
        )
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(20):
        state, loss = step(state)
        state = freezer.step(state)
        losses.append(float(loss))
    assert state.frozen.names == {"z"}
    assert losses[-1] < losses[0]
    assert int(state.step) == 20
