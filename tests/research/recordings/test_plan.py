"""Which runs are recorded: their networks, schedules, batches and images."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from research.recordings import collect, sets
from research.recordings.architectures import ARCHITECTURES
from research.recordings.plan import runs
from research.recordings.schedules import learning_rates
from research.recordings.sets import Arrays, Batches
from train import fashion_mnist


def images(n=16, classes=10, size=8):
    rng = np.random.default_rng(0)
    return Arrays((rng.normal(size=(n, size, size, 3)).astype(np.float32),), rng.integers(0, classes, n, np.int32))


def parts():
    """The runs on a part of their data set."""
    return [run for run in runs() if run.epochs is None]


def test_names_of_runs_are_unique_and_plain_file_names():
    names = [run.name for run in runs()]
    assert len(set(names)) == len(names) >= 72
    assert all(name == Path(name).name and not set(name) & set(':/\\ *?"') for name in names)


@pytest.mark.slow
def test_the_list_is_the_same_in_every_process():
    code = "from research.recordings.plan import runs; print(*runs(), sep='\\n')"
    root = Path(collect.__file__).resolve().parents[2]
    printed = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True,
            env={"PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu", "PATH": ""},
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert printed[0] == printed[1] == "\n".join(map(str, runs())) + "\n"


def test_six_architectures_learn_three_sets_from_scratch_and_from_both_levels_of_pretraining():
    seen = {}
    for run in runs():
        seen.setdefault(run.architecture, {}).setdefault(run.data, set()).add(run.pretraining.rpartition(":")[2])
    full = {"scratch", "weak", "good"}
    assert sum(len(by_set) >= 3 and all(full <= levels for levels in by_set.values()) for by_set in seen.values()) >= 6
    assert seen["efficientnet-lite0"].keys() >= {"cifar10", "cifar100"}
    assert seen["minilm"] == {"glue/mrpc": {"published"}, "word-order": {"published"}}


def test_hyperparameters_vary_within_every_small_architecture():
    for name, architecture in ARCHITECTURES.items():
        own = [run for run in parts() if run.architecture == name and not run.pretraining.endswith(":strong")]
        if architecture.published:
            continue
        optimizers, schedules = Counter(run.optimizer for run in own), Counter(run.schedule for run in own)
        assert max(optimizers.values()) - min(optimizers.values()) <= 1
        assert len(schedules) == 4
        assert max(schedules.values()) - min(schedules.values()) <= 1
        assert {run.batch_size for run in own} == set(architecture.batch_sizes)
        assert {run.steps for run in own} == set(architecture.steps)
        assert len({run.learning_rate for run in own}) >= 3


def test_every_network_of_images_is_fine_tuned_twice_from_strong_pretraining_once_on_the_same_classes():
    small = [name for name, architecture in ARCHITECTURES.items() if not (architecture.text or architecture.published)]
    strong = sorted((run.architecture, run.data) for run in parts() if run.pretraining == "cifar100:strong")
    assert strong == sorted((name, data) for name in small for data in ("cifar10", "cifar100"))
    assert sum(run.pretraining.endswith(":strong") for run in parts()) == len(strong)


def test_every_network_of_images_learns_the_whole_set_in_one_epoch_and_in_three():
    small = [name for name, architecture in ARCHITECTURES.items() if not (architecture.text or architecture.published)]
    whole = [run for run in runs() if run.epochs is not None]
    assert [(run.epochs, run.architecture) for run in whole] == [(n, name) for n in (1, 3) for name in small]
    for run in whole:
        assert (run.data, run.examples, run.augment) == ("cifar10", 50_000, True)
        assert run.steps == run.epochs * (50_000 // run.batch_size)
        assert run.pretraining == "scratch" or run.pretraining.startswith("cifar100:")  # no image is seen before
    for dealt in (Counter(run.pretraining for run in whole), Counter(run.schedule for run in whole)):
        assert len(dealt) == 4
        assert max(dealt.values()) - min(dealt.values()) <= 1
    assert max(run.steps for run in whole) >= 30 * min(run.steps for run in parts())


def test_runs_fit_their_networks():
    for run in runs():
        architecture = ARCHITECTURES[run.architecture]
        assert architecture.text == (run.data.startswith("glue/") or run.data == "word-order")
        assert (run.batch_norm == "none") == (not architecture.batch_norm)
        assert not (run.batch_norm == "fixed" and (run.pretraining == "scratch" or run.pretraining.endswith(":weak")))
        assert not (architecture.text and run.augment)
        assert bool(architecture.published) == (run.pretraining == "published")
    assert 6 <= sum(run.true_harm for run in runs()) <= 8


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [1, 0.85355339, 0.5, 0.14644661]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("step", [1, 1, 0.1, 0.01]),
        ("constant", [1, 1, 1, 1]),
    ],
)
def test_schedules(schedule, expected):
    np.testing.assert_allclose(learning_rates(schedule, 2.0, 4), 2 * np.array(expected), rtol=1e-6)


def test_warmup_rises_and_does_not_lengthen():
    rates = learning_rates("constant", 1.0, 10, warmup=4)
    np.testing.assert_allclose(rates, [0.2, 0.4, 0.6, 0.8, *[1] * 6], rtol=1e-6)
    with pytest.raises(ValueError, match=r"warmup: got 10, .* total_steps \(10\)"):
        learning_rates("constant", 1.0, 10, warmup=10)
    with pytest.raises(ValueError, match="schedule: got 'sine'"):
        learning_rates("sine", 1.0, 10)  # pyright: ignore[reportArgumentType]


def test_an_epoch_has_every_example_once_and_any_step_can_be_asked_for():
    examples = Arrays((np.arange(12),), np.arange(12, dtype=np.int32))
    batches = Batches(examples, 4, seed=3)
    steps = [batches(step).labels for step in range(6)]
    assert sorted(np.concatenate(steps[:3])) == sorted(np.concatenate(steps[3:])) == list(range(12))
    assert not np.array_equal(steps[:3], steps[3:])
    np.testing.assert_array_equal(Batches(examples, 4, seed=3)(4).labels, steps[4])
    assert not np.array_equal(Batches(examples, 4, seed=4)(0).labels, steps[0])


def test_augmented_images_are_shifted_or_mirrored_copies():
    examples = images(4)
    plain, augmented = (Batches(examples, 4, 0, augment)(0) for augment in (False, True))
    np.testing.assert_array_equal(plain.labels, augmented.labels)
    for image, changed in zip(plain.inputs[0], augmented.inputs[0], strict=True):
        padded = [np.pad(one, ((2, 2), (2, 2), (0, 0)), "edge") for one in (image, image[:, ::-1])]
        assert any(
            np.array_equal(one[y : y + 8, x : x + 8], changed) for one in padded for y in range(5) for x in range(5)
        )


@pytest.mark.parametrize("how", [sets.WORD_ORDER, sets.BIGRAM_SHIFT])
def test_every_other_sentence_is_changed_inside(how):
    mask = (np.arange(12) < np.array([[12], [12], [7], [7], [3], [3]])).astype(np.int32)
    ids = (100 * np.arange(6)[:, None] + np.arange(12)) * mask
    changed = sets._changed(how, (ids, mask, mask))
    assert changed.labels.tolist() == [0, 1] * 3
    for before, after, tokens, label in zip(ids, changed.inputs[0], mask.sum(axis=1), changed.labels, strict=True):
        moved = np.flatnonzero(before != after)
        assert sorted(before) == sorted(after)
        if label == 0 or tokens < 4:  # of one word inside there is no other order
            assert not len(moved)
        elif how == sets.BIGRAM_SHIFT:
            assert len(moved) == 2
            assert np.ptp(moved) == 1
        assert set(moved) <= set(range(1, tokens - 1))
    assert (changed.inputs[0][1] != ids[1]).any()


@pytest.mark.slow
def test_fashion_mnist_is_split_so_that_pretraining_sees_other_images():
    architecture = ARCHITECTURES["resnet8"]
    own = sets.open_set("fashion_mnist", architecture, Path(), 2000, held_out=slice(100))
    other, classes = sets.open_pretraining_set("fashion_mnist", architecture, Path())
    assert (len(own.train), len(own.held_out), own.num_classes, classes) == (2000, 100, 10, 10)
    assert own.train.inputs[0].shape == (2000, 16, 16, 3)
    last = sets.open_set("fashion_mnist", architecture, Path(), 10, held_out=slice(-50, None)).held_out
    np.testing.assert_array_equal(last.labels, fashion_mnist.load()[1].labels[-50:])
    seen = {image.tobytes() for image in own.train.inputs[0]}
    assert sum(image.tobytes() in seen for image in other.inputs[0]) <= 5  # the set itself has a few twice


def _places(n=11):
    """Images that say where a pixel comes from: 100 x example + 10 x row + column."""
    example, row, column = np.ogrid[:n, :6, :6]
    return Arrays(((100 * example + 10 * row + column)[..., None],), np.arange(n, dtype=np.int32))


def _look(image):
    """How an image of :func:`_places` is mirrored and shifted."""
    return tuple(image[2, 2:4, 0] % 100)


def test_augmentations_are_those_of_the_published_runs():
    batches = Batches(_places(), 4, 7, augment=True, shift=1)
    found = [batches(step).inputs[0][:, 2, 2:4, 0].tolist() for step in (0, 3)]
    assert found == [
        [[423, 424], [622, 621], [1023, 1022], [24, 23]],
        [[322, 323], [733, 732], [14, 13], [1024, 1023]],
    ]


def test_a_view_of_an_example_is_the_same_in_every_batch():
    looks = {}
    for n, size, steps in ((11, 4, 8), (11, 3, 9), (6, 2, 9)):
        batches = Batches(_places(n), size, 7, augment=True, shift=1)
        for step in range(steps):
            for view in range(3):
                batch = batches.view(step, view)
                np.testing.assert_array_equal(batch.labels, batches(step).labels)
                for label, image in zip(batch.labels, batch.inputs[0], strict=True):
                    looks.setdefault((int(label), view), set()).add(_look(image))
    assert len(looks) == 33
    assert all(len(found) == 1 for found in looks.values())
    seen = {look for found in looks.values() for look in found}
    assert len(seen) > 12  # of 2 x 9
    other = Batches(_places(), 11, 8, augment=True, shift=1).view(0, 0)
    assert any(
        looks[int(label), 0] != {_look(image)} for label, image in zip(other.labels, other.inputs[0], strict=True)
    )


def test_without_augmentation_all_views_are_the_batch():
    batches = Batches(_places(), 4, 7)
    np.testing.assert_array_equal(batches.view(1, 2).inputs[0], batches(1).inputs[0])
