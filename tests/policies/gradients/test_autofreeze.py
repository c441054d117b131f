import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smartfrz_jax import Freezer, Frozen, Layer, Layers, policies
from smartfrz_jax.pytrees import checkpoint

N = 6
NAMES = [f"block{i}" for i in range(N)]
LAYERS = Layers(tuple(Layer(m, (f"{m}/bias", f"{m}/kernel"), (f"{m}/kernel",)) for m in NAMES))
PARAMS = {m: {"bias": jnp.zeros(3), "kernel": jnp.ones((2, 3))} for m in NAMES}


def stream(seed, steps):
    """Gradients whose size and noise differ from layer to layer and fade in the course of the run."""
    rng = np.random.default_rng(seed)
    mean = {p: rng.normal(size=leaf.shape) * rng.lognormal() for p, leaf in flat(PARAMS).items()}
    noise = {p: rng.lognormal(sigma=2) for p in mean}
    fade = {p: rng.uniform(0.85, 1.0) for p in mean}
    return [
        {p: (m * fade[p] ** step + noise[p] * rng.normal(size=m.shape)).astype(np.float32) for p, m in mean.items()}
        for step in range(steps)
    ]


def flat(params):
    return {f"{m}/{key}": leaf for m, layer in params.items() for key, leaf in layer.items()}


def original(gradients, evaluate_every, percentile, n=N):
    """First layer that trains after each step: the algorithm as published, in NumPy float64, one loop after another."""
    start, previous, starts = 0, None, []
    total = {p: np.zeros(g.shape) for p, g in gradients[0].items()}
    for step, grads in enumerate(gradients, start=1):
        for p, g in grads.items():
            if int(p[5 : p.index("/")]) >= start:  # what is frozen has no gradient
                total[p] += g.astype(np.float64)
        if step % evaluate_every == 0:
            current = np.zeros(n)
            for p, g in total.items():
                current[int(p[5 : p.index("/")])] += np.linalg.norm(g.ravel(), 1)
            total = {p: np.zeros(g.shape) for p, g in total.items()}
            if previous is not None:
                eta = [abs(previous[i] - current[i]) / previous[i] if current[i] > 0 else 0.0 for i in range(n)]
                threshold = np.percentile(eta[start:], percentile)
                start = next(i for i in range(start, n) if eta[i] >= threshold)
            previous = current
        starts.append(start)
    return starts


def run(policy, gradients, *, only_active=True):
    state, frozen, decisions, states = policy.init(LAYERS, PARAMS), frozenset(), [], []
    for step, grads in enumerate(gradients, start=1):
        shown = {p: jnp.asarray(g) for p, g in grads.items() if not only_active or LAYERS.owner[p] not in frozen}
        frozen, state = policy.update(state, LAYERS, step=step, params=lambda: PARAMS, grads=shown)
        decisions.append(frozen)
        states.append(state)
    return decisions, states


@pytest.mark.slow
@pytest.mark.parametrize("percentile", [30, 50, 80])
def test_is_the_published_algorithm(percentile):
    depths = set()
    for seed in range(12):
        gradients = stream(seed, 30)
        decisions, _ = run(policies.autofreeze(5, percentile=percentile, keep=()), gradients)
        starts = original(gradients, 5, percentile)
        assert decisions == [frozenset(NAMES[:start]) for start in starts]
        depths.update(starts)
    assert len(depths) >= 3  # the streams do tell the layers apart


@pytest.mark.slow
def test_gradients_of_frozen_layers_do_not_matter():
    gradients = stream(1, 30)
    policy = policies.autofreeze(5, percentile=80)
    assert run(policy, gradients)[0] == run(policy, gradients, only_active=False)[0]


def constant(scales, steps=1):
    """Gradients of all ones, scaled layer by layer."""
    return [
        {p: np.full(leaf.shape, scales[NAMES.index(p[:6])], np.float32) for p, leaf in flat(PARAMS).items()}
    ] * steps


def test_by_hand():
    """Changes of 10, 20, 90, 5, 80 and 70 %: the median is 45 %, and the third layer ends the prefix."""
    gradients = constant([1.0] * N, steps=2) + constant([1.1, 1.2, 1.9, 1.05, 1.8, 1.7], steps=2)
    decisions, states = run(policies.autofreeze(2), gradients)
    assert decisions == [frozenset()] * 3 + [frozenset({"block0", "block1"})]
    np.testing.assert_allclose(states[1].norms, [18.0] * N)  # 9 parameters, 2 steps
    assert states[3].evaluations == 2


def test_kept_layers_are_passed_over_but_count():
    gradients = constant([1.0] * N) + constant([1.9, 1.2, 1.1, 1.8, 1.05, 1.7])
    assert run(policies.autofreeze(1, keep=[]), gradients)[0][-1] == frozenset()
    assert run(policies.autofreeze(1, keep=["block0"]), gradients)[0][-1] == {"block1", "block2"}


def test_gradients_that_cancel_count_as_summed():
    """The norm is of the sum, not the sum of norms: a layer whose gradients cancel has none."""
    gradients = constant([1.0] * N) + constant([-1.0] + [1.0] * (N - 1))
    _, states = run(policies.autofreeze(2), gradients)
    assert states[1].norms[0] == 0
    np.testing.assert_allclose(states[1].norms[1:], 18.0)


def test_no_gradient_counts_as_converged_and_a_new_one_does_not():
    changing = [1.0, 1.2, 1.3, 1.4]
    gradients = constant([0.0, 0.0, *[1.0] * 4]) + constant([0.0, 1e-3, *changing])
    decisions, states = run(policies.autofreeze(1), gradients)
    assert decisions[-1] == {"block0"}  # never had a gradient; block1 has just got one
    assert np.isfinite(states[-1].norms).all()


def test_a_gradient_that_vanishes_counts_as_converged():
    """As in the original code, though the norm has changed by 100 %."""
    gradients = constant([1.0] * N) + constant([0.0, 1.2, 1.3, 1.4, 1.5, 1.6])
    assert run(policies.autofreeze(1, percentile=20), gradients)[0][-1] == {"block0"}


def test_accumulators_of_frozen_layers_are_dropped(tmp_path):
    gradients = constant([1.0] * N) + constant([1.1, 1.2, 1.9, 1.05, 1.8, 1.7], steps=2)
    policy = policies.autofreeze(1)
    decisions, states = run(policy, gradients)
    assert decisions[1] == {"block0", "block1"}
    sizes = {p: jnp.shape(total) for p, total in states[1].accumulated.items()}
    assert sizes == {p: () if p[:6] in decisions[1] else leaf.shape for p, leaf in flat(PARAMS).items()}
    checkpoint.write(tmp_path / "state", {"policy": states[1]}, "policy", {})
    like = checkpoint.with_dropped(tmp_path / "state", policy.init(LAYERS, PARAMS), "policy", prefix="['policy']")
    saved = checkpoint.read(tmp_path / "state", {"policy": like}, "policy")["policy"]
    jax.tree.map(np.testing.assert_array_equal, saved, states[1])


@pytest.mark.slow
def test_accumulates_low_precision_gradients_in_float32():
    gradients = [{p: g.astype(jnp.bfloat16) for p, g in constant([0.01] * N)[0].items()}] * 1000
    _, states = run(policies.autofreeze(1000), gradients)
    exact = 9 * 1000 * float(jnp.bfloat16(0.01))
    np.testing.assert_allclose(states[-1].norms, exact, rtol=1e-4)  # bfloat16 sums stop growing at 2 to 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluate_every": 0}, "evaluate_every: got 0, expected an integer of at least 1"),
        ({"evaluate_every": 2.5}, "evaluate_every: got 2.5, expected an integer"),
        ({"evaluate_every": 5, "percentile": 101}, "percentile: got 101, expected a number from 0 to 100"),
        ({"evaluate_every": 5, "percentile": float("nan")}, "percentile: got nan"),
    ],
)
def test_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        policies.autofreeze(**options)


def test_says_which_gradient_is_missing():
    policy = policies.autofreeze(5)
    grads = {p: g for p, g in constant([1.0] * N)[0].items() if p != "block3/bias"}
    with pytest.raises(ValueError, match="grads: 'block3/bias' of an active layer is missing"):
        policy.update(policy.init(LAYERS, PARAMS), LAYERS, step=1, params=lambda: PARAMS, grads=grads)


def test_layers_that_something_else_has_frozen_have_no_gradients_and_do_not_count():
    """Changes of 10, -, 20, 90, 5, 80 %: the median is 20 %, at which the third layer ends the prefix."""
    gradients = constant([1.0] * N) + constant([1.1, 9.0, 1.2, 1.9, 1.05, 1.8])
    without = [{p: g for p, g in grads.items() if not p.startswith("block1")} for grads in gradients]
    decisions, states = run(policies.autofreeze(1), without)
    assert decisions == [{"block1"}, {"block0", "block1"}]
    assert states[1].accumulated["block1/kernel"].shape == ()
    later = {p: g for p, g in gradients[1].items() if not p.startswith(("block0", "block1"))}
    more = [gradients[0], later]
    assert run(policies.autofreeze(1, percentile=30), more)[0][-1] == {"block0", "block1"}


def test_no_gradients_at_all_are_an_error():
    policy = policies.autofreeze(5)
    state = policy.init(LAYERS, PARAMS)
    for grads in ({}, PARAMS):  # the latter by layer, not by parameter
        with pytest.raises(ValueError, match=f"grads: none of the {len(grads)} gradients is of an active layer; pass"):
            policy.update(state, LAYERS, step=1, params=lambda: PARAMS, grads=grads)


@pytest.mark.slow
def test_imaginary_parts_count():
    """Sums of gradients times 1j have the norms, and decide, as those without."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.complex64), PARAMS)
    expected, _ = run(policies.autofreeze(2, keep=()), stream(3, 8))
    policy = policies.autofreeze(2, keep=())
    state = policy.init(LAYERS, params)
    for step, (grads, names) in enumerate(zip(stream(3, 8), expected, strict=True), start=1):
        grads = {p: jnp.asarray(1j * g) for p, g in grads.items()}
        frozen, state = policy.update(state, LAYERS, step=step, params=lambda: params, grads=grads)
        assert frozen == names
    assert expected[-1]
    assert {total.dtype.name for total in state.accumulated.values() if total.ndim} == {"complex64"}


def test_goes_on_if_only_what_it_has_frozen_trains_again_by_hand():
    freezer = Freezer(policies.autofreeze(1), LAYERS, flat(PARAMS))
    for scales in ([1.0] * N, [1.1, 1.2, 1.9, 1.05, 1.8, 1.7]):
        freezer.observe(lambda: PARAMS, grads=constant(scales)[0])
    assert freezer.frozen.names == {"block0", "block1"}
    freezer.unfreeze_layers(["block0"])
    rest = frozenset(NAMES) - {"block0"}
    freezer.adopt(Frozen(LAYERS, rest))
    for _ in range(3):
        freezer.observe(lambda: PARAMS, grads={p: g for p, g in constant([1.0] * N)[0].items() if p[:6] == "block0"})
        assert freezer.frozen.names == rest
