"""Whole runs with and without kept activations: the report by hand, and runs end to end."""

import dataclasses
from pathlib import Path

import pytest

from research import json_lines
from research.recordings.plan import runs
from research.recordings.sets import FASHION
from research.trials import kept_runs
from research.trials.cases import Case
from research.trials.kept import KeptRun, report


def run(strategy, seed, kept, accuracy, flops, seconds, case="small"):
    stored = 8_000_000 if kept else 0
    return KeptRun(case, strategy, seed, kept, accuracy, 2 - accuracy, flops, 0.7, seconds, 4.0 + seed, stored)


def test_the_report_by_hand():
    measured = [
        run("never", 0, False, 0.50, 100.0, 10.0),
        run("never", 1, False, 0.60, 100.0, 20.0),
        run("static:half", 0, True, 0.52, 40.0, 3.0),
        run("static:half", 1, True, 0.60, 44.0, 10.0),
        run("static:half", 0, False, 0.49, 70.0, 6.0),
        run("static:half", 2, False, 0.10, 70.0, 6.0),  # no run of never with that seed
        run("static:half", 0, False, 0.10, 70.0, 6.0, case="another"),
    ]
    head = "| strategy | activations | seeds | FLOPs | by account | time | first seed | stored, MB | points | loss |"
    assert report(measured).split("\n") == [
        "### small",
        "",
        head,
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        "| never | - | 2 | 1.00 | 0.70 | 1.00 | 1.00 | 0.0 | +0.00 +- 0.00 | +0.000 +- 0.000 |",
        "| static:half | - | 1 | 0.70 | 0.70 | 0.71 | 0.71 | 0.0 | -1.00 | +0.010 |",
        "| static:half | kept | 2 | 0.42 | 0.70 | 0.55 | 0.50 | 8.0 | +1.00 +- 1.00 | -0.010 +- 0.010 |",
    ]


def test_the_table_beside_the_data_is_that_of_the_measurements_in_the_repository():
    root = Path(__file__).parents[2]
    measured = json_lines.read(root / "benchmarks" / "kept_runs" / "runs.jsonl", KeptRun.parse)
    assert report(measured) in (root / "benchmarks" / "kept_runs" / "tables.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--cases lite1", "--cases: 'lite1' matches none of lite0-cifar10, "),
        ("--strategies nevr", "--strategies: 'nevr' matches none of never, linear"),
        ("--strategies smartfrz:*", "--strategies: smartfrz:0.2 needs a predictor"),
        ("--seeds 0", "--seeds: got 0, expected at least 1"),
    ],
)
def test_the_command_line_is_checked(options, message, capsys):
    with pytest.raises(SystemExit):
        kept_runs.parse(["--data-dir", "x", *options.split()])
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("jax_defaults")
def test_runs_end_to_end_come_to_the_same_for_less_and_are_not_made_twice(tmp_path, monkeypatch, capsys):
    setup = next(run for run in runs() if run.name == f"vgg9-{FASHION.replace('/', '-')}-scratch-0")
    setup = dataclasses.replace(
        setup, steps=40, examples=64, batch_size=16, learning_rate=0.02, optimizer="sgd", augment=False
    )
    monkeypatch.setattr(kept_runs, "CASES", {"small": Case(setup, 100)})
    options = f"--data-dir {tmp_path} --out {tmp_path / 'out'} --seeds 1 --strategies static:half,all".split()
    results = tmp_path / "tables.md"
    assert kept_runs.main([*options, "--results", str(results)]) == 0
    never, plain, kept = json_lines.read(tmp_path / "out" / "runs.jsonl", KeptRun.parse)
    assert [run.kept for run in (never, plain, kept)] == [False, False, True]
    assert kept.accuracy == pytest.approx(plain.accuracy, abs=0.011)  # one of a hundred
    assert kept.loss == pytest.approx(plain.loss, rel=1e-3)
    assert kept.flops < 0.8 * plain.flops < 0.8 * never.flops
    # The account is right about the runs: 3 % is what it may be off for a step, and in the epoch in which layers freeze
    # a batch is computed that is not needed.
    assert plain.flops / never.flops == pytest.approx(plain.account, abs=0.04)
    assert kept.flops / never.flops == pytest.approx(kept.account, abs=0.06)
    assert (plain.stored_bytes, kept.stored_bytes > 0) == (0, True)
    assert "| static:half,all | kept | 1 |" in results.read_text()
    capsys.readouterr()
    monkeypatch.setattr(kept_runs, "Bench", None)
    assert kept_runs.main(options) == 0
    assert "small static" not in capsys.readouterr().out
