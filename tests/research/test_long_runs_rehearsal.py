"""A rehearsal before a long run: what it trains on, what it costs, and what goes by it."""

from types import SimpleNamespace

import numpy as np
import pytest

from research import json_lines
from research.long_runs import __main__ as queue
from research.long_runs import rehearsal
from research.long_runs.__main__ import jobs
from research.long_runs.cases import CASES
from research.long_runs.rehearsal import COSTS, PLAN, going_by, rehearse
from research.long_runs.report import lines, page
from research.long_runs.run import REHEARSAL, Job, Runner
from research.long_runs.strategies import CACHED
from research.trials.classification import losses_on
from tests.research.tiny_bench import tiny_bench

pytestmark = pytest.mark.usefixtures("jax_defaults")

_JOB = Job("tiny", REHEARSAL, 1, 0.05)
_CASE = "lite0-cifar10"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return tiny_bench(tmp_path_factory.mktemp("state"))


@pytest.mark.slow
def test_a_rehearsal_is_judged_by_examples_that_no_step_sees(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "_SHARE", 0.25)
    fed, feed = set(), bench.feed

    def watched(*args, **options):
        batches = feed(*args, **options)

        def call(step, *, frozen):
            (inputs, labels), options = batches(step, frozen=frozen)
            fed.update(image.tobytes() for image in inputs[0])
            return (inputs, labels), options

        return call

    monkeypatch.setattr(bench, "feed", watched)
    monkeypatch.setattr(bench, "case", bench.case._replace(augment=False))
    row = rehearse(bench, _JOB, state=tmp_path)
    held_out = bench.held_out(tuning=True)
    assert len(held_out) == row["held_out"] == 10
    assert len(fed) > 60
    assert not fed & {image.tobytes() for image in held_out.inputs[0]}
    told = row["rehearsal"]
    assert told["start"] == pytest.approx(losses_on(bench.model(1), held_out)[0].mean(), rel=1e-5)
    assert told["steps"] == row["steps"] == 10
    assert told["harms"].keys() == {PLAN.rehearsed}
    assert told["never"] != told["start"]
    assert not list(tmp_path.iterdir())
    # never, and the half frozen behind the first step, and three evaluations
    whole = row["steps"] * bench.account.flops().total
    assert 1.5 * whole < row["flops"] < 2 * whole
    assert min(row[cost] for cost in COSTS) > 0


@pytest.mark.parametrize("diverges", [False, True])
def test_a_rehearsal_costs_both_runs_and_three_evaluations(bench, tmp_path, monkeypatch, diverges):
    frozen, judged = [], []

    def run(runner):
        frozen.append(runner.freezer.sets_to_come(2)[-1].names)
        assert runner.total_steps == 2
        for cost in COSTS:
            setattr(runner.tally, cost, 10.0)
        return True

    def judge(model, examples):
        judged.append(len(examples))
        return np.full(len(examples), 2.0 - (len(judged) > 1) + diverges * (len(judged) > 2)), None

    monkeypatch.setattr(Runner, "run", run)
    monkeypatch.setattr(rehearsal, "losses_on", judge)
    monkeypatch.setattr(rehearsal, "_JUDGED_BY", 7)
    row = rehearse(bench, _JOB, state=tmp_path)
    assert judged == [7, 7, 7]
    assert frozen[0] == frozenset()
    assert 0.3 < sum(bench.costs[name] for name in frozen[1]) / sum(bench.costs.values()) <= 0.5
    assert row["rehearsal"]["chosen"] == (None if diverges else PLAN.rehearsed)
    assert row["decide_seconds"] == row["wait_seconds"] == 20
    forward = sum(bench.costs.values()) / bench.case.batch_size
    assert row["flops"] == pytest.approx(20 + 3 * 7 * forward)
    assert 20 < row["train_seconds"] < 30  # two runs, and the seconds that judging takes here


def _row(strategy, seed, accuracy=0.9, **fields):
    costs = dict.fromkeys(COSTS, 100.0)
    return {"case": _CASE, "strategy": strategy, "seed": seed, "accuracy": accuracy, "steps": 50, "frozen": [],
            **costs, **fields}  # fmt: skip


def _rehearsal(seed, chosen, harm=0.1):
    told = {"chosen": chosen, "harms": {PLAN.rehearsed: [harm, 0.01]}}
    row = _row(REHEARSAL, seed, rehearsal=told, **dict.fromkeys(COSTS, 8.0))
    return {name: value for name, value in row.items() if name != "accuracy"}


def test_a_line_is_the_strategy_that_a_rehearsal_leads_to_and_its_price():
    rows = [_row("never", seed) for seed in range(4)]
    rows += [_rehearsal(0, PLAN.rehearsed), _rehearsal(1, None), _rehearsal(2, None), _rehearsal(5, None)]
    rows += [_row(PLAN.ready, seed, 0.8, **dict.fromkeys(COSTS, 40.0)) for seed in range(2)]
    rows += [_row(PLAN.otherwise, seed, 0.85, **dict.fromkeys(COSTS, 60.0)) for seed in range(2)]
    rows += [_row(PLAN.otherwise + CACHED, 2, 0.88, **dict.fromkeys(COSTS, 50.0))]
    found = {line.strategy: line for line in lines(rows, _CASE)}
    plain, cached = found[REHEARSAL], found[REHEARSAL + CACHED]
    assert (plain.seeds, cached.seeds) == (2, 1)
    assert (plain.flops, plain.time, plain.cpu) == pytest.approx((0.58, 0.58, 0.58))  # of 0.48 and 0.68
    assert (cached.flops, cached.difference) == pytest.approx((0.58, -2))
    assert plain.difference == pytest.approx(-7.5)
    assert going_by({}, {}) == {}
    text = page([row | {"commit": "a", "versions": "b", "hardware": "c"} for row in rows])
    assert "is harmless with 1 of 4 seeds" in text
    assert page([_rehearsal(0, None)]) == page([])  # nothing to compare with yet


def test_a_rehearsal_runs_once_at_the_rate_of_never():
    rows = [
        {"case": _CASE, "strategy": "tune", "seed": 0, "rate": rate, "accuracy": rate} for rate in CASES[_CASE].rates
    ]
    (job,) = jobs(rows, [_CASE], range(1), [REHEARSAL])
    assert job == Job(_CASE, REHEARSAL, 0, max(CASES[_CASE].rates))
    assert job.tuning
    assert list(jobs([*rows, _rehearsal(0, None)], [_CASE], range(1), [REHEARSAL])) == []


def test_the_queue_runs_what_is_missing_once(tmp_path, monkeypatch):
    watched, left = [], []

    class Fake:
        total_steps = 1

        def __init__(self, bench, job, strategy, **options):
            self._row = {"case": job.case, "strategy": job.name, "seed": job.seed, "rate": job.rate, "accuracy": 0.5}

        def watch(self, strategies):
            watched.append(list(strategies))

        def run(self):
            return True

        def result(self):
            return self._row

        def rows_of_followers(self, row):
            return [row | {"strategy": "simfreeze"}] if row["strategy"] == "never" else []

        def clean_up(self):
            left.append(len(json_lines.read(results, dict)))

    results = tmp_path / "results.jsonl"
    monkeypatch.setattr(queue, "Runner", Fake)
    monkeypatch.setattr(queue, "_bench", lambda args, case: SimpleNamespace(case=CASES[case]))
    monkeypatch.setattr(queue, "rehearse", lambda bench, job, state: _rehearsal(job.seed, None))
    wanted = ["never", "simfreeze", REHEARSAL, "progress,cached"]
    args = ["--data-dir", tmp_path, "--state", tmp_path, "--results", results, "--seeds", 1, "--cases", _CASE]
    for _ in range(2):
        assert queue.main([*map(str, args), "--strategies", *wanted]) == 0
    rates = len(CASES[_CASE].rates)
    assert [row["strategy"] for row in json_lines.read(results, dict)] == ["tune"] * rates + wanted
    assert watched == [["never", "simfreeze", "progress,cached"]]
    assert left == [*range(1, rates + 1), rates + 2, rates + 4]  # cleaned up when all is written
