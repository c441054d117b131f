"""What holds of every policy, on a small network that really trains."""

import functools
import itertools
import json
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smartfrz_jax import Freezer, Frozen, Policy, Predictor, find_layers, policies
from smartfrz_jax.predictor import PredictorConfig
from smartfrz_jax.pytrees import checkpoint

STEPS = 24
WIDTHS = (4, 8, 8, 6, 8, 6, 3)
KIND = "policy"


def forward(params, x):
    return outputs(params, x)["dense5"]


def outputs(params, x):
    values = {}
    for i in range(len(WIDTHS) - 1):
        x = x @ params[f"dense{i}"]["kernel"] + params[f"dense{i}"]["bias"][None]
        values[f"dense{i}"] = x
        x = jnp.tanh(x)
    return values


@jax.jit
def train_step(params, active, x, y):
    """SGD; every gradient is computed, those of frozen layers do not count."""
    loss, grads = jax.value_and_grad(lambda p: jnp.mean(jnp.square(forward(p, x) - y)))(params)
    params = jax.tree.map(lambda p, g, a: p - 0.1 * g * a, params, grads, active)
    return params, grads, loss


@jax.jit
def loss_gradient(params):
    return jax.grad(lambda p: jnp.mean(jnp.square(forward(p, X) - Y)))(params)


rng = np.random.default_rng(0)
PARAMS = {
    f"dense{i}": {
        "kernel": jnp.asarray(rng.normal(size=(a, b)) / a**0.5, jnp.float32),
        "bias": jnp.zeros(b, jnp.float32),
    }
    for i, (a, b) in enumerate(itertools.pairwise(WIDTHS))
}
X = jnp.asarray(rng.normal(size=(16, WIDTHS[0])), jnp.float32)
Y = jnp.asarray(rng.normal(size=(16, WIDTHS[-1])), jnp.float32)
LAYERS = find_layers(PARAMS, forward, X)


@functools.cache
def eager_predictor():
    """Always confident that a layer can be frozen."""
    predictor = Predictor(PredictorConfig(size=16, hidden=8, features=4, head_hidden=4), rngs=nnx.Rngs(0))
    last = predictor.classifier.layers[2]
    last.bias[...] = jnp.array([0.0, 100.0])
    return predictor


def every(n):
    return set(range(n, STEPS + 1, n))


class Case(NamedTuple):
    make: callable  # keep -> Policy
    decides_at: set  # steps at which the frozen set may change
    returns: bool = False  # whether frozen layers may train again


CASES = {
    "never": Case(lambda keep=None: policies.never(), set()),
    "freezeout": Case(
        lambda keep=None: policies.freezeout(total_steps=STEPS, t0=0.5, keep=keep), {12, 15, 17, 20, 22, 24}
    ),
    "freezeout_cubic": Case(
        lambda keep=None: policies.freezeout(total_steps=STEPS, t0=0.5, spacing="cubic", keep=keep),
        {3, 6, 9, 13, 18, 24},
    ),
    "autofreeze": Case(lambda keep=None: policies.autofreeze(4, keep=keep), every(4)),
    "similarity_guided": Case(
        lambda keep=None: policies.similarity_guided(outputs(PARAMS, X), 3, window=2, tolerance=0.1, keep=keep),
        every(3),
    ),
    "smartfrz": Case(
        lambda keep=None: policies.smartfrz(
            eager_predictor(),
            total_steps=STEPS,
            schedule=policies.Schedule(record_every=2, evaluate_every=5, window=4),
            keep=keep,
        ),
        every(5),
    ),
    "smartfrz_paper": Case(
        lambda keep=None: policies.smartfrz(
            eager_predictor(), schedule=policies.Schedule(record_every=3, window=2, patience=1), order="any", keep=keep
        ),
        every(15),
    ),
    "progress": Case(
        lambda keep=None: policies.progress(total_steps=STEPS, coefficients=(-5.0, 10.0, -5.0), caution=0.4, keep=keep),
        {12, 14, 16, 19, 21, 24},
    ),
    "static_prefix": Case(
        lambda keep=None: policies.static_prefix([(0.25, 0.4), (0.5, 1.0)], total_steps=STEPS, keep=keep), {6, 12}
    ),
    "gain": Case(
        lambda keep=None: policies.gain(
            lambda params, number: loss_gradient(params),
            total_steps=STEPS,
            factor=3.0,
            window=2,
            measure_every=4,
            keep=keep,
        ),
        {step + 1 for step in every(4)},
    ),
    "grades": Case(
        lambda keep=None: policies.grades(0.4, total_steps=STEPS, grace=0.25, evaluate_every=3, keep=keep), every(3)
    ),
    "lisa": Case(lambda keep=None: policies.lisa(2, switch_every=4, keep=keep), {1} | every(4), returns=True),
    "lisa_few_sets": Case(
        lambda keep=None: policies.lisa(2, switch_every=4, max_sets=3, keep=keep), {1} | every(4), returns=True
    ),
    "badam": Case(lambda keep=None: policies.badam(5, keep=keep), {1} | every(5), returns=True),
    "hift": Case(lambda keep=None: policies.hift(2, switch_every=3, keep=keep), {1} | every(3), returns=True),
    "slimfit": Case(lambda keep=None: policies.slimfit(0.5, switch_every=4, keep=keep), {1} | every(4), returns=True),
    "random": Case(lambda keep=None: policies.random(0.4, total_steps=STEPS, keep=keep), set(range(STEPS + 1))),
}
every_policy = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
freezing_policy = pytest.mark.parametrize(
    "case", [c for n, c in CASES.items() if n != "never"], ids=[n for n in CASES if n != "never"]
)


class Moment(NamedTuple):
    params: dict
    frozen: Frozen
    state: object


def advance(policy, moment, step):
    """One train step and one update, with the loss and exactly the signals that the policy says it needs."""
    active = jax.tree.map(lambda label: jnp.float32(label == "train"), moment.frozen.labels(PARAMS))
    params, grads, loss = train_step(moment.params, active, X, Y)
    signals = {
        "grads": Frozen(LAYERS, moment.frozen.names).active_leaves(grads),
        "features": lambda: outputs(params, X),
    }
    signals = {name: value for name, value in signals.items() if name in policy.needs} | {"loss": loss}
    names, state = policy.update(moment.state, LAYERS, step=step, params=lambda: params, **signals)
    return Moment(params, Frozen(LAYERS, names), state), signals


def run(policy, first=1, last=STEPS, moment=None):
    moments = [moment or Moment(PARAMS, Frozen(LAYERS), policy.init(LAYERS, PARAMS))]
    for step in range(first, last + 1):
        moments.append(advance(policy, moments[-1], step)[0])
    return moments


@functools.cache
def straight_run(make):
    """A run that several tests compare with, or look at; tuples of what does not change."""
    return tuple(run(make()))


def bits(tree):
    """Structure and leaves, to be compared with ==."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()) for leaf in leaves]


@every_policy
@pytest.mark.slow
def test_is_a_policy_with_known_needs(case):
    policy = case.make()
    assert isinstance(policy, Policy)
    assert policy.needs <= {"grads", "features"}


@every_policy
@pytest.mark.slow
def test_state_is_a_pytree_of_arrays(case):
    for moment in run(case.make(), last=6):
        assert all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(moment.state))


@pytest.mark.slow
@every_policy
def test_deterministic(case):
    for a, b in zip(run(case.make()), straight_run(case.make), strict=True):
        assert a.frozen == b.frozen
        assert bits(a.state) == bits(b.state)


@every_policy
@pytest.mark.slow
def test_pure(case):
    policy = case.make()
    moment = Moment(PARAMS, Frozen(LAYERS), policy.init(LAYERS, PARAMS))
    for step in range(1, STEPS + 1):
        before = bits(moment.state)
        after, signals = advance(policy, moment, step)
        assert bits(moment.state) == before
        again = policy.update(moment.state, LAYERS, step=step, params=lambda after=after: after.params, **signals)
        assert (again[0], bits(again[1])) == (after.frozen.names, bits(after.state))
        moment = after


@every_policy
def test_only_known_names_and_what_is_frozen_stays_so_unless_sets_return(case):
    moments = run(case.make(keep=()))
    returned = False
    for before, after in itertools.pairwise(moments):
        returned |= not before.frozen.names <= after.frozen.names
        assert after.frozen.names <= set(LAYERS.names)
        assert type(after.frozen.names) is frozenset
    assert returned == case.returns


@freezing_policy
def test_something_freezes_but_not_the_head(case):
    frozen = straight_run(case.make)[-1].frozen.names
    assert frozen
    assert LAYERS.head not in frozen


@pytest.mark.slow
@freezing_policy
def test_keeps_what_it_is_told_to_keep(case):
    kept = straight_run(case.make)[-1].frozen.names
    name = min(kept)
    for keep in ([name], name, iter([name]), lambda layer: layer.name == name):
        policy = case.make(keep=keep)
        policy.init(LAYERS, PARAMS)  # an iterator is not used up
        assert name not in run(policy)[-1].frozen.names


@pytest.mark.parametrize(
    "name",
    ["freezeout", "freezeout_cubic", "smartfrz", "smartfrz_paper", "progress", "similarity_guided", "random", "badam"],
)
def test_keep_nothing_lets_the_head_freeze(name):
    policy = policies.random(1.0, total_steps=STEPS, keep=()) if name == "random" else CASES[name].make(keep=())
    assert LAYERS.head in run(policy)[-1].frozen.names


@every_policy
def test_decides_only_when_it_says(case):
    moments = run(case.make(keep=()))
    changes = {step for step in range(1, STEPS + 1) if moments[step].frozen != moments[step - 1].frozen}
    assert changes <= case.decides_at


@freezing_policy
def test_refuses_unknown_layers_in_keep(case):
    with pytest.raises(ValueError, match=r"keep: no layer is called 'dense9'; did you mean 'dense"):
        case.make(keep=["dense9"]).init(LAYERS, PARAMS)


@freezing_policy
def test_selectors_in_keep_are_in_the_options_as_text(case):
    assert json.loads(json.dumps(dict(case.make(keep=re.compile("dense.")).options)))["keep"] == [
        "re.compile('dense.')"
    ]


@every_policy
@pytest.mark.parametrize("at", [7, 19])
def test_survives_a_checkpoint(case, at, tmp_path):
    straight = straight_run(case.make)
    checkpoint.write(tmp_path / "state", {"policy": straight[at].state, "step": np.int32([at])}, KIND, {})

    policy = case.make()
    like = checkpoint.with_dropped(tmp_path / "state", policy.init(LAYERS, PARAMS), KIND, prefix="['policy']")
    saved = checkpoint.read(tmp_path / "state", {"policy": like, "step": np.int32([0])}, KIND)
    assert bits(saved["policy"]) == bits(straight[at].state)

    resumed = run(policy, first=at + 1, moment=straight[at]._replace(state=saved["policy"]))
    for a, b in zip(resumed, straight[at:], strict=True):
        assert a.frozen == b.frozen
        assert bits(a.state) == bits(b.state)


@pytest.mark.slow
@every_policy
def test_resumes_on_another_set_of_devices(case, tmp_path):
    """Restored arrays must not insist on the device they were read onto."""
    at = 11
    straight = straight_run(case.make)
    checkpoint.write(tmp_path / "state", {"policy": straight[at].state, "step": np.int32([at])}, KIND, {})
    policy = case.make()
    everywhere = jax.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P())
    params = jax.device_put(PARAMS, everywhere)
    like = checkpoint.with_dropped(tmp_path / "state", policy.init(LAYERS, params), KIND, prefix="['policy']")
    saved = checkpoint.read(tmp_path / "state", {"policy": like, "step": np.int32([0])}, KIND)

    def reset(moment):
        return moment._replace(params=jax.device_put(moment.params, everywhere), state=saved["policy"])

    resumed = run(policy, first=at + 1, moment=reset(straight[at]))
    assert [m.frozen for m in resumed] == [m.frozen for m in straight[at:]]


@pytest.mark.parametrize("name", ["autofreeze", "similarity_guided", "smartfrz", "progress"])
@pytest.mark.slow
def test_layers_frozen_before_the_run_stay_so_and_others_follow(name):
    before = frozenset({"dense0", "dense3"})
    freezer = Freezer(CASES[name].make(), LAYERS, PARAMS, frozen=Frozen(LAYERS, before))
    params = PARAMS
    for _ in range(STEPS):
        active = jax.tree.map(lambda label: jnp.float32(label == "train"), freezer.frozen.labels(PARAMS))
        params, grads, loss = train_step(params, active, X, Y)
        freezer.observe(
            lambda params=params: params,
            grads=freezer.frozen.active_leaves(grads),
            features=lambda params=params: outputs(params, X),
            loss=loss,
        )
        assert before <= freezer.frozen.names
    assert before < freezer.frozen.names


def test_says_which_signal_is_missing():
    made = {name: case.make() for name, case in CASES.items()}
    needy = {name: policy for name, policy in made.items() if policy.needs}
    assert set(needy) == {"autofreeze", "similarity_guided", "grades"}
    for name, policy in needy.items():
        (signal,) = policy.needs
        state = policy.init(LAYERS, PARAMS)
        with pytest.raises(ValueError, match=f"{signal}: the policy '{name}' needs it and got none; pass "):
            policy.update(state, LAYERS, step=1, params=lambda: PARAMS)


def test_update_refuses_a_network_with_other_layers():
    policy = CASES["freezeout"].make()
    state = policy.init(LAYERS, PARAMS)
    fewer = {name: PARAMS[name] for name in ("dense0", "dense1")}
    layers = find_layers(fewer, lambda p, x: x @ p["dense0"]["kernel"] @ p["dense1"]["kernel"], X)
    with pytest.raises(ValueError, match="layers: got 2, but the policy's state is for 6; "):
        policy.update(state, layers, step=1, params=lambda: fewer)
