"""The run that is prepared for a GPU: all of it at tiny sizes, where it stops and goes on, and its page."""

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

import smartfrz_jax as sfj
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import plan, report
from research import json_lines

TASKS = {task.name: task for task in plan.TASKS}


@pytest.mark.slow
def test_step_time_and_memory(tmp_path, monkeypatch, jax_defaults):
    sfj.enable_compilation_cache(tmp_path)
    task = TASKS["step_time/deit_tiny"]
    row = plan.measure(task, [], tiny=True)
    assert plan.is_figure(row)
    assert [share["layers"] for share in row["shares"]] == [0, 5, 11]
    flops = [share["account_flops"] for share in row["shares"]]
    assert flops == sorted(flops, reverse=True)
    assert row["shares"][0]["over_ideal"] == 1.0
    assert all(share["ms"] > 0 and 1 / 3 <= share["ideal"] <= 1 for share in row["shares"])

    # A device that counts; the figure is the most that was in use so far.
    counts = iter([0, 10, 20, 30, 40, 50, 60])

    def memory_stats():
        count = next(counts)
        return {"bytes_in_use": count, "peak_bytes_in_use": 2 * count}

    device = SimpleNamespace(platform="gpu", device_kind="big", memory_stats=memory_stats)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    row = plan.measure(TASKS["memory/deit_tiny"], [], tiny=True)
    assert (row["platform"], row["device"]) == ("gpu", "big")
    assert [share["peak_bytes"] for share in row["shares"]] == [120, 80, 40]
    predicted = [share["predicted_bytes"] for share in row["shares"]]
    assert predicted == sorted(predicted, reverse=True)


@pytest.mark.slow
def test_kept_activations(jax_defaults):
    shares = plan.measure(TASKS["cached/deit_tiny"], [], tiny=True)["shares"]
    assert [share["layers"] for share in shares] == [5, 11]
    assert 1 > shares[0]["flops_ratio"] > shares[1]["flops_ratio"]
    assert shares[0]["bytes_per_example"] > shares[1]["bytes_per_example"] > 0


@pytest.mark.slow
def test_whole_run(tmp_path, jax_defaults):
    sfj.enable_compilation_cache(tmp_path)
    row = plan.measure(TASKS["whole_run/efficientnet_lite0"], [], tiny=True)
    never, cold, warm = row["runs"].values()
    assert (never["frozen"], never["programs"], never["waiting_seconds"]) == (0, 1, 0.0)
    assert cold["flops"] == warm["flops"] < never["flops"]
    assert row["warnings"] == []
    assert cold["programs"] == cold["ahead"] + 1 > 1


@pytest.mark.slow
def test_decisions(jax_defaults):
    row = plan.measure(TASKS["decisions/resnet50"], [], tiny=True)
    assert row["predictors"].keys() == {"default", "paper"}
    assert all(0 < one["longest_ms"] <= 1e3 * one["seconds"] for one in row["predictors"].values())


@pytest.mark.parametrize("network", ["resnet50", "mobilenetv2", "deit_tiny", "bert_base"])
@pytest.mark.slow
def test_pytorch_where_it_is_there(network, jax_defaults):
    for package in ("torch", "torchvision", "timm", "transformers"):
        pytest.importorskip(package)
    ours = plan.row_of(TASKS[f"step_time/{network}"], tiny=True, shares=[{"layers": 0}, {"layers": 3}])
    row = plan.measure(TASKS[f"pytorch/{network}"], [ours], tiny=True)
    assert [share["layers"] for share in row["shares"]] == [0, 3]


def test_pytorch_needs_to_know_which_layers():
    row = plan.measure(TASKS["pytorch/bert_base"], [], tiny=True)
    assert "step_time/bert_base" in row["skipped"]
    assert not plan.is_figure(row)


WORK = """
import sys
from benchmarks.gpu.__main__ import main
code = main(sys.argv[1:])
from jax._src import xla_bridge
print("exit code", code, "devices taken", xla_bridge.backends_are_initialized())
"""


@pytest.mark.slow
def test_every_task_is_a_process_that_needs_little_and_has_the_device_to_itself(tmp_path):
    absent = tmp_path / "absent"
    absent.mkdir()
    for package in ("tensorflow_datasets", "array_record", "grain", "tyro", "tqdm", "tokenizers", "cv2"):
        (absent / f"{package}.py").write_text("raise ImportError")
    args = ["--tiny", "--only", "memory/bert_base", "--commit", "abc"]
    args += ["--out", str(tmp_path / "out"), "--programs", str(tmp_path / "programs")]
    command_line = [sys.executable, "-c", WORK, *args]
    environment = {**os.environ, "PYTHONPATH": str(absent)}
    done = subprocess.run(command_line, env=environment, capture_output=True, text=True, check=True)
    skipped, _, last = done.stdout.splitlines()
    assert skipped == "memory/bert_base: skipped, cpu does not count its memory"
    assert last == "exit code 0 devices taken False"
    (row,) = json_lines.read_with_commit(tmp_path / "out")
    assert (row["task"], row["commit"]) == ("memory/bert_base", "abc")
    assert row["skipped"] == "cpu does not count its memory"


@pytest.fixture
def processes(monkeypatch):
    """What was run, and what becomes of each: its exit code, or an error."""
    ran, results = [], {}

    def run(command_line, **options):
        name = command_line[command_line.index("--task") + 1]
        ran.append(name)
        result = results.get(name, 0)
        if isinstance(result, Exception):
            raise result
        out = command_line[command_line.index("--out") + 1]
        if result == 0:
            json_lines.append(
                command.local_path(out), plan.row_of(TASKS[name], tiny=True, platform="cpu", commit="abc")
            )
        return subprocess.CompletedProcess(command_line, result, stderr="Traceback\nof\nthe\nerror")

    monkeypatch.setattr(subprocess, "run", run)
    return SimpleNamespace(ran=ran, results=results)


def test_it_goes_on_where_it_stopped_and_tries_what_failed_again(tmp_path, processes, capsys):
    args = ["--tiny", "--out", str(tmp_path / "out"), "--commit", "abc"]
    first, second, third, *_ = TASKS
    processes.results |= {first: 1, third: subprocess.TimeoutExpired("", 1)}
    assert command.main(args) == 1
    assert processes.ran == [first, second, third]
    assert f"{third}: stopped, the time is up" in capsys.readouterr().out
    (failed, _) = json_lines.read(tmp_path / "out", dict)
    assert failed["failed"] == "exit code 1: of / the / error"
    processes.results.clear()
    processes.ran.clear()
    assert command.main(args) == 0
    assert processes.ran == [name for name in TASKS if name != second]
    assert command.main(args) == 0
    assert len(processes.ran) == len(TASKS) - 1


def test_what_would_take_too_long_is_left(tmp_path, processes, capsys):
    args = ["--tiny", "--out", str(tmp_path / "out"), "--commit", "abc", "--minutes", "0.5"]
    assert command.main(args) == 0
    assert processes.ran == [task.name for task in plan.TASKS if task.seconds < 30]
    assert "step_time/resnet50: left for another time" in capsys.readouterr().out


def test_page_without_a_gpu_says_so():
    assert "not yet been run on a GPU" in report.page([])
    row = plan.row_of(TASKS["step_time/resnet50"], tiny=False, platform="cpu", device="cpu")
    assert report.page([{**row, "tiny": True, "platform": "gpu"}, row]) == report.page([])


def test_page_is_that_of_the_results():
    assert command.PAGE.read_text() == report.page(json_lines.read_with_commit(command.RESULTS))


def test_page_has_the_figures():
    common = {"tiny": False, "platform": "gpu", "device": "big", "commit": "abc"}
    share = {"share": 0.5, "layers": 3, "spread": 0.01, "ratio": 0.7, "ideal": 2 / 3, "over_ideal": 1.051, "ms": 70.4}
    share |= {"account_flops": 5, "compiled_flops": 4, "temp_bytes": 6, "trace_seconds": 1.0, "compile_seconds": 2.5}
    costs = {"account_flops": 10, "compiled_flops": 10, "temp_bytes": 10}
    whole = {**share, **costs, "share": 0.0, "layers": 0, "ms": 100.0, "over_ideal": 1.0}
    run = {"seconds": 10.0, "flops": 4.0, "waiting_seconds": 0.2, "compile_seconds": 9.0, "programs": 2, "ahead": 1}
    run |= {"deciding_seconds": 0.1, "accuracy": 0.876}
    kept = {"share": 0.5, "inputs_ms": 50.0, "kept_ms": 20.0, "ratio": 0.4, "flops_ratio": None}
    used = {"share": 0.5, "peak_bytes": 3 * 2**20, "predicted_bytes": 2 * 2**20}
    found = {
        "step_time/resnet50": {"all_layers": 54, "shares": [whole, share]},
        "pytorch/resnet50": {"torch": "2.13", "shares": [{"layers": 0, "ms": 200.0}, {"layers": 3, "ms": 180.0}]},
        "memory/resnet50": {"shares": [used]},
        "cached/resnet50": {"shares": [{**kept, "bytes_per_example": 4096}]},
        "whole_run/efficientnet_lite0": {
            "steps": 600,
            "lead": 60,
            "warnings": ["beware\nmore"],
            "runs": {"never": {**run, "flops": 5.0, "seconds": 12.0}, "progress": run},
        },
        "decisions/resnet50": {"steps": 1000, "predictors": {"default": {"seconds": 0.5, "longest_ms": 9.0}}},
    }
    rows = [{**plan.row_of(TASKS[name], **common), **fields} for name, fields in found.items()]
    rows.append({**plan.row_of(TASKS["pytorch/bert_base"], **common), "skipped": "no torch"})
    text = report.page(rows)
    for line in (
        "| resnet50 | 50% (3 of 54) | 70.4 | 1% | 0.70 | 0.67 | **1.05** | 0.50 | 0.40 | 0.60 | 3.5 |",
        "Warning: beware",
        "| resnet50 | 3 | 180.0 | 0.90 | 0.70 | 2.56 |",
        "| resnet50 | 50% | 3 | 2 | 1.50 |",
        "| resnet50 | 50% | 50.0 | 20.0 | 0.40 | - | 4,096 |",
        "| progress | 10.0 | 20.0% | 16.7% | 0.83 | 0.2 | 9.0 | 2 (1) | 0.10 | 87.6% |",
        "| resnet50 | default | 0.50 | 9.0 | 0.50% |",
        "- `pytorch/bert_base`: no torch",
        "- `step_time/bert_base`: not yet run",
    ):
        assert line in text.splitlines(), line
    assert "commit abc" in text
