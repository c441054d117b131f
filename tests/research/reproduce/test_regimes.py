"""The map of regimes and savings: what counts as saved, and what it says is not run."""

import math

from research import json_lines
from research.long_runs.__main__ import RESULTS
from research.reproduce import __main__ as script
from research.reproduce.regimes import Point, best, closed_loop, page, regimes


def test_the_cheapest_that_loses_little_is_taken():
    points = [Point("a", 0.8, -0.1, 0.1), Point("b", 0.6, -0.2, 0.1), Point("c", 0.3, -0.3, 0.1)]
    points += [Point("shorter:0.5", 0.5, 0.4, math.nan)]
    assert best(points, shorter=False) == points[1]
    assert best(points, shorter=True) == points[3]
    assert best(points[2:3], shorter=False) is None


def test_points_of_the_raw_table():
    found = {point.strategy: point for point in closed_loop("lite0-cifar10")}
    assert found["smartfrz:0.95"] == Point("smartfrz:0.95", 0.92, -0.17, 0.10)
    assert "never" not in found
    assert len(found) == 25


def test_cases_without_rows_are_not_run_and_have_none():
    every = {one.case: one for one in regimes([])}
    assert (every["resnet20-cifar10"].level, every["resnet20-cifar10"].points) == ("good", ())
    assert every["resnet14-weak (closed loop)"].level == "weak"
    text = page([])
    assert "| resnet20-cifar10 |" not in text
    assert "| resnet14-weak (closed loop) |" in text
    assert "| weak | not run | not run | not run |" in text


def test_the_processors_time_of_a_long_run_is_told():
    costs = {"decide_seconds": 0.0, "wait_seconds": 0.0, "steps": 10, "frozen": []}
    rows = [
        {"case": "resnet20-cifar10", "seed": 0, "strategy": name, "accuracy": 0.9, "flops": flops} | costs | time
        for name, flops, time in (
            ("never", 4.0, {"train_seconds": 1.0, "train_cpu_seconds": 1.0}),
            ("progress", 3.0, {"train_seconds": 0.7, "train_cpu_seconds": 0.6}),
        )
    ]
    row = "| good | resnet20-cifar10 | all | 10 | `progress` | 25 % | 40 % | +0.00 (one seed) | not run | - | - | - |"
    assert row in page(rows)


def test_the_page_is_that_of_the_results():
    assert (script.FOLDER / "regimes.md").read_text() == page(json_lines.read(RESULTS, dict))
