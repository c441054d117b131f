"""Processes killed at drawn moments, gone on with, and compared bit for bit; ``benchmarks.kills`` has more of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kills import campaign, pairs, report
from benchmarks.kills.campaign import cases, moments

PAGE = Path(__file__).parents[3] / "docs/benchmarks/reliability.md"
RESULTS = Path(report.__file__).with_name("results.jsonl")


# Without delays, so that no run is over before it is killed.
_SCRIPT = """
import sys
from benchmarks.kills import __main__, campaign
from benchmarks.kills.victim import Moment

kills = Moment("step", 4, 0.0), Moment("save", 1, 0.0, "SIGTERM"), Moment("freeze", 1, 0.0), Moment("end", 1, 0.0)
campaign.moments = lambda *_: kills
sys.exit(__main__.main())
"""


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path):
    command = [
        sys.executable, "-c", _SCRIPT, "--out", str(tmp_path / "runs"),
        "--results", str(tmp_path / "results.jsonl"), "--policies", "static_prefix", "--cases", "1",
    ]  # fmt: skip
    env = os.environ | {"XLA_FLAGS": ""}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    entries = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert report.lost(entries) == []
    assert [one["code"] for one in entries] == [-9, 75, -9, -9, 0]
    assert [one["checkpoint"] > 0 for one in entries[:-1]] == [False, True, True, True]
    assert entries[-1]["freezes"] > 0


def begun(argv, moment):
    """In place of ``train.finetune``, which begins a folder and refuses one that was begun; its exit code."""
    out = Path(argv[argv.index("--out") + 1])
    if out.exists() and "--resume" not in argv:
        return 2
    out.mkdir(exist_ok=True)
    (out / "log.jsonl").touch()
    return -9 if moment else 0


@pytest.mark.parametrize("one", [campaign, pairs])
def test_a_case_in_whose_midst_a_campaign_was_stopped_is_tried_anew(tmp_path, monkeypatch, one):
    case = next(case for case in one.cases() if case.policy == "similarity_guided")
    monkeypatch.setattr(campaign, "in_process", lambda work, output: work())
    monkeypatch.setattr(campaign, "run", lambda argv, moment, **_: begun(argv, moment))
    monkeypatch.setattr(pairs, "_both", lambda argv, kill: ([begun(argv, kill)] * 2, 0.0))
    monkeypatch.setattr(campaign, "end_of", lambda alone, killed: {})
    for _ in range(2):
        entries = list(one.try_case(case, one.moments(case, 0, 2), tmp_path))
        codes = [entry["codes"][0] if "codes" in entry else entry["code"] for entry in entries]
        assert codes == [-9, -9, 0]


def test_moments_are_drawn_for_each_case_alone():
    assert len(set(cases())) == len(cases()) >= 28
    for case in cases():
        drawn = moments(case, seed=0, number=5)
        assert drawn == moments(case, seed=0, number=5)
        assert [moment.signal for moment in drawn].count("SIGTERM") == 1
        assert len({moment.kind for moment in drawn}) >= 4
    assert {moment.kind for case in cases() for moment in moments(case, 0, 5)} == set(report.WHERE)


def test_of_two_processes_each_is_killed_and_both():
    assert len({pair.policy for pair in pairs.cases()}) >= 8
    for pair in pairs.cases():
        drawn = pairs.moments(pair, seed=0, number=5)
        assert drawn == pairs.moments(pair, seed=0, number=5)
        assert all(0 in kill.of for kill in drawn if kill.moment.kind == "end")
    assert {kill.of for pair in pairs.cases() for kill in pairs.moments(pair, 0, 5)} == {(0,), (1,), (0, 1)}


KILL = {"event": "kill", "policy": "never", "kind": "save", "signal": "SIGTERM"}
END = {"event": "end", "policy": "never", "returning": "kept", "keep_activations": "no", "freezes": 1, "differs": ""}
SIGKILL = KILL | {"signal": "SIGKILL", "seconds": 21.0}
FINE = {
    1: [KILL | {"code": 75}, KILL | {"code": -9, "signal": "SIGKILL"}, KILL | {"code": 0}, END | {"code": 0}],
    2: [
        KILL | {"of": [1], "codes": [75, 75], "seconds": 2.0, "processes": 2},
        SIGKILL | {"of": [1], "codes": [-6, -9], "processes": 2},
        SIGKILL | {"of": [0, 1], "codes": [-9, -9], "processes": 2},
        SIGKILL | {"of": [0], "codes": [0, 0], "processes": 2},
        END | {"codes": [0, 0], "processes": 2},
    ],
}
BAD = {
    1: [KILL | {"code": 1}, KILL | {"code": -9}, END | {"code": 0, "differs": "losses"}, END | {"code": 2}],
    2: [
        KILL | {"of": [1], "codes": [75, 1], "seconds": 2.0, "processes": 2},
        SIGKILL | {"of": [1], "codes": [0, -9], "processes": 2},
        SIGKILL | {"of": [1], "codes": [-6, -9], "processes": 2, "seconds": 61.0},
        SIGKILL | {"of": [0], "codes": [-6, -6], "processes": 2},
        END | {"codes": [0, 1], "processes": 2},
    ],
}


@pytest.mark.parametrize("processes", [1, 2])
def test_what_differs_or_does_not_end_is_lost(processes):
    assert report.lost(FINE[processes]) == []
    assert report.lost(FINE[processes] + BAD[processes]) == BAD[processes]


def test_the_page_is_written_anew(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"text\n\n{report.HEADINGS[1]}\n\nother tables")
    report.write_page(page, FINE[1] + FINE[2])
    text = page.read_text()
    one, two = text.split(report.HEADINGS[2])
    assert one.startswith(f"text\n\n{report.HEADINGS[1]}\n\n| killed in")
    assert "| writing a checkpoint | 1 | 1 |" in one
    assert "| writing a checkpoint | 2 | 1 |" in two
    assert "| the second | 1 | 21 |" in two
    report.write_page(page, FINE[1] + FINE[2])
    assert page.read_text() == text


def test_the_page_has_what_was_tried():
    entries = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    for processes, heading in report.HEADINGS.items():
        assert f"{heading}\n\n{report.table(report.of_runs(entries, processes))}\n" in PAGE.read_text()
