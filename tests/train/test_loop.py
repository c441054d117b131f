"""The training loop: that it does not wait for the step just dispatched, and what it logs of steps."""

import math
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj
from train.log import Log, Run, read
from train.loop import Loop
from train.profile import profiled


def loss_fn(model, x):
    return (model(x) ** 2).mean()


@pytest.mark.parametrize("predicted", [None, 7.0])
@pytest.mark.slow
def test_flops_are_those_of_the_program_or_as_predicted(tmp_path, jax_defaults, predicted):
    def train_step(model, optimizer, x):
        loss, grads = optimizer.value_and_grad(loss_fn)(model, x)
        optimizer.update(model, grads)
        return loss

    x = jnp.ones((4, 8))
    model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    optimizer = sfj.nnx.Optimizer(model, optax.sgd(0.1), layers=sfj.nnx.find_layers(model, x))
    freezer, step = sfj.nnx.Freezer(model, optimizer, sfj.policies.never()), sfj.TrainStep(train_step)
    asked = []

    def flops(frozen):
        asked.append(frozen)
        return predicted

    with Log(tmp_path / "log.jsonl", Run("never", optimizer.frozen.layers.names)) as log:
        loop = Loop(log, freezer, step, flops=flops if predicted else None)
        assert list(loop.run([(x,)] * 2)) == [1, 2]
    assert [one.flops for one in log.run.steps] == [predicted or step.programs[0].cost.flops] * 2
    assert set(asked) == ({optimizer.frozen} if predicted else set())


class Steps:
    """In place of a train step and its freezer: a device that takes a second a step, and a clock."""

    last = SimpleNamespace(
        frozen="nothing", waited=0.0, ahead=False, reason=None,
        cost=SimpleNamespace(flops=5.0, devices=1, peak_bytes=6, trace_seconds=0.0, compile_seconds=0.0),
    )  # fmt: skip
    model, optimizer, policy_state, programs = nnx.Linear(1, 1, rngs=nnx.Rngs(0)), nnx.Dict(), (), ()

    def __init__(self, monkeypatch, losses, freezes=(), compiles=()):
        self.losses, self.freezes, self.compiles = losses, freezes, compiles
        self.now = self.wait_seconds = self.free_at = 0.0
        self.steps, self.told, self.events = 0, [], []
        self.last.frozen = sfj.Frozen(sfj.find_layers({"a": jnp.ones(1)}, lambda p: p["a"].sum()))
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def __call__(self, model, optimizer, number):
        assert number == self.steps + 1
        if number in self.compiles:
            self.now, self.wait_seconds = self.now + 100, self.wait_seconds + 100
        self.free_at = max(self.free_at, self.now) + 1
        self.told.append(("dispatched", number))
        return Loss(self, number, self.free_at)

    def step(self, *, loss):
        self.steps += 1
        if self.steps in self.freezes:
            self.events.append(sfj.FreezeEvent(self.steps, ("a",)))


class Loss:
    """Of a step that is done some time."""

    def __init__(self, steps, number, done_at):
        self.steps, self.number, self.done_at = steps, number, done_at

    def block_until_ready(self):
        self.steps.now = max(self.steps.now, self.done_at)
        self.steps.told.append(("arrived", self.number))
        return self

    def __array__(self, dtype=None, copy=None):
        assert ("arrived", self.number) in self.steps.told
        return np.float32(self.steps.losses[self.number - 1])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.jsonl"


def numbers(stop):
    return ((np.asarray(n),) for n in range(1, stop))


def log_at(path):
    return Log(path, Run("never", ("a",)))


def test_two_steps_stay_in_flight_and_losses_are_looked_at_together(monkeypatch, path):
    steps = Steps(monkeypatch, losses=np.arange(7))
    with log_at(path) as log:
        known = [len(log.run.steps) for _ in Loop(log, steps, steps, log_every=3).run(numbers(8))]
    order = [(kind, n) for n in range(3, 8) for kind in ("dispatched", "arrived")]
    expected = [("dispatched", 1), ("dispatched", 2)]
    expected += [(kind, n if kind == "dispatched" else n - 2) for kind, n in order]
    assert steps.told == [*expected, ("arrived", 6), ("arrived", 7)]
    assert known == [0, 0, 0, 0, 3, 3, 3]
    assert [one.loss for one in log.run.steps] == list(range(7))


def test_seconds_are_those_of_the_device_but_for_compiling_and_what_comes_after_a_drain(monkeypatch, path):
    steps = Steps(monkeypatch, losses=np.zeros(8), compiles=(1,))
    with log_at(path) as log:
        loop = Loop(log, steps, steps, log_every=2)
        for done in loop.run(numbers(9)):
            steps.now += 0.25  # beside the device's work
            if done == 5:
                loop.drain()
                steps.now += 1000  # an evaluation
    assert [one.seconds for one in log.run.steps] == pytest.approx([1.0] * 8)
    assert log.run.seconds == pytest.approx(8.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_named_when_it_is_looked_at(monkeypatch, path, value):
    steps = Steps(monkeypatch, losses=[1, 1, 1, value, 1, 1, value, 1, 1])
    with log_at(path) as log, pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) after step 4 of"):
        list(Loop(log, steps, steps, log_every=5).run(numbers(10)))
    assert steps.steps == 7
    assert [one.loss for one in read(path).steps] == [1, 1, 1, None]


def test_all_is_looked_at_before_what_stands_behind_it(monkeypatch, path):
    steps = Steps(monkeypatch, losses=[1, 1, 1, math.nan], freezes=(2,))
    with log_at(path) as log:
        loop = Loop(log, steps, steps)
        for done in loop.run(numbers(5)):
            assert [event.step for event in log.run.freezes] == [2] * (done >= 2)
            assert len(log.run.steps) == 2 * (done >= 2)
            if done == 4:
                with pytest.raises(FloatingPointError, match="after step 4"):
                    loop.drain()
    assert [one.step for one in read(path).steps] == [1, 2, 3, 4]


def test_an_error_leaves_no_step_out_of_the_log(monkeypatch, path):
    def data():
        yield from numbers(4)
        raise OSError("gone")

    steps = Steps(monkeypatch, losses=np.ones(3))
    with log_at(path) as log, pytest.raises(OSError, match="gone"):
        list(Loop(log, steps, steps).run(data()))
    assert len(read(path).steps) == 3


@pytest.mark.slow
def test_a_program_that_no_freeze_explains_says_why(path, caplog, jax_defaults):
    def train_step(model, optimizer, x):
        loss, grads = optimizer.value_and_grad(loss_fn)(model, x)
        optimizer.update(model, grads)
        return loss

    x = jnp.ones((4, 8))
    model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 8, rngs=nnx.Rngs(1)))
    optimizer = sfj.nnx.Optimizer(model, optax.sgd(0.1), layers=sfj.nnx.find_layers(model, x))
    policy = sfj.static_prefix([(0.0, 0.5)], total_steps=6)
    freezer, step = sfj.nnx.Freezer(model, optimizer, policy), sfj.TrainStep(train_step)
    batches = [(x,), (x,), (x[:3],), (x,), (x[:3],), (x[:2],)]
    with log_at(path) as log:
        list(Loop(log, freezer, step).run(batches))
    reasons = [None, None, *(f"its batch is (float32[{n},8]), not (float32[{m},8]) as before; pad batches to a few "
                             "shapes" for n, m in ((3, 4), (2, 3)))]  # fmt: skip
    assert [one.reason for one in log.run.programs] == reasons
    assert [one.getMessage() for one in caplog.records] == [
        f"step {step} was compiled anew, though the frozen set is the same: {reason}"
        for step, reason in zip((3, 6), reasons[2:], strict=True)
    ]
    assert len(read(path).programs) == 4


@pytest.mark.slow
def test_a_trace_has_the_steps_after_the_warm_up(path, jax_defaults):
    def train_step(model, optimizer, x):
        loss, grads = optimizer.value_and_grad(loss_fn)(model, x)
        optimizer.update(model, grads)
        return loss

    x = jnp.ones((4, 8))
    model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    optimizer = sfj.nnx.Optimizer(model, optax.sgd(0.1), layers=sfj.nnx.find_layers(model, x))
    freezer, step = sfj.nnx.Freezer(model, optimizer, sfj.policies.never()), sfj.TrainStep(train_step)
    folder = path.parent / "profile"
    with log_at(path) as log:
        loop = Loop(log, freezer, step)
        assert list(profiled(loop, loop.run([(x,)] * 15), folder, 3)) == list(range(1, 16))
    (file,) = folder.glob("plugins/profile/*/*.xplane.pb")  # where XProf and TensorBoard look for it
    events = [
        dict(event.stats)["step_num"]
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train" and "step_num" in dict(event.stats)
    ]
    assert events == [11, 12, 13]


def test_no_trace_is_written_unasked(monkeypatch, path):
    steps = Steps(monkeypatch, losses=np.ones(12))
    with log_at(path) as log:
        loop = Loop(log, steps, steps)
        assert list(profiled(loop, loop.run(numbers(13)), path.parent / "profile", 0)) == list(range(1, 13))
    assert not (path.parent / "profile").exists()
