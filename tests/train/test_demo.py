"""``make demo``: that it runs to the end, writes what it says, and ends well when it cannot."""

import runpy
import signal

import numpy as np
import pytest

from train import demo, fashion_mnist, log, loop
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


@pytest.mark.slow
@pytest.mark.usefixtures("jax_defaults")
def test_the_demo_runs_to_the_end(tmp_path, capsys, monkeypatch):
    train, test = (
        fashion_mnist.Split(split.images[:n, ::2, ::2], split.labels[:n])
        for split, n in zip(fashion_mnist.load(), (600, 300), strict=True)
    )
    monkeypatch.setattr(fashion_mnist, "load", lambda: (train, test))
    monkeypatch.setattr(demo, "STAGE_SIZES", (1, 1, 1))
    assert demo.main(["--out", str(tmp_path), "--epochs", "3", "--pretrain-epochs", "1", "--quiet"]) == 0
    steps = 3 * (600 // demo.BATCH_SIZE)
    runs = [log.read(tmp_path / f"{name}.jsonl") for name in ("never", "smartfrz", "progress", "freezeout")]
    for tuning in runs:
        assert [step.step for step in tuning.steps] == list(range(1, steps + 1))
        assert 0.1 < tuning.metrics["accuracy"] <= 1
        assert all(program.waited > 0 for program in tuning.programs)  # none finds what another one compiled
    losses = [[step.loss for step in tuning.steps] for tuning in runs]
    same = runs[2].freezes[0].step
    assert losses[0][:same] == losses[2][:same]
    assert losses[0][same:] != losses[2][same:]
    flops = [[step.flops for step in tuning.steps] for tuning in runs]
    assert len(set(flops[0])) == 1
    assert flops[3][-1] < 0.5 * flops[0][-1]
    assert runs[3].freezes[-1].step < len(flops[3])
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "demo.md").read_text()
    for wanted in ("never", "smartfrz", "progress", "freezeout", "TFLOPs", "accuracy", "compilation"):
        assert wanted in table
    out = capsys.readouterr().out
    for path in ("demo.png", "demo.md"):
        assert (tmp_path / path).exists()
        assert str(tmp_path / path) in out


@pytest.mark.slow
@pytest.mark.usefixtures("jax_defaults")
def test_an_interrupted_demo_says_so(tmp_path, monkeypatch, capsys):
    training = loop.training

    def interrupted(*args, **options):
        for step in training(*args, **options):
            if step == 3:
                signal.raise_signal(signal.SIGINT)
            yield step

    monkeypatch.setattr(run, "training", interrupted)
    monkeypatch.setattr("sys.argv", ["demo", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(demo.__file__, run_name="__main__")
    assert exit_info.value.code == 130
    assert len(log.read(tmp_path / "pretrain.jsonl").steps) == 3
    err = capsys.readouterr().err
    assert "interrupted" in err
    assert str(tmp_path) in err
    assert "Traceback" not in err


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert demo.main(["--out", str(tmp_path / "file" / "demo")]) == 2
    err = capsys.readouterr().err
    assert "--out: cannot make the folder" in err
    assert "choose another one" in err


@pytest.mark.parametrize(("option", "value"), [("--epochs", "0"), ("--pretrain-epochs", "0"), ("--seed", "-1")])
def test_options_are_checked(capsys, option, value):
    with pytest.raises(SystemExit) as exit_info:
        demo.main([option, value])
    assert exit_info.value.code == 2
    assert f"{option}: got {value}" in capsys.readouterr().err
