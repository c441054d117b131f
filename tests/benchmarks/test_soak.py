"""Nothing grows in a long run in which layers freeze and train again all the time."""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from benchmarks import soak

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("jax_defaults")


@pytest.mark.slow
def test_nothing_grows_while_layers_freeze_and_train_again():
    found = list(soak.samples("cached", 120, 6))
    assert [sample.step for sample in found] == [3, 63, 123]
    # Of memory only a long run tells, as arenas fill up.
    soak.check(found, {name: bound for name, bound in soak.BOUNDS.items() if name != "resident"})


@pytest.mark.slow
def test_what_grows_is_noticed():
    found = [soak.Sample.now(step) for step in (10, 210)]
    kept = jnp.ones((3, 4))
    found.append(soak.Sample.now(410))
    grown = soak.growth(found)
    assert (grown["on_device"], grown["arrays"]) == (kept.nbytes, 1)
    with pytest.raises(RuntimeError, match=rf"grew from step 210 to 410: .*'on_device': {kept.nbytes}"):
        soak.check(found, soak.BOUNDS)


def test_the_committed_run_grew_by_no_more_than_its_bounds_and_stands_on_its_page():
    lines = (ROOT / "benchmarks/soak.jsonl").read_text().splitlines()
    assert soak.table(lines) in (ROOT / "docs/benchmarks/soak.md").read_text()
    for case in soak.CASES:
        found = [line for line in map(json.loads, lines) if line["case"] == case]
        samples = [soak.Sample(*(line[name] for name in soak.Sample._fields)) for line in found]
        assert samples[-1].step > 2000
        soak.check(samples, soak.BOUNDS)
