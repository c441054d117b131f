"""The freezers of both front doors beside what the user does by hand, and what they ask of a policy."""

import importlib

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax import FreezeEvent, Frozen

pytestmark = pytest.mark.usefixtures("jax_defaults")

NAMES = ("a", "b", "c")
X = jnp.ones((1, 2))


class Net(nnx.Module):
    def __init__(self):
        for seed, name in enumerate(NAMES):
            setattr(self, name, nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(seed)))

    def __call__(self, x):
        return self.c(self.b(self.a(x)))


def apply_fn(params, x):
    return x @ params["a"] @ params["b"] @ params["c"]


PARAMS = {name: jnp.eye(2) for name in NAMES}
LAYERS = sfj.find_layers(PARAMS, apply_fn, X)


def decided(at=None) -> sfj.Policy:
    """Freezes what it is told, from the steps on that it is told; counts its calls in a number of Python."""

    def update(state, layers, *, step, **signals):
        names = [names for since, names in (at or {}).items() if step >= since]
        return frozenset(names[-1] if names else ()), {"calls": state["calls"] + 1}

    return sfj.Policy(lambda layers, params: {"calls": 0}, update)


class Linen:
    """A run whose train steps change no weights."""

    def __init__(self, policy, *, before=(), **options):
        self.state = sfj.linen.TrainState.create(apply_fn=apply_fn, params=PARAMS, tx=optax.sgd(0.1), layers=LAYERS)
        self.freeze(before)
        self.freezer = sfj.linen.Freezer(self.state, policy, **options)

    @property
    def frozen(self):
        return self.state.frozen

    def freeze(self, names):
        self.state = self.state.freeze(names)

    def unfreeze(self, names=None):
        self.state = self.freezer.unfreeze(self.state, names)

    def step(self):
        self.state = self.freezer.step(self.state)

    def save(self, path):
        self.freezer.save(path, self.state)

    def restore(self, path):
        self.state = self.freezer.restore(path, self.state)


class OfNnx:
    """The same in NNX."""

    def __init__(self, policy, *, before=(), **options):
        self.model = Net()
        layers = sfj.nnx.find_layers(self.model, X)
        self.optimizer = sfj.nnx.Optimizer(self.model, optax.sgd(0.1), layers=layers)
        self.freeze(before)
        self.freezer = sfj.nnx.Freezer(self.model, self.optimizer, policy, **options)

    @property
    def frozen(self):
        return self.optimizer.frozen

    def freeze(self, names):
        self.optimizer.freeze(self.model, names if isinstance(names, Frozen) else list(names))

    def unfreeze(self, names=None):
        self.freezer.unfreeze(names)

    def step(self):
        self.optimizer.step[...] += 1
        self.freezer.step()

    def save(self, path):
        self.freezer.save(path)

    def restore(self, path):
        self.freezer.restore(path)


both = pytest.mark.parametrize("door", [Linen, OfNnx])


@both
@pytest.mark.slow
def test_what_is_frozen_by_hand_in_the_course_of_the_run_stays_so(door, tmp_path):
    run = door(decided({3: ("a",), 5: ()}))
    run.step()
    run.freeze(["b"])
    run.save(tmp_path / "at once")
    for _ in range(2):
        run.step()
    assert run.frozen.names == {"a", "b"}
    assert run.freezer.events == [FreezeEvent(1, ("b",)), FreezeEvent(3, ("a",))]
    run.save(tmp_path / "later")
    for saved, done in (("at once", 1), ("later", 3)):
        again = door(decided({3: ("a",), 5: ()}))
        again.restore(tmp_path / saved)
        assert again.freezer.steps == again.freezer.policy_state["calls"] == done
        for _ in range(5 - done):
            again.step()
        assert again.frozen.names == {"b"}  # the policy lets go of its own layer only


@both
def test_a_decision_that_is_pending_takes_effect_beside_what_is_frozen_by_hand(door):
    run = door(decided({1: ("a",)}), lead=2)
    run.step()
    run.freeze(["b"])
    run.step()
    assert run.freezer.pending == (3, Frozen(run.frozen.layers, frozenset("ab")))
    run.step()
    assert run.frozen.names == {"a", "b"}
    run = door(decided({1: ("a",)}), lead=2)
    run.step()
    run.freeze(["a"])
    run.step()
    assert run.freezer.pending is None
    assert run.freezer.events == [FreezeEvent(1, ("a",))]


@both
def test_layers_that_train_though_the_freezer_has_frozen_them_are_an_error(door, tmp_path):
    run = door(decided({1: ("a", "b")}), before=["c"])
    run.step()
    frozen = run.frozen
    run.freeze(Frozen(frozen.layers, frozenset("b")))
    for call in (run.step, lambda: run.save(tmp_path / "run")):
        with pytest.raises(ValueError, match=r"frozen: got b, but the freezer has frozen a, b, c, and .*; go on from"):
            call()
    run.freeze(run.freezer.frozen)
    run.step()
    assert run.frozen == frozen


def test_a_state_that_is_not_taken_over_is_an_error():
    run = Linen(decided({1: ("a",)}))
    run.freezer.step(run.state)
    with pytest.raises(
        ValueError, match=r"frozen: got nothing, but the freezer has frozen a, .* what its step returned"
    ):
        run.freezer.step(run.state)


@both
def test_layers_of_another_grouping_are_an_error(door):
    run = door(decided())
    grouped = sfj.Layers((sfj.Layer("all", tuple(run.frozen.layers.owner), (next(iter(run.frozen.layers.owner)),)),))
    run.freeze(Frozen(grouped, frozenset({"all"})))
    with pytest.raises(
        ValueError, match=r"frozen: is of a network with the layers all, expected .* a, b, c; freeze by"
    ):
        run.step()


def test_autofreeze_passes_over_layers_that_are_frozen_before_the_run():
    model = Net()
    optimizer = sfj.nnx.Optimizer(model, optax.sgd(0.1), layers=sfj.nnx.find_layers(model, X))
    optimizer.freeze(model, ["a"])
    freezer = sfj.nnx.Freezer(model, optimizer, sfj.autofreeze(1, percentile=100))
    for scale in (1.0, 1.1):
        for name, grad in optimizer.grads.items():
            grad[...] = jnp.ones((2, 2)) * (scale if name.startswith("b") else 2 * scale**2)
        optimizer.step[...] += 1
        freezer.step()
    assert optimizer.frozen.names == {"a", "b"}


def a_policy_that_returns(value) -> sfj.Policy:
    return sfj.Policy(lambda layers, params: (), lambda state, layers, **signals: value)


@pytest.mark.parametrize("names", [["a"], ("a",), {"a": 1}, np.array(["a"]), iter(["a"])])
def test_a_policy_may_decide_on_any_iterable_of_names(names):
    assert sfj.Freezer(a_policy_that_returns((names, ())), LAYERS, PARAMS).observe(lambda: PARAMS).names == {"a"}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (("a", ()), "policy: its update decided on str 'a', expected a frozenset of names of layers"),
        ((None, ()), "policy: its update decided on NoneType None, expected"),
        (([True, False], ()), "policy: its update named a layer bool (True|False), expected a string"),
        (frozenset("a"), r"policy: its update returned frozenset frozenset\({'a'}\), expected the pair"),
        (None, "policy: its update returned NoneType None, expected the pair"),
    ],
)
def test_what_a_policy_returns_is_checked(returned, message):
    freezer = sfj.Freezer(a_policy_that_returns(returned), LAYERS, PARAMS)
    with pytest.raises(TypeError, match=message):
        freezer.observe(lambda: PARAMS)


@pytest.mark.parametrize(("lead", "error"), [("3", TypeError), (2.5, ValueError), (None, TypeError), (-1, ValueError)])
def test_a_lead_is_a_number_of_steps(lead, error):
    with pytest.raises(error, match=f"lead: got .*{lead!r}, expected an integer of at least 0"):
        sfj.Freezer(sfj.policies.never(), LAYERS, PARAMS, lead=lead)


def test_a_lead_of_numpy_can_be_saved(tmp_path):
    run = Linen(decided({1: ("a",)}), lead=np.int64(2))
    run.step()
    run.save(tmp_path / "run")
    again = Linen(decided({1: ("a",)}), lead=2)
    again.restore(tmp_path / "run")
    assert again.freezer.pending == run.freezer.pending


@pytest.mark.parametrize("step", [np.int64(3), jnp.asarray(3)], ids=["NumPy", "JAX"])
def test_a_step_of_an_array_can_be_saved(tmp_path, step):
    policy = sfj.policies.lisa(1, max_sets=np.int64(2), keep=())
    freezer = sfj.Freezer(policy, LAYERS, PARAMS, step=step)
    freezer.observe(lambda: PARAMS)
    freezer.save_run(tmp_path / "run", {"params": PARAMS})
    again = sfj.Freezer(policy, LAYERS, PARAMS)
    again.restore_run(tmp_path / "run", {"params": PARAMS})
    assert again.steps == 4


@both
@pytest.mark.parametrize("before", [(), ("a",)])
def test_layers_frozen_by_hand_do_not_hold_back_those_behind_them(monkeypatch, door, before):
    module = importlib.import_module("smartfrz_jax.policies.smartfrz")
    monkeypatch.setattr(module, "freeze_probability", lambda predictor, observation: np.array([0.1, 0.99, 0.99]))
    periods = {"record_every": 1, "evaluate_every": 1, "min_records": 1, "patience": 1}
    schedule = sfj.policies.Schedule(**periods)
    policy = sfj.smartfrz(sfj.Predictor.pretrained(), total_steps=100, schedule=schedule)
    run = door(policy, before=before)
    run.step()
    assert run.frozen.names == ({"a", "b"} if before else set())
