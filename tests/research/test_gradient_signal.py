"""The signal in gradients: against closed forms, the report by hand, and a measurement end to end."""

import dataclasses
import doctest
import itertools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research import gradient_signal, json_lines
from research.recordings.plan import runs
from research.recordings.sets import FASHION
from research.trials import gradient_signal as trials_of_signal
from research.trials.cases import Case
from research.trials.classification import loss_fn
from research.trials.gradient_signal import Signal, measure, report, signal_share
from research.trials.result import Result
from research.trials.strategies import strategies
from research.trials.trial import Bench
from smartfrz_jax.pytrees import paths

ROOT = Path(__file__).parents[2]


def test_examples_in_docstrings():
    assert doctest.testmod(trials_of_signal).failed == 0


def share_of(gradients):
    return signal_share(float(np.sum(gradients.sum(0) ** 2)), float(np.sum(gradients**2)), len(gradients))


@pytest.mark.parametrize(
    ("gradients", "expected"),
    [
        ([[3.0, 4.0]] * 5, 1.0),
        (np.eye(7), 0.0),
        ([[1.0], [-1.0]], -1.0),
        ([[1.0], [-1.0], [1.0], [-1.0]], -1 / 3),  # the least that four can have
        ([[1.0, 1.0], [1.0, -1.0]], 0.0),
        ([[2.0, 1.0], [2.0, -1.0]], 3 / 5),  # of products 3, and squares 5
        (np.zeros((3, 2)), np.nan),
    ],
)
def test_share_of_the_signal_by_hand(gradients, expected):
    np.testing.assert_allclose(share_of(np.asarray(gradients)), expected, rtol=1e-12)


@pytest.mark.parametrize("noise", [0.0, 0.5, 3.0])
def test_noise_is_told_from_signal(noise):
    rng = np.random.default_rng(0)
    signal = rng.normal(size=400)
    signal /= np.linalg.norm(signal)
    shares = [share_of(signal + noise / 20 * rng.normal(size=(10, 400))) for _ in range(300)]
    error = np.std(shares) / np.sqrt(len(shares))
    assert np.mean(shares) == pytest.approx(1 / (1 + noise**2), abs=4 * error + 2e-3)


def result(case, strategy, seed, accuracy, loss):
    frozen = [(0, ["a", "b"])] if strategy == "static:half" else []
    return Result(case, strategy, seed, accuracy, loss, 1.0, 1.0, 1.0, 1.0, frozen)


def test_the_report_by_hand():
    signals = [
        Signal("ready", 0, 10, {"a": 0.1, "b": 0.3, "c": 0.5}),
        Signal("ready", 1, 10, {"a": 0.3, "b": 0.5, "c": 0.7}),
        Signal("another", 0, 20, {"a": 0.4, "b": np.nan, "c": 0.1}),  # b has no gradients
        Signal("a third", 0, 20, {"a": 0.6, "b": 0.6, "c": 0.5}),
    ]
    results = [
        result("ready", "never", 0, 0.50, 1.0),
        result("ready", "static:half", 0, 0.52, 0.9),
        result("another", "never", 0, 0.50, 2.0),
        result("another", "static:half", 0, 0.40, 3.0),
        result("another", "never", 1, 0.50, 2.0),
        result("another", "static:half", 1, 0.44, 2.6),
        result("another", "static:half", 2, 0.0, 9.0),  # no run of never with that seed
        result("a third", "never", 0, 0.50, 2.0),
        result("a third", "static:half", 0, 0.49, 2.5),
    ]
    assert report(signals, results).split("\n") == [
        "| fine-tuning | seeds | front | rest | full runs | points | loss |",
        "|---|--:|--:|--:|--:|--:|--:|",
        "| another | 1 | +0.400 | +0.100 | 2 | -8.00 +- 2.00 | +40.0 +- 10.0 % |",
        "| a third | 1 | +0.600 | +0.500 | 1 | -1.00 | +25.0 % |",
        "| ready | 2 | +0.300 +- 0.100 | +0.600 +- 0.100 | 1 | +2.00 | -10.0 % |",
        "",
        "| rank correlation | with points | with loss |",
        "|---|--:|--:|",
        "| front | -0.50 | +0.50 |",
        "| rest | +1.00 | -1.00 |",
        "| front less rest | -1.00 | +1.00 |",
    ]
    with pytest.raises(ValueError, match=r"full_runs: got none of static:half and never for ready"):
        report(signals, results[2:])
    with pytest.raises(ValueError, match=r"in ready static:half froze \['z'\], expected some of .*\['a', 'b', 'c'\]"):
        report(signals, [results[0], results[1]._replace(frozen=[(0, ["z"])])])


def test_the_table_beside_the_data_is_that_of_the_measurements_in_the_repository():
    folder = ROOT / "benchmarks" / "rehearsals"
    signals = json_lines.read(folder / "gradient_signal.jsonl", Signal.parse)
    results = json_lines.read(folder / "results.jsonl", Result.parse)
    assert report(signals, results) in (folder / "tables.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [("--share 0", "--share: got 0.0, expected a share above 0"), ("--seeds 0", "--seeds: got 0, expected at least 1")],
)
def test_the_command_line_is_checked(options, message, capsys):
    with pytest.raises(SystemExit):
        gradient_signal.parse(["--data-dir", "x", *options.split()])
    assert message in capsys.readouterr().err


def test_fine_tunings_without_full_runs_are_named(tmp_path, capsys):
    line = f"--data-dir {tmp_path} --out {tmp_path} --cases"
    assert gradient_signal.main([*line.split(), "resnte14-weak"]) == 2
    assert "cases: 'resnte14-weak' matches none of lite0-cifar10, " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("jax_defaults")
def test_a_measurement_end_to_end_is_not_made_twice(tmp_path, monkeypatch):
    run = next(run for run in runs() if run.name == f"vgg9-{FASHION.replace('/', '-')}-scratch-0")
    run = dataclasses.replace(run, steps=12, examples=80, batch_size=16, learning_rate=0.02, optimizer="sgd")
    monkeypatch.setattr(gradient_signal, "cases", lambda: {"small": Case(run, 100)})
    benches = []
    monkeypatch.setattr(gradient_signal, "Bench", lambda *of, **rest: benches.append(Bench(*of, **rest)) or benches[-1])
    full_runs = tmp_path / "full.jsonl"
    names = ["features/0"]
    for strategy in ("never", "static:half"):
        made = Result("small", strategy, 0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, [(0, names)] if strategy != "never" else [])
        json_lines.append(full_runs, made._asdict())
    options = f"--data-dir {tmp_path} --out {tmp_path / 'out'} --share 0.5 --seeds 1 --full-runs {full_runs}"
    options += f" --results {tmp_path / 'tables.md'}"
    assert gradient_signal.main(options.split()) == 0
    (signal,) = json_lines.read(tmp_path / "out" / "gradient_signal.jsonl", Signal.parse)
    (bench,) = benches
    assert (signal.case, signal.seed, signal.steps) == ("small", 0, 6)
    assert list(signal.by_layer) == list(bench.layers.names)

    # Beside a plain loop, in float64.
    never = strategies()["never"]
    model = bench.model(0)
    optimizer = nnx.Optimizer(model, bench.optimizer(model, never).tx, wrt=nnx.Param)
    grad, gradients = nnx.jit(nnx.grad(loss_fn)), []
    for inputs, labels in itertools.islice(bench.batches(bench.data.train, 0, never), 6):
        grads = grad(model, inputs, labels)
        optimizer.update(model, grads)
        gradients.append({name: np.float64(leaf).ravel() for name, leaf in paths.flatten(nnx.as_pure(grads)).items()})
    for layer in bench.layers:
        of_layer = np.stack([np.concatenate([grads[name] for name in layer.params]) for grads in gradients])
        assert signal.by_layer[layer.name] == pytest.approx(share_of(of_layer), abs=1e-4)

    text = (tmp_path / "tables.md").read_text()
    assert "| small | 1 | " in text

    spoilt = [(tuple(jnp.full_like(of, jnp.nan) for of in inputs), labels)] * 6
    with monkeypatch.context() as patched:
        patched.setattr(bench, "batches", lambda *_: iter(spoilt))
        with pytest.raises(FloatingPointError, match=r"small, seed 0: a gradient .* is not finite; lower the learning"):
            measure(bench, 6, 0)

    # In another number of steps it is another measurement, beside which the first is not shown.
    assert gradient_signal.main([*options.split(), "--share", "0.25"]) == 0
    assert [row.steps for row in json_lines.read(tmp_path / "out" / "gradient_signal.jsonl", Signal.parse)] == [6, 3]
    other = (tmp_path / "tables.md").read_text()
    assert other != text
    assert "| small | 1 | " in other

    monkeypatch.setattr(gradient_signal, "Bench", None)
    assert gradient_signal.main([*options.split(), "--share", "0.25"]) == 0
    assert (tmp_path / "tables.md").read_text() == other
