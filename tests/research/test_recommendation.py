"""What README recommends is what the long runs say."""

from pathlib import Path

import pytest

from research import json_lines
from research.long_runs.__main__ import RESULTS
from research.long_runs.cases import CASES
from research.long_runs.report import lines

ROWS = json_lines.read(RESULTS, dict)
README = (Path(__file__).parents[2] / "README.md").read_text()
RECOMMENDED = "static:half,none:0.35"  # the schedule of ``auto``, see tests/policies/test_auto.py
RUN = {
    name: found
    for name, case in CASES.items()
    if case.weights and RECOMMENDED in (found := {line.strategy: line for line in lines(ROWS, name)})
}


@pytest.mark.parametrize("case", RUN)
def test_the_recommended_policy_loses_next_to_nothing(case):
    assert RUN[case][RECOMMENDED].difference >= -0.2


@pytest.mark.parametrize("case", RUN)
def test_it_is_ahead_of_the_shorter_schedules_that_were_run(case):
    shorter = [line for name, line in RUN[case].items() if name.startswith("shorter")]
    assert shorter
    assert all(line.difference < RUN[case][RECOMMENDED].difference for line in shorter)


@pytest.mark.parametrize(
    ("begin", "case", "strategy"),
    [
        ("ResNet-20 from ", "resnet20-cifar10-3-epochs", RECOMMENDED),
        ("the same, waits until 80 %", "resnet20-cifar10-3-epochs", "static:half,none:0.8"),
        ("EfficientNet-Lite0 from ", "lite0-cifar10-3-epochs", RECOMMENDED),
    ],
)
def test_the_front_page_has_its_figures(begin, case, strategy):
    line = RUN[case][strategy]
    error = "" if line.seeds == 1 else f" ± {line.error:.2f}"
    row = next(row for row in README.splitlines() if row.startswith(f"| {begin}"))
    assert row.endswith(f" | {line.flops:.2f} | {line.cpu:.2f} | {line.difference:+.2f}{error} |")
    assert f"{('no', 'one', 'two', 'three', 'four', 'five', 'six')[line.seeds]} seed" in row


def test_it_says_how_many_fine_tunings_there_are():
    assert f"{('no', 'one', 'two', 'three', 'four')[len(RUN)]} fine-tuning" in README
