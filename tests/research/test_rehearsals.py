"""Rehearsals beside full runs: the report against numbers worked out by hand, and a small comparison end to end."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

import smartfrz_jax as sfj
from research import json_lines
from research.recordings.plan import runs
from research.recordings.sets import FASHION
from research.trials import rehearsals
from research.trials.cases import Case
from research.trials.rehearsed import Plan, Rehearsed, report
from research.trials.result import Result
from research.trials.strategies import strategies
from research.trials.trial import Bench

ROOT = Path(__file__).parents[2]


PLAN = Plan(rehearsed="static:half", ready="static:all", otherwise="progress:0.5")


def rehearsed(seed, harm, chosen, share=0.1, case="case"):
    harms = {"static:half": sfj.policies.Harm(harm, 0.01)}
    return Rehearsed(case, seed, share, 0.2 + seed / 10, sfj.policies.Rehearsal(10, 2.0, 1.8, harms, chosen))


def result(strategy, seed, loss, accuracy, compute=1.0, cached=1.0, seconds=2.0):
    return Result("case", strategy, seed, accuracy, loss, compute, cached, seconds, 1.0, [])


def test_the_report_by_hand():
    rows = [
        rehearsed(0, 0.1, None),
        rehearsed(1, -0.1, "static:half"),
        rehearsed(2, -0.2, "static:half", share=0.025),
        rehearsed(0, float("nan"), None, share=0.05, case="another"),
        rehearsed(1, 0.3, None, share=0.05, case="another"),
        rehearsed(0, float("nan"), None, share=0.05, case="a third"),
    ]
    full = [
        result("never", 0, 1.0, 0.80),
        result("static:half", 0, 1.2, 0.77),
        result("static:half", 1, 0.5, 0.90),  # no run of never with that seed
        result("static:all", 0, 0.5, 0.90),  # not what was chosen
        result("progress:0.5", 0, 1.1, 0.79, compute=0.8, cached=0.7),
        result("never", 2, 1.0, 0.80, seconds=4.0),
        result("static:all", 2, 1.0, 0.81, compute=0.5, cached=0.3, seconds=1.0),
    ]
    assert report(rows, full, PLAN).split("\n") == [
        "### Rehearsals of 2.5% of the steps",
        "",
        "| fine-tuning | seeds | static:half harmless | harm | price | full runs | loss | points |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        "| case | 1 | 1 | -20.0 % | 0.40 | 0 | - | - |",
        "",
        "The long run then has `static:all` or `progress:0.5`:",
        "",
        "| fine-tuning | seeds | static:all | compute, rehearsal included | with kept activations | points |",
        "|---|--:|--:|--:|--:|--:|",
        "| case | 1 | 1 | 0.90 | 0.70 | +1.00 |",
        "",
        "### Rehearsals of 5.0% of the steps",
        "",
        "| fine-tuning | seeds | static:half harmless | harm | price | full runs | loss | points |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        "| another | 2 | 0 | +30.0 % (1 left out) | 0.25 | 0 | - | - |",
        "| a third | 1 | 0 | - (1 left out) | 0.20 | 0 | - | - |",
        "",
        "### Rehearsals of 10.0% of the steps",
        "",
        "| fine-tuning | seeds | static:half harmless | harm | price | full runs | loss | points |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        "| case | 2 | 1 | +0.0 +- 10.0 % | 0.25 | 1 | +0.200 | -3.00 |",
        "",
        "The long run then has `static:all` or `progress:0.5`:",
        "",
        "| fine-tuning | seeds | static:all | compute, rehearsal included | with kept activations | points |",
        "|---|--:|--:|--:|--:|--:|",
        "| case | 1 | 0 | 1.00 | 0.90 | -1.00 |",
        "",
        "### Full runs, less `never` with the same seed",
        "",
        "| fine-tuning | strategy | seeds | compute | with kept activations | time | loss | points | median |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
        "| case | progress:0.5 | 1 | 0.80 | 0.70 | 1.00 | +0.100 | -1.00 | -1.00 |",
        "| case | static:all | 2 | 0.75 | 0.65 | 0.62 | -0.250 +- 0.250 | +5.50 +- 4.50 | +5.50 |",
        "| case | static:half | 1 | 1.00 | 1.00 | 1.00 | +0.200 | -3.00 | -3.00 |",
    ]
    assert "Full runs" not in report(rows, full[:1], PLAN)


def test_the_tables_beside_the_data_are_those_of_the_results_in_the_repository():
    folder = ROOT / "benchmarks" / "rehearsals"
    rows = json_lines.read(folder / "rehearsals.jsonl", Rehearsed.parse)
    full = json_lines.read(folder / "results.jsonl", Result.parse)
    assert report(rows, full, rehearsals.PLAN) in (folder / "tables.md").read_text()
    augmented = {name for name, case in rehearsals.cases().items() if case.setup.augment}
    kept = {row.case for row in full if row.compute_cached < row.compute}
    assert kept  # of some, but not where every epoch has other images
    assert not kept & augmented
    assert "NaN" not in "".join(file.read_text() for file in folder.glob("*.jsonl"))


def test_a_rehearsal_is_read_as_it_was_written(tmp_path):
    row, untold = rehearsed(1, -0.1, "static:half"), rehearsed(2, float("nan"), None)
    for one in (row, untold):
        json_lines.append(tmp_path / "rows.jsonl", one.as_json())
    again = json_lines.read(tmp_path / "rows.jsonl", Rehearsed.parse)
    assert again[0] == row
    assert again[1].rehearsal.chosen is None
    np.testing.assert_array_equal(again[1].rehearsal.harms["static:half"], (np.nan, 0.01))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"case": "case"}) + "\n")
    with pytest.raises(ValueError, match=r"out: line 1 of .*rows\.jsonl is not a result"):
        json_lines.read(tmp_path / "rows.jsonl", Rehearsed.parse)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--cases resnte14-weak", "'resnte14-weak' matches none of lite0-cifar10"),
        ("--seeds 1 --full-seeds 2", "got 1 and 2, expected at least one seed"),
        ("--shares 0.1 1.5", "expected shares above 0 and below 1"),
        (
            "--shares 0.1 0.002 --cases lite0* vgg9-bn-good",
            "--shares: got 0.002, which is none of the 200 steps of lite0",
        ),
    ],
)
def test_the_command_line_is_checked(options, message, capsys):
    with pytest.raises(SystemExit):
        rehearsals.parse(["--data-dir", "x", *options.split()])
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("jax_defaults")
def test_a_comparison_end_to_end_is_not_run_twice(tmp_path, monkeypatch):
    run = next(run for run in runs() if run.name == f"resnet8-{FASHION.replace('/', '-')}-scratch-0")
    run = dataclasses.replace(run, steps=12, examples=80, batch_size=16, learning_rate=0.02, optimizer="sgd")
    monkeypatch.setattr(rehearsals, "cases", lambda: {"small": Case(run, 100)})
    benches = []
    monkeypatch.setattr(rehearsals, "Bench", lambda *of, **rest: benches.append(Bench(*of, **rest)) or benches[-1])
    options = f"--data-dir {tmp_path} --out {tmp_path} --cases small --seeds 1 --full-seeds 1 --shares 0.5"
    options += f" --results {tmp_path / 'tables.md'}"
    assert rehearsals.main(options.split()) == 0
    (row,) = json_lines.read(tmp_path / "rehearsals.jsonl", Rehearsed.parse)
    full = {result.strategy: result for result in json_lines.read(tmp_path / "results.jsonl", Result.parse)}
    assert list(full) == ["never", *rehearsals.PLAN]
    assert row.rehearsal.steps == 6
    (bench,) = benches
    # A rehearsal costs what the runs cost, of half the length, and three evaluations on a fifth of the 80 examples;
    # what is frozen from the first step on is frozen in a larger share of fewer steps.
    runs_alone = row.compute - 3 * bench.forward_share(16)
    expected = (full["never"].compute + full["static:half"].compute) / 2
    assert expected < runs_alone == pytest.approx(expected, rel=0.1)
    text = (tmp_path / "tables.md").read_text()
    assert "| small | 1 | " in text

    # It is what a run of so few steps on the other examples comes to.
    train = bench.data.train
    bench.data = bench.data._replace(train=train[:64], held_out=train[64:])
    shorter = bench.trial("shorter", strategies()["never"]._replace(length=0.5), 0, predictor=None)
    assert shorter.loss == pytest.approx(row.rehearsal.never, rel=1e-6)

    monkeypatch.setattr(rehearsals, "Bench", None)
    assert rehearsals.main(options.split()) == 0
    assert (tmp_path / "tables.md").read_text() == text
