"""The benchmark of stacked blocks, at the smallest size."""

import json
from pathlib import Path

import pytest

from benchmarks import stacked

pytestmark = pytest.mark.usefixtures("jax_defaults")


@pytest.mark.slow
def test_a_frozen_front_costs_what_it_does_unrolled(monkeypatch):
    monkeypatch.setattr(stacked, "WIDTH", 16)
    nothing, front = stacked.run(stacked.linen, 3, ["front third"])
    for line in (nothing, front):
        assert line["flops_over_unrolled"] == pytest.approx(1.0, abs=0.02)
    assert front["optimizer_over_nothing_frozen"] < 0.7
    assert front["flops_over_nothing_frozen"] < 0.9
    assert stacked.table([nothing, front]).count("\n") == 3


def test_the_page_has_all_that_was_measured():
    root = Path(__file__).parents[3]
    lines = [json.loads(line) for line in (root / "benchmarks/stacked.jsonl").read_text().splitlines()]
    assert stacked.table(lines) in (root / "docs/benchmarks/stacked.md").read_text()
    assert len(lines) == len(stacked.NETWORKS) * (len(stacked.sets(12)) + len(stacked.sets(30)))
    assert all(abs(line["flops_over_unrolled"] - 1) < 0.02 for line in lines)
    assert all(line["compile_over_nothing_frozen"] < 2 for line in lines)
