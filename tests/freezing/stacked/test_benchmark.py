"""The benchmark of stacked blocks, at the smallest size."""

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
