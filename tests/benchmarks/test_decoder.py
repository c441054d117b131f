"""The comparison of ways to fine-tune a decoder: every kind at a tiny size, where it goes on, and its page."""

import subprocess
from types import SimpleNamespace

import pytest

from benchmarks.decoder import __main__ as command
from benchmarks.decoder import memory, rates, report, run
from research import json_lines

ROW = {
    "strategy": "full", "seed": 0, "tune": False, "rate": 1e-4, "tiny": False, "data": "glue/mrpc",
    "versions": "jax", "steps": 100,
    "perplexity_before": 30.0, "perplexity": 20.0, "loss": 3.0, "flops": 2e12, "compiled_bytes": 2**30,
    "resident_bytes": 2**31, "seconds": 120.0, "compile_seconds": 60.0, "programs": 1, "commit": "abc",
}  # fmt: skip


@pytest.mark.slow
def test_adapters_and_frozen_sets_learn_with_less_work(jax_defaults):
    rows = {name: run.measure(name, run.tiny(0), rate=3e-4, steps=4, seed=0) for name in ("full", "badam", "lora")}
    for row in rows.values():
        assert row["perplexity"] < row["perplexity_before"]
        assert 0 < row["compile_seconds"] < row["seconds"]
        assert row["compiled_bytes"] < row["resident_bytes"]
    for field in ("flops", "compiled_bytes"):
        assert max(rows["lora"][field], rows["badam"][field]) < 0.9 * rows["full"][field]
    assert [row["programs"] for row in rows.values()] == [1, 2, 1]


def test_what_is_done_is_skipped_and_what_failed_is_told(tmp_path, monkeypatch, capsys):
    argv = ["--tiny", "--seeds", "2", "--steps", "3", "--only", "full", "lora", "--out", str(tmp_path / "rows.jsonl")]
    args = command.parse(argv)
    json_lines.append(args.out, {**ROW, "tiny": True, "steps": 3})
    json_lines.append(args.out, {**ROW, "tiny": False, "steps": 3, "seed": 1})
    tried = [("full", rate, perplexity) for rate, perplexity in zip((3e-5, 1e-4, 3e-4), (9.0, 7.0, 8.0), strict=True)]
    for name, rate, perplexity in [*tried, ("lora", 3e-4, 9.0), ("lora", 1e-3, 9.5)]:
        row = {**ROW, "strategy": name, "tune": True, "rate": rate, "perplexity": perplexity, "tiny": True}
        json_lines.append(args.out, row)
    assert rates.best(command.read(args), "full") == 1e-4
    assert rates.to_try(
        [{**ROW, "tune": True, "rate": rate, "perplexity": 1 / rate} for rate in (3e-5, 1e-4, 3e-4)], "full"
    ) == [1e-3]
    runs = [("lora", 0, None), ("full", 1, None), ("lora", 1, None)]
    assert command.missing(args) == [("lora", 0, 3e-3), *runs]
    with pytest.raises(ValueError, match=r"lora has no learning rate: \[0.003\] are not tried"):
        command.main([*argv, "--task", "lora/0/"])

    codes = iter([0, 0, 1, 0])
    called = []

    def ran(command, **kwargs):
        called.append(command[-1])
        return SimpleNamespace(returncode=next(codes))

    monkeypatch.setattr(subprocess, "run", ran)
    assert command.main(argv) == 1
    assert called == ["lora/0/0.003", "lora/0/", "full/1/", "lora/1/"]
    assert "full, seed 1: failed with exit code 1" in capsys.readouterr().out

    def late(command, timeout, **kwargs):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", late)
    assert command.main(argv) == 0
    assert "lora, seed 0, rate 0.003: stopped, the time is up" in capsys.readouterr().out


def test_page():
    paper = [memory.Row("Big", 8, "nothing", memory.Memory(2**30, 2**30, 2**31, 2**30, 0, 0))]
    assert "Not run yet" in report.page([{**ROW, "tiny": True}], paper)
    tried = {**ROW, "tune": True, "perplexity": 99.0}
    text = report.page([ROW, {**ROW, "seed": 1, "perplexity": 22.0}, tried, {**tried, "rate": 3e-5}], paper)
    assert "| `full` | 3e-05: 99.00, 0.0001: 99.00 |" in text
    assert "| `full` | 0.0001 | 2 | 21.00 | 2.00 | 1.00 | 2.00 | 2.0 | 2.0 | 1.0 | 1 |" in text
    assert "Not run yet" not in text
    assert "| nothing | 1.0 | 1.0 | 2.0 | 1.0 | 0.0 | 5.0 | 100% | 0.0 |" in text


def test_runs_of_other_lengths_have_lines_of_their_own():
    text = report.measured([ROW, {**ROW, "steps": 20, "perplexity": 28.0}])
    lines = [line for line in text.splitlines() if line.startswith("| `full`")]
    assert [line.split(" | ")[:4] for line in lines] == [
        ["| `full`, 20 steps", "0.0001", "1", "28.00"],
        ["| `full`, 100 steps", "0.0001", "1", "20.00"],
    ]
    assert "20 or 100 steps on glue/mrpc" in text


def test_page_and_guide_have_the_results():
    text = report.measured(json_lines.read_with_commit(command.RESULTS))
    assert text in command.PAGE.read_text()
    guide = (command.PAGE.parents[1] / "guides/language-models.md").read_text()
    shown = [line for line in guide.splitlines() if line.startswith("| `")]
    assert len(shown) == 5
    assert not set(shown) - set(text.splitlines())
