"""The paper's tables: what it says, which runs make them again, and the page with both."""

import argparse
import re
from functools import partial
from pathlib import Path

import pytest

from models.deit import deit_tiny
from research import json_lines
from research.long_runs.__main__ import RESULTS as LONG_RUNS
from research.long_runs.__main__ import figure_of, jobs
from research.long_runs.cases import CASES
from research.long_runs.strategies import STRATEGIES
from research.reproduce import __main__ as script
from research.reproduce import runs
from research.reproduce.page import page
from research.reproduce.paper import FULL, TABLES
from research.reproduce.plans import PLANS, Setup
from train import networks
from train.log import Evaluation, Run
from train.options import parse

PAPER = Path(__file__).parents[4] / "shared" / "paper" / "smartfrz_paper.txt"


@pytest.mark.skipif(not PAPER.exists(), reason="the text of the paper is not beside the repository")
def test_the_figures_are_the_papers():
    text = PAPER.read_text()
    for number, rows in TABLES.items():
        for said in rows:
            assert said.accuracy is None or re.search(rf"\b{said.accuracy:.2f}\\?%", text), (number, said)
            for value in (said.time, said.tflops):
                assert value is None or f"{value:,.0f}" in text, (number, said)


def test_every_table_is_planned():
    assert {int(name.removeprefix("table")) for name in PLANS} == set(range(1, 10)) == TABLES.keys()


@pytest.mark.parametrize("name", PLANS)
def test_plans_name_what_there_is(name, tmp_path):
    plan = PLANS[name]
    said = {row.method for row in TABLES[int(name.removeprefix("table"))]}
    assert set(plan.cases) <= CASES.keys()
    assert set(plan.strategies) <= STRATEGIES.keys()
    assert set(plan.strategies.values()) == (said if plan.cases else set())
    assert set(plan.policies) - {FULL} == (said - {FULL} if plan.setups else set())
    for run in (*runs.missing([plan], [], 1), *runs.missing([plan], [], 1, "cpu")):
        options = parse(run.options(tmp_path, tmp_path, tmp_path))
        assert options.run.seed == 0
        assert options.policy.policy in {"never", "freezeout", "autofreeze", "smartfrz"}


def test_what_is_trained_is_known_by_its_network_and_data():
    known = {}
    for plan in PLANS.values():
        for setup in (*plan.setups, *plan.small):
            assert known.setdefault((setup.network, setup.data), setup) == setup


def test_what_is_finished_is_not_run_again():
    plan = PLANS["table8"]
    every = list(runs.missing([plan], [], 2))
    assert len(every) == 8
    assert [run.seed for run in every] == [0] * 4 + [1] * 4
    first = every[0]
    row = dict(zip(("network", "data", "method", "seed"), first.key, strict=True))
    assert list(runs.missing([plan], [row], 2)) == every[1:]


def test_on_this_scale_the_queue_has_the_strategies_of_the_table():
    rows = [
        {"case": "resnet20-cifar10", "strategy": "tune", "seed": 0, "rate": rate, "accuracy": 1}
        for rate in CASES["resnet20-cifar10"].rates
    ]
    names = ("never", *PLANS["table9"].strategies)
    assert [job.name for job in jobs(rows, ["resnet20-cifar10"], range(1), names)] == list(names)


@pytest.mark.slow
def test_a_table_by_train_finetune_with_few_blocks_and_images(shared, tmp_path, monkeypatch, jax_defaults):
    """Runs, is called again without running anything, and the page has the figures."""
    monkeypatch.setattr(networks, "deit_tiny", partial(deit_tiny, depth=1))
    options = ["--model", "deit-tiny", "--data", "cifar10", "--image-size", "16", "--epochs", "1", "--batch-size", "8"]
    options += ["--train-split", "train[:16]", "--evaluation-split", "test[:8]", "--mesh", "data=1"]
    plan = PLANS["table8"]
    two = dict(list(plan.policies.items())[:2])
    plan = plan._replace(setups=(Setup("tiny", "CIFAR-10", tuple(options), {}),), policies=two)
    monkeypatch.setitem(PLANS, "table8", plan)
    results = tmp_path / script.ROWS
    argv = ["table8", "--scale", "paper", "--data-dir", str(shared / "data/tfds"), "--weights", str(tmp_path)]
    argv += ["--state", str(tmp_path / "state"), "--seeds", "1", "--out", str(tmp_path)]
    assert script.main(argv) == 0
    rows = json_lines.read(results, dict)
    assert [row["method"] for row in rows] == list(two)
    assert all(row["tflops"] > 0 and row["seconds"] > 0 for row in rows)
    before = results.read_text()
    assert script.main(argv) == 0
    assert results.read_text() == before
    text = (tmp_path / "results.md").read_text()
    assert f"| tiny | CIFAR-10 | t0 0.3 | 1 | {rows[0]['percent']:.2f} |" in text


@pytest.mark.slow
def test_what_cannot_run_is_said_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PLANS, "table9", PLANS["table9"]._replace(policies={"M 2": ("--policy", "never")}))
    argv = ["table9", "--scale", "paper", "--data-dir", str(tmp_path / "nowhere"), "--weights", str(tmp_path)]
    argv += ["--state", str(tmp_path / "state"), "--seeds", "2"]
    assert script.main([*argv, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("nowhere is not a directory") == 2
    assert not (tmp_path / script.ROWS).exists()


@pytest.mark.parametrize("minutes", [60.0, 0.0])
def test_each_queue_has_rows_of_its_own_and_begins_nothing_when_the_time_is_up(minutes, tmp_path, monkeypatch):
    asked, predictors = {}, []
    monkeypatch.setattr(
        script.long_runs, "main", lambda argv: asked.update(long=argv[argv.index("--results") + 1]) or 0
    )
    monkeypatch.setattr(script.runs, "work", lambda plans, *, results, **_: asked.update(own=results) or 0)
    monkeypatch.setattr(script.make.Workshop, "predictor", lambda self, setting, names: predictors.append(setting))
    folders = {"data_dir": tmp_path, "weights": tmp_path, "state": tmp_path, "out": tmp_path}
    given = {"names": ["table2", "table4"], "scale": "cpu", "seeds": 1, "minutes": minutes}
    assert script._run(argparse.Namespace(**folders, **given, results=tmp_path / "long.jsonl")) == 0
    assert asked == {"long": str(tmp_path / "long.jsonl"), "own": tmp_path / script.ROWS}
    assert predictors == (list(PLANS["table4"].settings) if minutes else [])


def test_no_predictor_is_made_for_a_table_that_is_finished(tmp_path, monkeypatch):
    predictors = []
    monkeypatch.setattr(script.make.Workshop, "predictor", lambda self, setting, names: predictors.append(setting))
    for run in runs.missing([PLANS["table4"]], [], 1, "cpu"):
        names = ("network", "data", "method", "seed")
        json_lines.append(tmp_path / script.ROWS, dict(zip(names, run.key, strict=True)))
    folders = {"data_dir": tmp_path, "weights": tmp_path, "state": tmp_path, "out": tmp_path}
    args = argparse.Namespace(**folders, names=["table4", "table5"], scale="cpu", seeds=1, minutes=60.0)
    monkeypatch.setattr(script.runs, "work", lambda plans, **_: 0)
    assert script._run(args) == 0
    assert predictors == list(PLANS["table5"].settings)


@pytest.mark.parametrize("figures", [{"accuracy": 0.8, "f1": 0.9, "loss": 0.5}, {"matthews": 0.6, "accuracy": 0.8}])
def test_the_figure_of_a_row_is_that_of_the_long_runs(figures):
    run = next(runs.missing([PLANS["table6"]], [], 1))
    row = runs.row_of(run, Run("never", ("a",), evaluations=[Evaluation(1, figures)]))
    assert row["metric"] == figure_of(figures)
    assert row["percent"] == 100 * figures[row["metric"]]


def test_figures_of_several_seeds_have_their_standard_error():
    setup = PLANS["table8"].setups[0]
    rows = [
        {"network": setup.network, "data": setup.data, "method": "t0 0.3", "seed": seed, "percent": percent}
        for seed, percent in enumerate((90.0, 92.0))
    ]
    assert f"| {setup.network} | {setup.data} | t0 0.3 | 2 | 91.00 ± 1.00 | - | - |" in page([], rows)


def test_a_table_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        script.main(["table99"])
    assert "NAME: got table99, expected some of table1," in capsys.readouterr().err


def test_the_page_is_that_of_the_results():
    rows = (json_lines.read(LONG_RUNS, dict), json_lines.read(script.FOLDER / script.ROWS, dict))
    assert (script.FOLDER / "results.md").read_text() == page(*rows)
