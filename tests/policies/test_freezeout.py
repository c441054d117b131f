import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smartfrz_jax import Frozen, Layer, Layers, migrate_opt_state, policies
from smartfrz_jax.freezing import transform


def network(n):
    """n layers, each a kernel and a bias; their gradients are whatever the test makes them."""
    names = [f"layer{i:02d}" for i in range(n)]
    layers = Layers(tuple(Layer(m, (f"{m}/bias", f"{m}/kernel"), (f"{m}/kernel",)) for m in names))
    params = {m: {"bias": jnp.zeros(3), "kernel": jnp.ones((2, 3))} for m in names}
    return layers, params


def first_frozen_step(policy, layers, params, last):
    state = policy.init(layers, params)
    first = {}
    for step in range(1, last + 1):
        names, state = policy.update(state, layers, step=step, params=lambda: params)
        for name in names:
            first.setdefault(name, step)
    return [first.get(name) for name in layers.names]


def test_linear_spacing_by_hand():
    steps = first_frozen_step(policies.freezeout(total_steps=100, t0=0.5), *network(6), last=110)
    assert steps == [50, 60, 70, 80, 90, None]


def test_cubic_spacing_by_hand():
    # (0.5, 0.6, 0.7, 0.8, 0.9)^3 = 0.125, 0.216, 0.343, 0.512, 0.729
    steps = first_frozen_step(policies.freezeout(total_steps=1000, t0=0.5, spacing="cubic"), *network(6), last=1000)
    assert steps == [125, 216, 343, 512, 729, None]


def test_between_steps_waits_for_the_next_one():
    assert first_frozen_step(policies.freezeout(total_steps=7, t0=0.5), *network(3), last=7) == [
        4,
        6,
        None,
    ]  # 3.5 and 5.25


def test_without_head_to_keep_the_last_layer_trains_to_the_end():
    assert first_frozen_step(policies.freezeout(total_steps=10, t0=0.5, keep=()), *network(3), last=12) == [5, 8, 10]
    assert first_frozen_step(policies.freezeout(total_steps=10, t0=0.5, keep=()), *network(1), last=12) == [10]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "total_steps: got 0, expected an integer of at least 1"),
        ({"total_steps": 10.5}, "total_steps: got 10.5, expected an integer"),
        ({"total_steps": 10, "t0": 0.0}, "t0: got 0.0, expected a share above 0 up to 1"),
        ({"total_steps": 10, "t0": 1.1}, "t0: got 1.1"),
        ({"total_steps": 10, "spacing": "square"}, "spacing: got 'square', expected 'linear' or 'cubic'"),
    ],
)
def test_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        policies.freezeout(**options)
    with pytest.raises(ValueError, match=message):
        policies.freezeout_schedules(network(2)[0], learning_rate=0.1, **options)


def test_refuses_a_learning_rate_of_zero():
    with pytest.raises(ValueError, match="learning_rate: got 0"):
        policies.freezeout_schedules(network(2)[0], learning_rate=0, total_steps=10)


def rates(n, steps, *, t0, spacing, scale_rate, learning_rate):
    """Eq. 6 in float64: learning rate of every layer at every count, shape (steps + 1, n)."""
    t = np.array([t0 + (1 - t0) * i / (n - 1) for i in range(n)]) ** (3 if spacing == "cubic" else 1)
    alpha = learning_rate / t if scale_rate else np.full(n, learning_rate)
    count = np.arange(steps + 1)[:, None]
    cosine = 0.5 * alpha * (1 + np.cos(np.pi * count / (t * steps)))
    return np.where(count < t * steps - 1e-9, cosine, 0.0)


@pytest.mark.parametrize("spacing", ["linear", "cubic"])
@pytest.mark.parametrize("scale_rate", [False, True])
def test_schedules_are_eq_6(spacing, scale_rate):
    layers, _ = network(5)
    options = {"t0": 0.6, "spacing": spacing, "scale_rate": scale_rate, "learning_rate": 0.3}
    schedules = policies.freezeout_schedules(layers, total_steps=50, **options)
    got = np.array([[float(schedules[name](jnp.int32(count))) for name in layers.names] for count in range(51)])
    np.testing.assert_allclose(got, rates(5, 50, **options), rtol=2e-6, atol=2e-7)
    assert (got[:, 0] == 0).sum() >= 20  # exactly zero from t_0 on


def test_schedule_is_zero_just_when_the_policy_freezes():
    layers, params = network(7)
    for spacing in ("linear", "cubic"):
        schedules = policies.freezeout_schedules(layers, learning_rate=0.1, total_steps=70, t0=0.7, spacing=spacing)
        moments = first_frozen_step(
            policies.freezeout(total_steps=70, t0=0.7, spacing=spacing), layers, params, last=70
        )
        for name, moment in zip(layers.names[:-1], moments[:-1], strict=True):
            assert float(schedules[name](moment)) == 0.0
            assert float(schedules[name](moment - 1)) > 0.0


def test_kept_layers_anneal_to_the_end():
    layers, params = network(3)
    keep = layers.names[0]
    schedules = policies.freezeout_schedules(layers, learning_rate=0.1, total_steps=10, keep=keep)
    assert float(schedules[keep](9)) > 0
    assert first_frozen_step(policies.freezeout(total_steps=10, keep=keep), layers, params, last=10) == [None, 8, 10]


@pytest.mark.slow
@pytest.mark.parametrize("scale_rate", [False, True])
def test_optimizer_inside_freeze_is_momentum_sgd_in_numpy(scale_rate):
    """The whole of FreezeOut: the policy freezes, the state moves on, each layer has its own cosine."""
    n, steps = 4, 20
    layers, params = network(n)
    options = {"t0": 0.4, "spacing": "linear", "scale_rate": scale_rate, "learning_rate": 0.2}
    schedules = policies.freezeout_schedules(layers, total_steps=steps, **options)
    tx = optax.chain(optax.trace(0.9), policies.scale_by_layer_schedule(layers, schedules))
    policy = policies.freezeout(total_steps=steps, t0=0.4)
    rng = np.random.default_rng(0)
    grads = {
        name: {key: rng.normal(size=(steps, *leaf.shape)) for key, leaf in layer.items()}
        for name, layer in params.items()
    }

    expected = {
        name: {key: np.asarray(leaf, np.float64) for key, leaf in layer.items()} for name, layer in params.items()
    }
    rate = rates(n, steps, **options)
    for i, name in enumerate(layers.names):
        for key in expected[name]:
            trace = 0.0
            for step in range(steps):
                trace = grads[name][key][step] + 0.9 * trace
                expected[name][key] = expected[name][key] - rate[step, i] * trace

    @functools.partial(jax.jit, static_argnums=3)
    def step_fn(params, grads, opt_state, frozen):
        updates, opt_state = transform.freeze(tx, frozen).update(grads, opt_state, params)
        return transform.apply_updates(params, updates, frozen), opt_state

    frozen, state = Frozen(layers), policy.init(layers, params)
    opt_state = transform.freeze(tx, frozen).init(params)
    programs = set()
    for step in range(1, steps + 1):
        now = jax.tree.map(lambda g, step=step: jnp.asarray(g[step - 1], jnp.float32), grads)
        programs.add(frozen)
        params, opt_state = step_fn(params, now, opt_state, frozen)
        names, state = policy.update(state, layers, step=step, params=lambda params=params: params)
        if names != frozen.names:
            frozen = Frozen(layers, names)
            opt_state = migrate_opt_state(opt_state, tx, params, frozen)
    assert frozen.active == (layers.head,)
    assert len(programs) == n
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, expected)


def test_scale_keeps_dtypes_and_counts():
    layers, params = network(2)
    params["layer00"]["kernel"] = params["layer00"]["kernel"].astype(jnp.bfloat16)
    tx = policies.scale_by_layer_schedule(layers, {name: optax.constant_schedule(0.5) for name in layers.names})
    updates, state = tx.update(params, tx.init(params))
    assert jax.tree.map(lambda x: x.dtype, updates) == jax.tree.map(lambda x: x.dtype, params)
    assert updates["layer00"]["kernel"].tolist() == [[-0.5] * 3] * 2
    assert int(state.count) == 1


def test_scale_refuses_what_does_not_fit():
    layers, params = network(2)
    schedules = policies.freezeout_schedules(layers, learning_rate=0.1, total_steps=10)
    with pytest.raises(ValueError, match="schedules: no layer is called 'extra'"):
        policies.scale_by_layer_schedule(layers, schedules | {"extra": schedules["layer00"]})
    with pytest.raises(ValueError, match="schedules: got none for layer 'layer01'"):
        policies.scale_by_layer_schedule(layers, {"layer00": schedules["layer00"]})
    tx = policies.scale_by_layer_schedule(layers, schedules)
    stranger = params | {"stranger": jnp.ones(2)}
    with pytest.raises(ValueError, match="updates: 'stranger' belongs to no layer"):
        tx.update(stranger, tx.init(stranger))
