"""Callbacks are told what happens when it does; the ready ones write it so that it can be read back."""

import importlib
import json
import struct
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax import FreezeEvent
from tests.support.tensorboard import events_in, read_tensorboard

pytestmark = pytest.mark.usefixtures("jax_defaults")

NAMES = ("a", "b")
PARAMS = {name: jnp.eye(2) for name in NAMES}
X = jnp.ones((1, 2))
STEPS = {1: {"loss": jnp.float32(0.5)}, 2: {"loss": 0.25, "accuracy": 1}}
EVENTS = [FreezeEvent(1, ("a", "b")), FreezeEvent(2, (), ("a",))]


class Recorder:
    def __init__(self):
        self.told = []

    def on_step(self, step, metrics):
        self.told.append((step, {name: float(value) for name, value in metrics.items()}))

    def on_freeze(self, event):
        self.told.append(event)


def apply_fn(params, x):
    return x @ params["a"] @ params["b"]


def decided(at):
    def update(state, layers, *, step, **signals):
        assert "metrics" not in signals  # they are none of the policy's business
        return frozenset(at.get(step, ())), state

    return sfj.Policy(lambda layers, params: (), update)


def nnx_loop(policy, recorder):
    model = nnx.Sequential(*(nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(seed)) for seed in range(2)))
    layers = sfj.nnx.find_layers(model, X)
    optimizer = sfj.nnx.Optimizer(model, optax.sgd(0.1), layers=layers)
    freezer = sfj.nnx.Freezer(model, optimizer, policy, callbacks=[recorder])

    def step(loss, metrics):
        optimizer.step[...] += jnp.uint32(1)  # a step that changes no weights
        freezer.step(loss=loss, metrics=metrics)

    return layers, step


def linen_loop(policy, recorder):
    layers = sfj.find_layers(PARAMS, apply_fn, X)
    state = sfj.linen.TrainState.create(apply_fn=apply_fn, params=PARAMS, tx=optax.sgd(0.1), layers=layers)
    freezer = sfj.linen.Freezer(state, policy, callbacks=(recorder,))

    def step(loss, metrics):
        nonlocal state
        state = freezer.step(state, loss=loss, metrics=metrics)

    return layers, step


def functional_loop(policy, recorder):
    layers = sfj.find_layers(PARAMS, apply_fn, X)
    freezer = sfj.Freezer(policy, layers, PARAMS)
    freezer.callbacks = (recorder,)
    return layers, lambda loss, metrics: freezer.observe(lambda: PARAMS, loss=loss, metrics=metrics)


@pytest.mark.parametrize("loop", [nnx_loop, linen_loop, functional_loop])
def test_a_freezer_tells_every_step_and_then_what_froze_after_it(loop):
    recorder, at = Recorder(), {}
    layers, step = loop(decided(at), recorder)
    first, second = layers.names
    at |= {2: (first, second), 3: (second,)}
    for loss, metrics in ((0.5, None), (jnp.float32(0.25), {"accuracy": 1.0}), (None, None)):
        step(loss, metrics)
    assert recorder.told == [
        (1, {"loss": 0.5, "frozen_layers": 0}),
        (2, {"loss": 0.25, "frozen_layers": 0, "accuracy": 1.0}),
        FreezeEvent(2, (first, second)),
        (3, {"frozen_layers": 2}),
        FreezeEvent(3, (), (first,)),
    ]


def tell(callback):
    with callback:
        for (step, metrics), event in zip(STEPS.items(), EVENTS, strict=True):
            callback.on_step(step, metrics)
            callback.on_freeze(event)


def test_json_lines_are_added(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        tell(sfj.callbacks.JsonLines(path))
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert entries == 2 * [
        {"event": "step", "step": 1, "metrics": {"loss": 0.5}},
        {"event": "freeze", "step": 1, "names": ["a", "b"], "returned": []},
        {"event": "step", "step": 2, "metrics": {"loss": 0.25, "accuracy": 1.0}},
        {"event": "freeze", "step": 2, "names": [], "returned": ["a"]},
    ]


def test_json_lines_hold_what_is_not_finite_as_null(tmp_path):
    sfj.callbacks.JsonLines(tmp_path / "m").on_step(1, {"loss": jnp.nan, "bound": float("inf")})
    entry = json.loads((tmp_path / "m").read_text(), parse_constant=pytest.fail)
    assert entry["metrics"] == {"loss": None, "bound": None}


def test_tensorboard_reads_scalars_and_texts(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs tensorboardX, of the extra `tensorboard`")
    tell(sfj.callbacks.TensorBoard(tmp_path))
    assert read_tensorboard(tmp_path) == [
        (1, "loss", 0.5),
        (1, "freeze", "frozen: a, b"),
        (2, "loss", 0.25),
        (2, "accuracy", 1.0),
        (2, "freeze", "training again: a"),
    ]


def test_tensorboard_hides_what_came_after_the_step_that_a_run_goes_on_from(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs tensorboardX, of the extra `tensorboard`")
    tell(sfj.callbacks.TensorBoard(tmp_path / "begun"))
    tell(sfj.callbacks.TensorBoard(tmp_path / "resumed", purge_step=3))
    for name, steps in (("begun", []), ("resumed", [3])):
        events = events_in(tmp_path / name)
        assert [event.step for event in events if event.HasField("session_log")] == steps


HISTORY = [
    {"step": 1, "loss": 0.5, "frozen": "a, b"},
    {"step": 2, "loss": 0.25, "accuracy": 1.0, "training again": "a"},
]


def test_wandb_gets_metrics_and_names(monkeypatch):
    """As ``wandb.init`` and ``Run.log`` are: what is logged for one step is one row."""

    class Run:
        def __init__(self, **options):
            self.options, self.rows, self.is_finished = options, {}, False

        def log(self, data, step=None, commit=None):
            self.rows.setdefault(step, {}).update(data)

        def finish(self, exit_code=None):
            self.is_finished = True

    runs = []
    fake = types.SimpleNamespace(init=lambda **options: runs.append(Run(**options)) or runs[-1])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tell(sfj.callbacks.WandB(project="mine", mode="offline"))
    (run,) = runs
    assert run.options == {"project": "mine", "mode": "offline"}
    assert [{"step": step} | row for step, row in run.rows.items()] == HISTORY
    assert run.is_finished


def read_wandb(file):
    """The rows of a file of W&B: a log as LevelDB's, of blocks of 32 KiB, after seven bytes of head."""
    record_pb2 = importlib.import_module("wandb.proto.wandb_internal_pb2")
    content, at, data, rows = file.read_bytes(), 7, b"", []
    while at + 7 < len(content):
        if (left := 2**15 - at % 2**15) < 7:  # no record begins so close to the end of a block
            at += left
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        data += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = record_pb2.Record.FromString(data)
            data = b""
            if record.HasField("history"):
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                rows.append({"step": items["_step"]} | {k: v for k, v in items.items() if not k.startswith("_")})
    return rows


@pytest.mark.slow
def test_wandb_itself_keeps_a_run_offline(tmp_path):
    wandb = pytest.importorskip("wandb", reason="needs wandb, of the extra `wandb`")
    settings = wandb.Settings(silent=True, x_disable_stats=True, disable_git=True, console="off")
    tell(sfj.callbacks.WandB(mode="offline", dir=tmp_path, settings=settings))
    wandb.teardown()  # waits for the process that writes
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert read_wandb(file) == HISTORY


def test_only_every_so_many_steps_are_written_and_all_that_freezes(tmp_path):
    callback = sfj.callbacks.JsonLines(tmp_path / "m", every=2)
    for step in range(1, 6):
        callback.on_step(step, {"loss": step})
    callback.on_freeze(EVENTS[0])
    assert [json.loads(line)["step"] for line in (tmp_path / "m").read_text().splitlines()] == [2, 4, 1]


def test_one_process_of_several_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    for callback in (
        sfj.callbacks.JsonLines(tmp_path / "m"),
        sfj.callbacks.TensorBoard(tmp_path / "t"),
        sfj.callbacks.WandB(),
    ):
        tell(callback)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("package", "make"),
    [("tensorboardX", lambda: sfj.callbacks.TensorBoard("runs")), ("wandb", lambda: sfj.callbacks.WandB())],
)
def test_a_package_that_is_not_there_is_named(package, make, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"the package {package} is not here; pip install {package}"):
        make()


@pytest.mark.slow
def test_the_packages_are_imported_only_when_used():
    code = "import sys, smartfrz_jax; assert not {'tensorboardX', 'wandb'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
