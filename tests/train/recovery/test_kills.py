"""Processes killed at drawn moments, gone on with, and compared bit for bit; ``benchmarks.kills`` has more of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kills import report
from benchmarks.kills.campaign import cases, moments

PAGE = Path(__file__).parents[3] / "docs/benchmarks/reliability.md"
RESULTS = Path(report.__file__).with_name("results.jsonl")


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path):
    command = [
        sys.executable, "-m", "benchmarks.kills", "--out", str(tmp_path / "runs"),
        "--results", str(tmp_path / "results.jsonl"), "--policies", "static_prefix", "--cases", "1", "--kills", "4",
    ]  # fmt: skip
    env = os.environ | {"XLA_FLAGS": ""}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    entries = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert report.lost(entries) == []
    assert len(report.ended(entries, "SIGKILL")) >= 2
    assert [one["code"] for one in report.ended(entries, "SIGTERM")] == [75]
    assert entries[-1]["freezes"] > 0


def test_moments_are_drawn_for_each_case_alone():
    assert len(set(cases())) == len(cases()) >= 28
    for case in cases():
        drawn = moments(case, seed=0, number=5)
        assert drawn == moments(case, seed=0, number=5)
        assert [moment.signal for moment in drawn].count("SIGTERM") == 1
        assert len({moment.kind for moment in drawn}) >= 4
    assert {moment.kind for case in cases() for moment in moments(case, 0, 5)} == set(report.WHERE)


def test_what_differs_is_lost(tmp_path):
    kill = {"event": "kill", "policy": "never", "kind": "save", "signal": "SIGTERM", "code": 75}
    end = {"event": "end", "policy": "never", "returning": "kept", "keep_activations": "no", "freezes": 1, "code": 0}
    fine = [kill, kill | {"code": -9, "signal": "SIGKILL"}, kill | {"code": 0}, end | {"differs": ""}]
    bad = [kill | {"code": 1}, kill | {"code": -9}, end | {"differs": "losses"}, end | {"code": 2, "differs": ""}]
    assert report.lost(fine) == []
    assert report.lost(fine + bad) == bad
    assert "| writing a checkpoint | 1 | 1 |" in report.table(fine)
    assert "| 1 | 1 | 0 |" in report.table(fine)
    (tmp_path / "page.md").write_text(f"text\n\n{report.table(fine + bad)}")
    report.write_page(tmp_path / "page.md", fine)
    assert (tmp_path / "page.md").read_text() == f"text\n\n{report.table(fine)}\n"


def test_the_page_has_what_was_tried():
    entries = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    assert report.table(entries) in PAGE.read_text()
