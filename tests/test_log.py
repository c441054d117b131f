"""The log of a run: read back as written, cut at a step, robust against a kill in the midst of a line."""

import json

import pytest

import smartfrz_jax as sfj
from train.log import Compiled, Evaluation, Log, Run, Step, finite, read


@pytest.fixture
def path(tmp_path):
    with Log(tmp_path / "log.jsonl", Run("linear", ("a", "b"), {"seed": 3})) as log:
        log.add(Compiled(1, 0, 2.0))
        for step in (1, 2, 3):
            log.add(Step(step, finite(1.0 / step), 0.5, 0.25, int(step > 2), 100.0 * step, 8))
        log.add(sfj.FreezeEvent(2, ("a",)))
        log.add(Evaluation(3, {"accuracy": 0.75}))
    return tmp_path / "log.jsonl"


def test_a_log_reads_back_as_written(path):
    run = read(path)
    assert (run.name, run.layers, run.settings) == ("linear", ("a", "b"), {"seed": 3})
    assert run.steps[1] == Step(2, 0.5, 0.5, 0.25, 0, 200.0, 8)
    assert run.freezes == [sfj.FreezeEvent(2, ("a",))]
    assert run.metrics == {"accuracy": 0.75}
    assert run.tflops == pytest.approx(600e-12)
    assert run.seconds == pytest.approx(3 * 0.75)
    assert run.compile_seconds == 2.0
    assert run.frozen_share == pytest.approx(1 / 6)


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
    assert events == ["run", "program", "step", "step", "step", "freeze", "evaluation"]


@pytest.mark.parametrize("text", ["", "not JSON\n", "[]\n", '{"event": "run", "name": "x"}\n', '{"event": "step"}\n'])
def test_what_is_not_a_log_is_refused(tmp_path, text):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"path: .* is not the log of a run"):
        read(tmp_path / "log.jsonl")
    with pytest.raises(FileNotFoundError, match=r"path: .* is not there"):
        read(tmp_path / "none.jsonl")
