"""``make demo``: that it runs to the end, counts everything, writes what it says, and ends well when it cannot."""

import json
import signal

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from models.efficientnet_lite import EfficientNetLite, Stage
from train import efficientnet_lite0, fashion_mnist
from train.demo import __main__ as demo
from train.demo import fine_tune, report
from train.loop import batches


def test_the_data_is_complete_and_balanced():
    train, test = fashion_mnist.load()
    assert train.images.shape == (6000, 28, 28, 1)
    assert test.images.shape == (2000, 28, 28, 1)
    assert np.bincount(train.labels).tolist() == [600] * 10
    assert np.bincount(test.labels).tolist() == [200] * 10
    assert abs(train.images.mean()) < 0.02
    assert abs(train.images.std() - 1) < 0.02


def test_an_epoch_shows_every_image_once_but_those_of_the_last_partial_batch():
    indices = list(batches(10, 3, epochs=2, seed=0))
    assert [len(batch) for batch in indices] == [3] * 6
    for epoch in (indices[:3], indices[3:]):
        assert len(np.unique(np.concatenate(epoch))) == 9
    assert not np.array_equal(np.concatenate(indices[:3]), np.concatenate(indices[3:]))


def test_the_weights_are_the_published_ones_in_half_precision(shared):
    published = load_file(shared / "data/weights/efficientnet_lite0.safetensors")
    ours = load_file(efficientnet_lite0.WEIGHTS)
    assert ours.keys() == published.keys()
    for name, value in published.items():
        np.testing.assert_array_equal(ours[name], value.astype(np.float16), err_msg=name)


@pytest.mark.slow
def test_the_network_has_the_weights_and_a_head_of_its_own():
    models = [efficientnet_lite0.load(10, seed=seed) for seed in (0, 1)]
    stem = load_file(efficientnet_lite0.WEIGHTS)["_conv_stem.weight"]
    for model in models:
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {np.dtype(np.float32)}
        np.testing.assert_array_equal(model.conv_stem.kernel[...], stem.transpose(2, 3, 1, 0).astype(np.float32))
        assert model.fc.kernel.shape == (1280, 10)
    assert not np.array_equal(models[0].fc.kernel[...], models[1].fc.kernel[...])


def test_images_are_as_the_network_was_trained_to_read_them():
    images = efficientnet_lite0.normalised(np.array([0, 127, 255], np.uint8).reshape(3, 1, 1, 1))
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images, np.array([[-127 / 128] * 3, [0] * 3, [1] * 3]).reshape(3, 1, 1, 3))


@pytest.fixture
def small(monkeypatch):
    """The demo with a network of three convolutions, on few images."""

    def load(num_classes, *, seed):
        stages = [Stage(1, 8, 1, 2, 3)]
        model = EfficientNetLite(stages, num_classes=num_classes, dropout=0, drop_connect=0, rngs=nnx.Rngs(seed))
        model.fc = nnx.Linear(1280, num_classes, rngs=nnx.Rngs(seed))
        return model

    train, test = (
        fashion_mnist.Split(split.images[:n], split.labels[:n])
        for split, n in zip(fashion_mnist.load(), (600, 200), strict=True)
    )
    monkeypatch.setattr(efficientnet_lite0, "load", load)
    monkeypatch.setattr(fashion_mnist, "load", lambda: (train, test))
    monkeypatch.setattr(demo, "SIZE", 8)
    monkeypatch.setattr(demo, "TRAIN_IMAGES", 100)
    monkeypatch.setattr(demo, "WAYS", {"full training": (), "front frozen": ("conv_stem", "blocks/0/*")})


@pytest.mark.slow
@pytest.mark.usefixtures("jax_defaults", "small")
def test_the_demo_runs_to_the_end(tmp_path, capsys):
    assert demo.main(["--out", str(tmp_path), "--epochs", "4", "--quiet"]) == 0
    figures = json.loads((tmp_path / "runs.json").read_text())
    runs = figures["runs"]
    images = figures["settings"]["train_images"]
    steps = 4 * (images // fine_tune.BATCH_SIZE)
    assert [(run["way"], run["seed"]) for run in runs] == [
        ("full training", 0), ("full training", 1), ("front frozen", 0), ("front frozen", 1)
    ]  # fmt: skip
    for run in runs:
        first, *_, last = [run["first"], *run["points"]]
        assert [point["step"] for point in run["points"]] == [steps // 4, steps // 2, steps - steps // 4, steps]
        assert 0 < first["seconds"] < last["seconds"]  # the first step has the compiling in it
        assert 0 <= last["accuracy"] <= 1
        frozen = run["way"] == "front frozen"
        assert last["frozen"] == (3 if frozen else 0)
        assert last["kept_bytes"] == (images * 2 * 2 * 8 * 4 if frozen else 0)  # 2 x 2 of width 8, float32
    full, frozen = runs[0], runs[2]
    assert frozen["first"]["step_bytes"] < full["first"]["step_bytes"]
    table = (tmp_path / "table.md").read_text()
    assert "| **total time, s**" in table
    assert table in f"{table}{capsys.readouterr().out}"
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def costs(seconds, frozen=0):
    return fine_tune.Costs(8, seconds, 2 * seconds, 3_000_000 - 1_000_000 * bool(frozen), 500_000 * frozen, 10, frozen)


def runs(**seconds):
    return [
        report.Run(way, seed, costs(1.0, frozen), [report.Point(costs(total, frozen), 0.8 + 0.02 * seed)])
        for (way, totals), frozen in zip(seconds.items(), (0, 4), strict=True)
        for seed, total in enumerate(totals)
    ]


def test_the_table_has_one_total_time_for_each_way():
    lines = report.table(runs(full=(40.0, 44.0), frozen=(20.0, 22.0))).splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:4]] for line in lines}
    assert cells["2 seeds, mean ± standard deviation"] == ["full", "frozen"]
    assert cells["**total time, s**"] == ["42.0 ± 2.8", "21.0 ± 1.4 (-50%)"]
    assert cells["accuracy on test images, %"] == ["81.0 ± 1.4", "81.0 ± 1.4"]
    assert cells["memory of a step, MB"] == ["3", "2 (-33%)"]
    assert cells["frozen layers, of 10"] == ["0", "4"]


def test_the_table_of_one_seed_has_no_spread():
    assert "±" not in report.table(runs(full=(40.0,), frozen=(20.0,)))


def test_what_is_done_between_the_steps_is_not_counted(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(fine_tune.time, "perf_counter", lambda: now[0])
    clock = fine_tune._Clock()
    now[0] = 3.0
    clock.stop()
    now[0] = 100.0  # an evaluation
    clock.go_on()
    now[0] = 101.5
    clock.stop()
    assert clock.seconds == 4.5


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("number", "code", "ended"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 75, "SIGTERM")]
)
def test_an_interrupted_demo_says_so(tmp_path, monkeypatch, capsys, number, code, ended):
    done = []

    def interrupted(*args, **options):
        for step in range(1, 9):
            if step == 3:
                signal.raise_signal(number)
            done.append(step)
            yield costs(float(step))

    monkeypatch.setattr(efficientnet_lite0, "load", lambda *args, **options: None)
    monkeypatch.setattr(demo, "fine_tune", interrupted)
    monkeypatch.setattr(demo, "accuracy", lambda *args: 0.5)
    assert demo.main(["--out", str(tmp_path), "--quiet"]) == code
    assert done == [1, 2, 3]
    assert f"{ended}; call it again to start anew" in capsys.readouterr().err  # nothing is saved


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert demo.main(["--out", str(tmp_path / "file" / "demo")]) == 2
    err = capsys.readouterr().err
    assert "--out: cannot make the folder" in err
    assert "choose another one" in err


@pytest.mark.parametrize("option", ["--epochs", "--seeds", "--learning-rate"])
def test_options_are_checked(capsys, option):
    with pytest.raises(SystemExit) as exit_info:
        demo.main([option, "0"])
    assert exit_info.value.code == 2
    assert f"{option}: got 0" in capsys.readouterr().err
