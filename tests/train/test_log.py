"""The log of a run: read back as written, cut at a step, robust against kills; files are whole at any moment."""

import json
import math
import os

import pytest

import smartfrz_jax as sfj
from research.results import write_section
from smartfrz_jax.pytrees.file_paths import as_path
from tests.support.buckets import buckets
from train import report
from train.log import Compiled, Evaluation, Log, Phase, Run, Step, finite, read, write_whole


@pytest.fixture
def path(tmp_path):
    with Log(tmp_path / "log.jsonl", Run("freezeout", ("a", "b"), {"seed": 3})) as log:
        log.add(Compiled(1, 0, 2.0, False, 1.5, 1000))
        for step in (1, 2, 3):
            log.add(Step(step, finite(1.0 / step), 0.5, 0.25, int(step > 2), 100.0 * step, 8))
        log.add(Compiled(3, 1, 1.0, True, 0.25, 700))
        log.add(sfj.FreezeEvent(2, ("a",)))
        log.add(Evaluation(3, {"accuracy": 0.75}))
    return tmp_path / "log.jsonl"


def test_a_log_reads_back_as_written(path):
    run = read(path)
    assert (run.name, run.layers, run.settings) == ("freezeout", ("a", "b"), {"seed": 3})
    assert run.steps[1] == Step(2, 0.5, 0.5, 0.25, 0, 200.0, 8)
    assert run.freezes == [sfj.FreezeEvent(2, ("a",))]
    assert run.metrics == {"accuracy": 0.75}
    assert run.tflops == pytest.approx(600e-12)
    assert run.seconds == pytest.approx(3 * 0.5)
    assert run.compile_seconds == 3.0
    assert run.wait_seconds == 1.75
    assert run.frozen_share == pytest.approx(1 / 6)


def test_phases_are_steps_with_the_same_layers_frozen(tmp_path):
    with Log(tmp_path / "log.jsonl", Run("freezeout", ("a", "b"))) as log:
        for step, (frozen, seconds) in enumerate([(0, 4.0), (0, 1.0), (0, 2.0), (1, 0.5), (0, 3.0)], 1):
            log.add(Step(step, 1.0, seconds, 0.0, frozen, 10.0 - frozen, 80 - frozen))
        log.add(Compiled(1, 0, 1.0, False, 1.0, 500))
        log.add(Compiled(4, 1, 1.0, True, 0.0, 400))
        log.add(sfj.FreezeEvent(3, ("a",)))
        log.add(sfj.FreezeEvent(4, (), ("a",)))
    run = read(tmp_path / "log.jsonl")
    assert run.phases == log.run.phases == [
        Phase(1, 3, 0, 2.0, 10.0, 80, 500),
        Phase(4, 1, 1, 0.5, 9.0, 79, 400),
        Phase(5, 1, 0, 3.0, 10.0, 80, 500),
    ]  # fmt: skip
    assert run.freezes == log.run.freezes
    assert "| compiled programs, TFLOPs" in report.table([run])
    scanned = Run("never", ("a", "b"), {"scan": True}, steps=run.steps)
    assert "| compiled programs or predicted steps, TFLOPs" in report.table([run, scanned])
    rows = report.phases(run).splitlines()
    assert len(rows) == 5
    assert rows[3].split(" | ")[2:5] == ["1 of 2", "500.0", "0.000"]
    assert "0 of 2" in report.table([run])
    report.picture([run], tmp_path / "run.png", "run")
    assert (tmp_path / "run.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("runs", "labels"),
    [
        ((("never", "a/full"), ("progress", "a/p95")), ["never", "progress"]),
        ((("progress", "a/p95"), ("progress", "a/p50")), ["progress (p95)", "progress (p50)"]),
        ((("progress", "a/run"), ("progress", "b/run")), ["progress (a/run)", "progress (b/run)"]),
    ],
)
def test_runs_of_one_policy_are_told_apart(runs, labels, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report.plt, "close", drawn.append)
    steps = [Step(1, 1.0, 1.0, 0.0, 0, 10.0, 80)]
    runs = [Run(name, ("a",), {"out": out}, steps) for name, out in runs]
    assert [cell.strip() for cell in report.table(runs).splitlines()[0].split("|")[2:-1]] == labels
    report.picture(runs, tmp_path / "runs.png", "runs")
    (figure,) = drawn
    assert [text.get_text() for text in figure.legends[0].get_texts()] == labels
    assert figure.axes[0].get_title() == f"{labels[1]}: trains (grey: frozen)"
    assert len({line.get_color() for line in figure.axes[-1].lines}) == 2


def test_a_log_continues_from_a_step(path):
    run = read(path, until=2)
    assert [step.step for step in run.steps] == [1, 2]
    assert run.freezes
    assert not run.evaluations
    with Log(path, run) as log:
        log.add(Step(3, None, 1.0, 0.0, 1, 7.0, 8))
    again = read(path)
    assert [step.flops for step in again.steps] == [100.0, 200.0, 7.0]
    assert again.steps[-1].loss is None


def test_a_line_cut_off_by_a_kill_is_left_out(path):
    text = path.read_text()
    path.write_text(text[:-10])
    assert read(path).metrics == {}
    assert len(read(path).steps) == 3


def test_every_line_is_strict_json(path):
    assert finite(float("nan")) is None
    events = [json.loads(line, parse_constant=pytest.fail)["event"] for line in path.read_text().splitlines()]
    assert events == ["run", "program", "step", "step", "step", "program", "freeze", "evaluation"]


@pytest.mark.parametrize("text", ["", "not JSON\n", "[]\n", '{"event": "run", "name": "x"}\n', '{"event": "step"}\n'])
def test_what_is_not_a_log_is_refused(tmp_path, text):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"path: .* is not the log of a run"):
        read(tmp_path / "log.jsonl")
    with pytest.raises(FileNotFoundError, match=r"path: .* is not there"):
        read(tmp_path / "none.jsonl")


def test_a_file_is_made_renewed_and_followed_through_a_link(tmp_path):
    file, link = tmp_path / "a.md", tmp_path / "b.md"
    write_whole(file, "one")
    link.symlink_to(file)
    write_whole(link, "two")
    assert file.read_text() == "two"
    assert link.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"a.md", "b.md"}


@pytest.mark.parametrize(
    "write",
    [
        lambda file: write_whole(file, "new"),
        lambda file: Log(file, Run("never", ("a",))),
        lambda file: write_section(file, "table", "new"),
    ],
    ids=["write_whole", "Log", "write_section"],
)
def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path, monkeypatch, write):
    def killed(*names):
        raise KeyboardInterrupt

    file = tmp_path / "file"
    file.write_text("old")
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(file)
    assert file.read_text() == "old"


def test_a_log_that_cannot_be_written_anew_leaves_the_old_one(tmp_path):
    with Log(tmp_path / "log.jsonl", Run("never", ("a",))):
        pass
    with pytest.raises(TypeError, match="not JSON serializable"):
        Log(tmp_path / "log.jsonl", Run("freezeout", ("a",), {"x": object()}))
    assert read(tmp_path / "log.jsonl").name == "never"


def test_in_an_object_store_all_is_there_once_it_is_flushed(tmp_path):
    def there():
        run = read(path)
        return len(run.steps), len(run.evaluations), len(run.freezes)

    (tmp_path / "bucket").mkdir()
    with buckets(tmp_path) as bucket:
        path = as_path(f"{bucket}/log.jsonl")
        with Log(path, Run("never", ("a",))) as log:
            log.add(*(Step(step, 1.0, 1.0, 0.0, 0, 1.0, 8) for step in (1, 2)))
            log.flush()
            assert there() == (2, 0, 0)
            log.add(Step(3, 1.0, 1.0, 0.0, 0, 1.0, 8))
            log.add(Evaluation(3, {"accuracy": 0.75}))
            log.add(sfj.FreezeEvent(2, ("a",)))  # as a regression adds it
            log.flush()
            assert there() == (3, 1, 1)
            log.add(Step(4, 1.0, 1.0, 0.0, 0, 1.0, 8))
        assert there() == (4, 1, 1)


def test_callbacks_are_told_what_is_added(tmp_path):
    class Recorder:
        def on_step(self, step, metrics):
            told.append((step, dict(metrics)))

        def on_freeze(self, event):
            told.append(event)

    told, before = [], Run("never", ("a",), steps=[Step(1, 1.0, 1.0, 0.0, 0, 1.0, 8)])
    with Log(tmp_path / "log.jsonl", before, [Recorder()]) as log:
        log.add(Compiled(2, 0, 2.0, False, 1.5, 1000))
        log.add(Step(2, 0.5, 2.0, 0.25, 1, 100.0, 8))
        log.add(sfj.FreezeEvent(2, ("a",)))
        log.add(Evaluation(2, {"accuracy": 0.75}))
        log.add(Step(3, None, 2.0, 0.25, 1, 100.0, 8))
    costs = {"seconds": 2.0, "policy_seconds": 0.25, "frozen_layers": 1, "flops": 100.0, "peak_bytes": 8}
    assert told[:3] == [(2, {"loss": 0.5} | costs), sfj.FreezeEvent(2, ("a",)), (2, {"evaluation/accuracy": 0.75})]
    step, metrics = told[3]
    assert step == 3
    assert math.isnan(metrics["loss"])
