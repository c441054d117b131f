"""``benchmarks.loop`` at a tiny size: it measures both loops, on the same program, and writes what it says."""

import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks import loop
from benchmarks.device_idle import executions, idle_share
from benchmarks.networks import Network

pytestmark = pytest.mark.usefixtures("jax_defaults")


class Small(nnx.Module):
    def __init__(self, num_classes, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.head = nnx.Linear(4, num_classes, rngs=rngs)

    def __call__(self, x):
        return self.head(self.conv(x).mean((1, 2)))


@pytest.mark.slow
def test_a_tiny_network_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(loop.NETWORKS, "small", Network(Small))
    out = tmp_path / "loop.jsonl"
    command = ["--steps", "16", "--rounds", "2", "--batch", "2", "--size", "8", "--only", "small", "--out", str(out)]
    loop.main(command)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["network"], line["policy"], line["steps"]) for line in lines] == [
        ("small", "never", 16),
        ("small", "smartfrz", 16),
    ]
    for line in lines:
        assert line["bare_processor_ms"] > 0
        assert line["over_processor"] > -1
        assert 0 <= line["idle"] < 1
        assert 0 <= line["idle_bare"] < 1
        assert len(line["over_processor_of_rounds"]) == 2
    assert capsys.readouterr().out.count("| small |") == 2


def test_the_bare_loop_goes_on_from_the_model_and_leaves_it_alone(monkeypatch):
    monkeypatch.setitem(loop.NETWORKS, "small", Network(Small))
    case = loop.Case("small", 2, 8)
    before = nnx.to_pure_dict(nnx.state(case.model))["head"]["bias"].copy()
    case.bare(3)()
    assert (nnx.to_pure_dict(nnx.state(case.model))["head"]["bias"] == before).all()
    assert len(case.step.programs) == 1


@pytest.mark.parametrize(
    ("intervals", "share"),
    [([(0, 4)], 0), ([(5, 6), (0, 1)], 4 / 6), ([(0, 10), (2, 3), (12, 20)], 0.1), ([(0, 5), (3, 8), (8, 10)], 0)],
)
def test_idle_is_what_no_interval_covers(intervals, share):
    assert idle_share(intervals) == pytest.approx(share)


def test_a_trace_of_nothing_is_refused():
    with pytest.raises(ValueError, match="intervals: got none"):
        idle_share([])


@pytest.mark.slow
def test_each_call_of_a_program_is_in_the_trace():
    program, x = jax.jit(jnp.sin), jnp.ones(100)
    program(x).block_until_ready()

    def run(calls):
        for _ in range(calls):
            program(x).block_until_ready()

    few, more = (len(executions(lambda n=n: run(n))) for n in (2, 5))
    assert 2 <= few < more
