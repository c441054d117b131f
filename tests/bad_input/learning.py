"""Bad input for recordings, examples, fitting and evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np

import smartfrz_jax as sfj
from tests.bad_input.scenes import (
    examples,
    layers,
    of_another_network,
    outputs,
    params,
    predictor,
    recording,
    tailoring,
)
from tests.bad_input.table import INF, NAN, Case, Door

CURVES = np.ones((8, 2))


def recorder(**options: Any) -> sfj.learning.Recorder:
    return sfj.learning.Recorder(layers(), tailoring(), params(), **{"record_every": 1} | options)


def recorded() -> sfj.learning.Recorder:
    found = recorder(reference_features=outputs())
    found.record(1, params(), outputs(), 1.0)
    return found


DOORS = [
    Door(
        "learning.Recorder",
        lambda: {"layers": layers(), "tailoring": tailoring(), "params": params(), "record_every": 1},
    ),
    Door(
        "learning.Recorder.record",
        lambda: {"step": 1, "params": params(), "features": outputs()},
        on=lambda: tracking(),
    ),
    Door(
        "learning.Recorder.finish",
        lambda: {"total_steps": 8},
        on=recorded,
        unchecked={"metadata": "any field"},
    ),
    Door(
        "learning.Recording",
        lambda: vars(recording()),
        unchecked={
            "first_loss=nan": "unknown",
            "first_loss=-7": "a loss",
        },
    ),
    Door("learning.make_examples", lambda: {"recordings": [recording()], "window": 2, "min_records": 2}),
    Door("learning.Examples.check_reads", lambda: {"encoding": sfj.predictor.Encoding()}, on=examples),
    Door("learning.Examples.batch", lambda: {"indices": np.arange(2)}, on=examples),
    Door("learning.Examples.select", lambda: {"chosen": np.arange(2)}, on=examples),
    Door("learning.encode_examples", lambda: {"examples": examples(), "encoding": sfj.predictor.Encoding()}),
    Door(
        "learning.fit",
        lambda: {
            "predictor": predictor(),
            "examples": two_targets(),
            "sgd": sfj.learning.SGD(epochs=1, learning_rate=0.1),
            "held_out": None,
        },
        unchecked={"class_weights=None": "stands for (1, 1)"},
    ),
    Door("learning.SGD", lambda: {"epochs": 1, "learning_rate": 0.1}),
    Door("learning.predict", lambda: {"predictor": predictor(), "examples": examples()}),
    Door("learning.evaluate", lambda: {"probability": np.ones(2), "target": np.ones(2, bool)}),
    Door("learning.by_run", lambda: {"examples": examples(), "runs": [0]}),
    Door("learning.by_layer", lambda: {"examples": examples(), "layers": ["a"]}),
    Door("learning.by_metadata", lambda: {"examples": examples()}, unchecked={"fields": "any field"}),
    Door("learning.moments", lambda: {"examples": examples()}),
    Door("learning.Settled", dict),
    Door("learning.Settled.__call__", lambda: {"recording": recording()}, on=sfj.learning.Settled),
    Door("learning.Harmless", dict),
    Door("learning.Harmless.__call__", lambda: {"recording": recording(swap_harm=CURVES)}, on=sfj.learning.Harmless),
    Door("learning.settled", lambda: {"cka": CURVES}),
    Door("predictor.stabilised", lambda: {"cka": CURVES}),
    Door("learning.Hiding", dict),
    Door(
        "learning.Hiding.__call__",
        lambda: {"observation": seen(), "rng": np.random.default_rng(0)},
        on=sfj.learning.Hiding,
    ),
    Door(
        "learning.swap_harm",
        lambda: {
            "layers": layers(),
            "steps": np.array([1, 2]),
            "snapshots": {1: params()},
            "final": params(),
            "loss": lambda params: 1.0,
        },
    ),
    Door(
        "learning.branch_harm",
        lambda: {
            "layers": layers(),
            "steps": np.array([1, 2]),
            "snapshots": {1: params()},
            "train_branch": lambda snapshot, frozen: 1.0,
        },
    ),
]


def tracking() -> sfj.learning.Recorder:
    return recorder(reference_features=outputs(), track_own=True)


def seen() -> sfj.predictor.Observation:
    return examples().batch(np.arange(2))[0]


def two_targets() -> sfj.learning.Examples:
    return sfj.learning.make_examples([recording()], window=2, min_records=2, criterion=halves)


def halves(recorded: sfj.learning.Recording) -> np.ndarray:
    return np.arange(8)[:, None] >= np.array([4, 4])


def record(step: Any = 1, tree: Any = None, features: Any = None, loss: Any = None, **options: Any) -> Any:
    return recorder(**options).record(step, params() if tree is None else tree, features, loss)


def fit(**options: Any) -> Any:
    sgd = sfj.learning.SGD(epochs=1, learning_rate=0.1)
    given = {"predictor": predictor(), "examples": two_targets(), "sgd": sgd, "held_out": None}
    return sfj.learning.fit(**given | options)


def sgd(**options: Any) -> Any:
    return sfj.learning.SGD(**{"epochs": 1, "learning_rate": 0.1} | options)


def swap(**options: Any) -> Any:
    given = {"steps": np.array([1, 2]), "snapshots": {1: params()}, "final": params(), "loss": lambda params: 1.0}
    return sfj.learning.swap_harm(layers(), **given | options)


def branch(**options: Any) -> Any:
    given = {"steps": np.array([1]), "snapshots": {1: params()}, "train_branch": lambda snapshot, frozen: 1.0}
    return sfj.learning.branch_harm(layers(), **given | options)


def make(**options: Any) -> Any:
    return sfj.learning.make_examples(**{"recordings": [recording()], "window": 2, "min_records": 2} | options)


def without_weights() -> sfj.learning.Examples:
    return make(recordings=[recording().without_weights()])


NAN_WEIGHTS = np.full((8, 2, 4), NAN, np.float32)

CASES = [
    Case("tailoring-of-another", "tailoring", ValueError, ("other layers",), lambda: other_tailoring()),
    Case("record-step-0.5", "step", TypeError, ("0.5", "an integer"), lambda: record(0.5)),
    Case("record-step-negative", "step", ValueError, ("-1",), lambda: record(-1)),
    Case("record-step-between", "step", ValueError, ("3", "a multiple of"), lambda: record(3, record_every=2)),
    Case("record-another", "params", ValueError, ("'a/kernel'",), lambda: record(tree=of_another_network())),
    Case("record-loss-nan", "loss", ValueError, ("nan", "finite"), lambda: record(loss=NAN)),
    Case("record-loss-vector", "loss", ValueError, ("(2,)", "a number"), lambda: record(loss=np.ones(2))),
    Case("record-loss-text", "loss", TypeError, ("'1'", "a number"), lambda: record(loss="1")),
    Case("record-no-features", "features", ValueError, ("got none",), lambda: record(track_own=True)),
    Case(
        "recorder-reference-lacks", "reference_features", ValueError, ("'a'",), lambda: recorder(reference_features={})
    ),
    Case("finish-nothing", "finish", ValueError, ("nothing was recorded",), lambda: recorder().finish(1)),
    Case("finish-too-short", "total_steps", ValueError, ("0", "at least"), lambda: recorded().finish(0)),
    Case("finish-metadata", "metadata", ValueError, ("JSON",), lambda: recorded().finish(1, seed=object())),
    Case("recording-weights", "weights", ValueError, ("(8, 2)",), lambda: recording(weights=np.ones((8, 2)))),
    Case("recording-nan", "weights", ValueError, ("not finite",), lambda: recording(weights=NAN_WEIGHTS)),
    Case("recording-text", "losses", TypeError, ("<U1",), lambda: recording(losses=np.array(["1"] * 8))),
    Case("recording-none", "cka", ValueError, ("at least one",), lambda: recording(cka=None)),
    Case("recording-steps", "step", ValueError, ("expected",), lambda: recording(steps=np.arange(8, 0, -1))),
    Case("recording-empty", "steps, layers", ValueError, ("at least one step",), lambda: recording(steps=np.arange(0))),
    Case("examples-none", "recordings", ValueError, ("0", "at least one"), lambda: make(recordings=[])),
    Case("examples-one", "recordings", TypeError, ("Recording", "a sequence"), lambda: make(recordings=recording())),
    Case("examples-paths", "recordings", TypeError, ("'run.npz'", "Recording"), lambda: make(recordings=["run.npz"])),
    Case("window-longer", "min_records", ValueError, ("9", "8"), lambda: make(window=9, min_records=9)),
    Case("criterion-shape", "criterion", ValueError, ("(2,)", "(8, 2)"), lambda: make(criterion=lambda r: np.ones(2))),
    Case("criterion-none", "criterion", ValueError, ("object", "bool"), lambda: make(criterion=lambda r: None)),
    Case(
        "criterion-lacks",
        "recordings",
        ValueError,
        ("has no own_cka",),
        lambda: make(criterion=sfj.learning.Settled("own_cka")),
    ),
    Case("indices-beyond", "indices", ValueError, ("99", "0 to"), lambda: examples().batch(np.array([99]))),
    Case("indices-float", "indices", TypeError, ("float64", "integers"), lambda: examples().batch(np.array([0.5]))),
    Case("chosen-shape", "chosen", ValueError, ("(2,)",), lambda: examples().select(np.ones(2, bool))),
    Case("no-weights", "examples", ValueError, ("without weights",), lambda: fit(examples=without_weights())),
    Case("all-the-same", "examples", ValueError, ("are freeze",), lambda: fit(examples=all_freeze())),
    Case("held-out-indices", "held_out", ValueError, ("int64", "bool"), lambda: fit(held_out=np.array([0]))),
    Case("held-out-all", "held_out", ValueError, ("some but not all",), lambda: fit(held_out=np.ones(14, bool))),
    Case("epochs-0", "epochs", ValueError, ("0", "at least 1"), lambda: sgd(epochs=0)),
    Case("epochs-text", "epochs", TypeError, ("'1'", "an integer"), lambda: sgd(epochs="1")),
    Case("rate-negative", "learning_rate", ValueError, ("-1", "above 0"), lambda: sgd(learning_rate=-1)),
    Case("rate-nan", "learning_rate", ValueError, ("nan", "above 0"), lambda: sgd(learning_rate=NAN)),
    Case("momentum-1", "momentum", ValueError, ("1", "from 0"), lambda: sgd(momentum=1)),
    Case("decay-infinite", "weight_decay", ValueError, ("inf", "from 0 up"), lambda: sgd(weight_decay=INF)),
    Case("class-weights", "class_weights", ValueError, ("'even'", "balanced"), lambda: fit(class_weights="even")),
    Case("class-weights-3", "class_weights", ValueError, ("two numbers",), lambda: fit(class_weights=(1, 2, 3))),
    Case("class-weights-one", "class_weights", TypeError, ("int 3", "two numbers"), lambda: fit(class_weights=3)),
    Case(
        "predict-batch-0",
        "batch_size",
        ValueError,
        ("0",),
        lambda: sfj.learning.predict(predictor(), examples(), batch_size=0),
    ),
    Case(
        "logits",
        "probability",
        ValueError,
        ("-1.0", "not logits"),
        lambda: sfj.learning.evaluate(np.array([-1.0]), ~ZERO),
    ),
    Case("probability-nan", "probability", ValueError, ("nan",), lambda: sfj.learning.evaluate(np.array([NAN]), ZERO)),
    Case(
        "targets-ints",
        "target",
        TypeError,
        ("int64", "bool"),
        lambda: sfj.learning.evaluate(np.ones(1), np.ones(1, int)),
    ),
    Case(
        "targets-fewer",
        "probability, target",
        ValueError,
        ("(2,)", "(1,)"),
        lambda: sfj.learning.evaluate(np.ones(2), ZERO),
    ),
    Case("run-unknown", "runs", ValueError, ("3",), lambda: sfj.learning.by_run(examples(), [3])),
    Case("run-one", "runs", TypeError, ("int 0", "numbers of recordings"), lambda: sfj.learning.by_run(examples(), 0)),
    Case("layer-unknown", "layers", ValueError, ("'z'", "'a'"), lambda: sfj.learning.by_layer(examples(), ["z"])),
    Case("field-unknown", "seed", ValueError, ("recording 0",), lambda: sfj.learning.by_metadata(examples(), seed=1)),
    Case("cka-vector", "cka", ValueError, ("(8,)", "(records, layers)"), lambda: sfj.learning.settled(np.ones(8))),
    Case("curves-nan", "cka", ValueError, ("1 values not finite",), lambda: sfj.learning.settled(np.array([[NAN]]))),
    Case("window-2.5", "window", ValueError, ("2.5", "an integer"), lambda: sfj.learning.settled(CURVES, window=2.5)),
    Case(
        "tolerance-negative", "tolerance", ValueError, ("-1", "0 or more"), lambda: sfj.learning.Settled(tolerance=-1)
    ),
    Case("harmless-first-loss", "recording", ValueError, ("first_loss",), lambda: sfj.learning.Harmless()(no_loss())),
    Case("hiding-all", "records", ValueError, ("2", "from 0"), lambda: sfj.learning.Hiding(records=2)),
    Case("swap-snapshots", "snapshots", ValueError, ("step 5",), lambda: swap(snapshots={5: params()})),
    Case("swap-nothing", "snapshots", ValueError, ("none",), lambda: swap(snapshots={})),
    Case("swap-another", "snapshots", ValueError, ("only in",), lambda: swap(snapshots={1: of_another_network()})),
    Case("swap-final", "final", ValueError, ("'x/kernel'", "no layer"), lambda: swap(final=of_another_network())),
    Case("swap-depth", "depths", ValueError, ("'z'", "did you mean"), lambda: swap(depths=["z"])),
    Case("swap-no-depth", "depths", ValueError, ("no layers",), lambda: swap(depths=[])),
    Case("swap-loss-nan", "loss", ValueError, ("nan", "finite"), lambda: swap(loss=lambda params: NAN)),
    Case("swap-loss-vector", "loss", ValueError, ("(2,)", "a scalar"), lambda: swap(loss=lambda params: np.ones(2))),
    Case("swap-loss-none", "loss", TypeError, ("None", "a scalar"), lambda: swap(loss=lambda params: None)),
    Case("branch-none", "train_branch", TypeError, ("None",), lambda: branch(train_branch=lambda *_: None)),
    Case("branch-nan", "train_branch", ValueError, ("nan",), lambda: branch(train_branch=lambda *_: NAN)),
]

ZERO = np.zeros(1, bool)


def other_tailoring() -> Any:
    fewer = sfj.Layers(layers().entries[:2])
    return sfj.learning.Recorder(fewer, tailoring(), params(), record_every=1)


def all_freeze() -> sfj.learning.Examples:
    return make(criterion=lambda recorded: np.ones((8, 2), bool))


def no_loss() -> sfj.learning.Recording:
    return recording(swap_harm=np.ones((8, 2), np.float32), first_loss=NAN)
