import numpy as np
import pytest

from smartfrz_jax.learning.examples import make_examples
from smartfrz_jax.learning.recording import Recording
from smartfrz_jax.learning.splits import by_layer, by_metadata, by_run, metadata_values, moments


def recording(layers=("a", "b"), **metadata):
    return Recording(
        layers=layers,
        steps=np.arange(1, 8),
        record_every=1,
        total_steps=7,
        weights=np.ones((7, len(layers), 3)),
        start=np.zeros((len(layers), 3)),
        losses=np.ones(7),
        first_loss=1.0,
        cka=np.ones((7, len(layers))),
        metadata=metadata,
    )


def test_masks():
    examples = make_examples(
        [recording(), recording(("c", "a", "b")), recording()],
        window=4,
        min_records=1,
    )
    assert np.unique(examples.run[by_run(examples, [2, 0])]).tolist() == [0, 2]
    assert by_run(examples, [2, 0]).sum() == 28
    mask = by_layer(examples, ["a"])
    assert {(run, layer) for run, layer in zip(examples.run[mask], examples.layer[mask], strict=True)} == {
        (0, 0),
        (1, 1),
        (2, 0),
    }
    assert mask.sum() == 21
    np.testing.assert_array_equal(by_layer(examples, "a"), mask)
    np.testing.assert_array_equal(by_layer(examples, ["c", "a"]), mask | ((examples.run == 1) & (examples.layer == 0)))
    for unknown in (3, -1):
        with pytest.raises(ValueError, match=f"runs: there is no recording {unknown}; the examples come from 3"):
            by_run(examples, [0, unknown])
    with pytest.raises(ValueError, match="layers: no recording has a layer 'd'; they have 'a', 'b', 'c'"):
        by_layer(examples, ["a", "d"])


KINDS = [("vgg", 10), ("vgg", 100), ("deit", 10), ("resnet", 100)]


def described():
    return make_examples([recording(architecture=a, classes=c, seed=i) for i, (a, c) in enumerate(KINDS)])


@pytest.mark.parametrize(
    ("fields", "runs"),
    [
        ({"architecture": "vgg"}, [0, 1]),
        ({"classes": 10}, [0, 2]),
        ({"architecture": ["vgg", "deit"], "classes": 10}, [0, 2]),
        ({"architecture": {"deit", "resnet"}}, [2, 3]),
        ({"architecture": "deit", "classes": 100}, []),
        ({}, [0, 1, 2, 3]),
    ],
)
def test_by_metadata(fields, runs):
    examples = described()
    mask = by_metadata(examples, **fields)
    assert mask.dtype == bool
    assert np.unique(examples.run[mask]).tolist() == runs
    np.testing.assert_array_equal(mask, np.isin(examples.run, runs))


def test_metadata_values():
    assert metadata_values(described(), "architecture") == [architecture for architecture, _ in KINDS]


def test_metadata_that_are_not_there():
    examples = described()
    with pytest.raises(ValueError, match="architecture: no recording has 'bert'; they have 'vgg', 'deit', 'resnet'"):
        by_metadata(examples, architecture=["vgg", "bert"])
    with pytest.raises(ValueError, match=r"schedule: recording 0 does not have it .*'architecture', 'classes', 'seed'"):
        by_metadata(examples, schedule="cosine")
    with pytest.raises(ValueError, match=r"schedule: recording 1 .* it has none"):
        metadata_values(make_examples([recording(schedule="cosine"), recording()]), "schedule")


def test_moments_are_the_same_for_all_layers_of_a_run_and_no_others():
    examples = make_examples([recording(), recording(("a",)), recording()], stride=2)
    got, seen = moments(examples), {}
    assert (got.shape, got.dtype.kind) == ((len(examples),), "i")
    for group, run, moment in zip(got.tolist(), examples.run.tolist(), examples.moment.tolist(), strict=True):
        assert seen.setdefault(group, (run, moment)) == (run, moment)
    assert len(seen) == len(set(seen.values())) == 6
