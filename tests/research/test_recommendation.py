"""What README recommends is what the long runs say."""

import math
from pathlib import Path

import pytest

from research import json_lines
from research.long_runs.__main__ import RESULTS
from research.long_runs.cases import CASES
from research.long_runs.pairs import kept_activations
from research.long_runs.report import lines
from research.reproduce.regimes import level_of

ROWS = json_lines.read(RESULTS, dict)
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs" / "choose-a-policy.md").read_text()
LONG_RUNS = (ROOT / "docs" / "results" / "long-runs.md").read_text()
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
RECOMMENDED = "static:half,none:0.35"  # the schedule of ``auto``, see tests/policies/test_auto.py
FOUND = {name: {line.strategy: line for line in lines(ROWS, name)} for name in CASES}
# Those of networks that are well pre-trained, for which it is recommended.
RUN = {
    name: FOUND[name]
    for name, case in CASES.items()
    if RECOMMENDED in FOUND[name] and level_of(case) in ("good", "strong")
}
WEAK = "resnet20-cifar10-weak-3-epochs"


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
        ("the same, three quarters wait", "resnet20-cifar10-3-epochs", "static:three-quarters,half:0.5,none:0.8"),
        ("that in ten epochs", "resnet20-cifar10", "static:three-quarters,half:0.5,none:0.8"),
        ("EfficientNet-Lite0 from ", "lite0-cifar10-3-epochs", RECOMMENDED),
    ],
)
def test_the_front_page_has_its_figures(begin, case, strategy):
    line = next(line for line in lines(ROWS, case) if line.strategy == strategy)
    error = "" if line.seeds == 1 else f" ± {line.error:.2f}"
    row = next(row for row in README.splitlines() if row.startswith(f"| {begin}"))
    assert row.endswith(f" | {line.flops:.2f} | {line.cpu:.2f} | {line.difference:+.2f}{error} |")
    assert f"{NUMBERS[line.seeds]} seed" in row


# Rows of the page's tables of ResNet-20, as it calls them.
PAGE = {
    "front half waits until 35 %": RECOMMENDED,
    "front half waits until 60 %": "static:half,none:0.6",
    "front half waits until 80 %": "static:half,none:0.8",
    "three quarters wait until 60 %": "static:three-quarters,none:0.6",
    "three quarters wait until 50 %, half until 80 %": "static:three-quarters,half:0.5,none:0.8",
    "three quarters wait until 65 %, half until 85 %": "static:three-quarters,half:0.65,none:0.85",
    "three quarters wait until 80 %": "static:three-quarters,none:0.8",
    "three quarters wait until 80 %, half until 90 %": "static:three-quarters,half:0.8,none:0.9",
    "three quarters wait until 50 %, half throughout": "static:three-quarters,half:0.5",
    "three quarters wait until 60 %, half throughout": "static:three-quarters,half:0.6",
    "three quarters until 60 %, half until 80 %, a quarter throughout": "static:three-quarters,half:0.6,quarter:0.8",
    "three quarters until 70 %, half until 90 %, a quarter throughout": "static:three-quarters,half:0.7,quarter:0.9",
    "all but the head wait until 30 %, half until 80 %": "static:all,half:0.3,none:0.8",
    "all but the head wait until 50 %": "static:all,none:0.5",
    "front half waits until 35 %, and stops again at 75 %": "static:half,none:0.35,half:0.75",
    "front half waits, and layers stop as with `progress`": "auto:0.95",
    "front half frozen throughout": "static:half",
    "the same, all but the head from 60 %": "static:half,all:0.6",
    "`smartfrz`, the shipped predictor": "smartfrz",
    "`progress`": "progress",
    "`gain`": "gain:0.5",
    "`gain`, measured on held-out examples": "gain:0.5,apart",
    "the same, its layers may return": "gain:0.5,apart,returns",
    "the paper's predictor and rule": "paper",
    "FreezeOut, `t0` = 0.5": "freezeout",
    "AutoFreeze, four evaluations an epoch": "autofreeze",
    "shorter schedule of 85 %": "shorter:0.85",
    "shorter schedule of 70 %": "shorter:0.7",
    "three quarters until 50 %, half until 80 %, activations kept": "static:three-quarters,half:0.5,none:0.8,cached",
}
# Of ten epochs, with kept activations.
KEPT = {
    "three views": "static:three-quarters,half:0.6,cached",
    "two views": "static:three-quarters,half:0.6,cached:2",
}
AFTER_WEAK_PRETRAINING = (
    "front half waits until 35 %",
    "front half waits until 80 %",
    "three quarters wait until 60 %, half throughout",
    "front half frozen throughout",
    "`smartfrz`, the shipped predictor",
    "`progress`",
    "shorter schedule of 70 %",
)
TEN_EPOCHS = (
    "three quarters wait until 50 %, half until 80 %",
    "three quarters wait until 65 %, half until 85 %",
    "three quarters wait until 50 %, half throughout",
    "three quarters wait until 60 %, half throughout",
    "three quarters wait until 80 %, half until 90 %",
    "`gain`",
    "shorter schedule of 70 %",
)


def row_of(name, line, usual):
    """A row of the page; the usual number of seeds is not told."""
    seeds = "" if line.seeds == usual else f" ({NUMBERS[line.seeds]} seed{'s' * (line.seeds > 1)})"
    cpu = "-" if math.isnan(line.cpu) else f"{line.cpu:.2f}"
    error = "" if line.seeds == 1 else f" ± {line.error:.2f}"
    return f"| {name}{seeds} | {line.flops:.2f} | {cpu} | {line.difference:+.2f}{error} |"


@pytest.mark.parametrize("name", PAGE)
def test_the_page_of_long_runs_has_its_figures(name):
    assert row_of(name, RUN["resnet20-cifar10-3-epochs"][PAGE[name]], 3) in LONG_RUNS.splitlines()


@pytest.mark.parametrize("name", TEN_EPOCHS)
def test_it_has_those_of_ten_epochs(name):
    found = {line.strategy: line for line in lines(ROWS, "resnet20-cifar10")}
    assert row_of(name, found[PAGE[name]], 2) in LONG_RUNS.splitlines()


@pytest.mark.parametrize("name", AFTER_WEAK_PRETRAINING)
def test_it_has_those_after_weak_pre_training(name):
    assert row_of(name, FOUND[WEAK][PAGE[name]], 1) in LONG_RUNS.splitlines()


def row_of_kept(name):
    table = kept_activations(ROWS).splitlines()
    row = next(row for row in table if row.startswith(f"| resnet20-cifar10 | {KEPT[name]} | 1 |"))
    return f"| {name} |{row.partition(' | 1 |')[2]}"


@pytest.mark.parametrize("name", KEPT)
def test_it_has_those_of_kept_activations(name):
    assert row_of_kept(name) in LONG_RUNS.splitlines()


@pytest.mark.parametrize("text", [README, GUIDE])
def test_it_is_not_recommended_after_weak_pre_training(text):
    line = FOUND[WEAK][RECOMMENDED]
    assert line.difference < -1
    assert f"{-line.difference:.2f} ± {line.error:.2f} points" in " ".join(text.split())


def test_it_says_how_many_fine_tunings_there_are():
    assert f"{NUMBERS[len(RUN)]} fine-tuning" in README
