"""Collecting recordings: what a recording holds, and that a killed collection goes on."""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

import smartfrz_jax as sfj
from research.recordings import __main__ as worker
from research.recordings import collect, pretraining, repeat_harm
from research.recordings import record as recording_of_a_run
from research.recordings.architectures import ARCHITECTURES
from research.recordings.network import Network
from research.recordings.plan import runs
from research.recordings.record import prepare, record
from research.recordings.sets import Arrays, Batches
from smartfrz_jax.learning import recording_files
from tests.learning.test_recording import example
from tests.research.recordings.small_recording import HELD_OUT

TINY = next(run for run in runs() if run.name == "resnet8-fashion_mnist-scratch-0")


def tiny(steps=8, **changes):
    """A short run that needs nothing but what is in the repository."""
    return dataclasses.replace(TINY, steps=steps, examples=64, batch_size=8, true_harm=False, **changes)


def images(n=16, classes=10, size=8):
    rng = np.random.default_rng(0)
    return Arrays((rng.normal(size=(n, size, size, 3)).astype(np.float32),), rng.integers(0, classes, n, np.int32))


@pytest.fixture(scope="module")
def network():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return Network(ARCHITECTURES["resnet8"], 10, "sgd", example=images())


@pytest.mark.slow
@pytest.mark.usefixtures("jax_defaults")
def test_frozen_layers_keep_weights_and_statistics_while_others_learn(network):
    front = network.layers.names[:4]
    start = network.start(0)
    frozen = sfj.Frozen(network.layers, frozenset(front))
    batches = Batches(images(), 8, 0)
    end = network.train(start, np.full(3, 0.1, np.float32), batches, decay=0.01, frozen=frozen)
    held = {name for layer in network.layers[:4] for name in (*layer.params, *layer.state)}
    assert any("bn1/mean" in name for name in held)
    for name, before in start.weights.items():
        assert np.array_equal(before, end.weights[name]) == (name in held), name


@pytest.mark.slow
@pytest.mark.usefixtures("jax_defaults")
def test_a_pretrained_start_has_all_but_the_head(network):
    other = network.start(5).weights
    start = network.start(0, {name: np.asarray(value) for name, value in other.items()})
    head, fresh = set(network.layers[-1].params), network.start(0).weights
    for name, value in start.weights.items():
        np.testing.assert_array_equal(value, fresh[name] if name in head else other[name], err_msg=name)


@pytest.fixture(scope="module")
def recorded_run(tmp_path_factory):
    """A short run, its recording, and a ``prepare`` that gives the same arguments the same network, compiled once."""
    run, folder = dataclasses.replace(tiny(batch_norm="train"), true_harm=True), tmp_path_factory.mktemp("set")
    prepare_once = functools.cache(prepare)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording_of_a_run, "prepare", prepare_once)
        patch.setattr(recording_of_a_run, "_HELD_OUT", HELD_OUT)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return run, record(run, folder, folder, None, print), folder, prepare_once


@pytest.mark.slow
def test_a_recording_end_to_end(recorded_run, tmp_path):
    run, recorded, _, _ = recorded_run
    layers = len(recorded.layers)
    assert recorded.steps.tolist() == list(range(1, 9))
    assert (recorded.record_every, recorded.total_steps) == (1, 8)
    assert recorded.weights.shape == (8, layers, 1024)
    assert not np.array_equal(recorded.weights[0], recorded.start)
    assert np.isfinite(recorded.losses).all()
    assert recorded.first_loss == recorded.losses[0]
    assert recorded.cka is not None
    assert ((recorded.cka > 0) & (recorded.cka < 1)).all()  # another seed's network is never the same
    assert recorded.own_cka is not None
    np.testing.assert_allclose(recorded.own_cka[-1], 1, atol=1e-6)
    for harm, moments in ((recorded.swap_harm, {1, 2, 3, 4, 5, 6, 7}), (recorded.branch_harm, {1, 2, 4, 6})):
        assert harm is not None
        measured = ~np.isnan(harm)
        assert set(recorded.steps[measured.any(axis=1)].tolist()) == moments
        assert measured[:, -2].any()
        assert not measured[:, -1].any()  # the head is never frozen
    assert recorded.contribution is not None
    assert set(recorded.steps[np.isfinite(recorded.contribution).any(axis=1)].tolist()) == {1, 2, 3, 4, 5, 6, 7}
    metadata = recorded.metadata
    assert metadata["architecture"] == "resnet8"
    assert metadata["held_out"].keys() == metadata["train"].keys() == {"loss", "accuracy"}
    assert {"training", "swap", "branches", "true harm", "compiling"} <= metadata["seconds"].keys()
    assert [row["step"] for row in metadata["true_harm"]] == [1] * 4 + [2] * 4 + [4] * 4
    assert np.isfinite([row["loss"] for row in metadata["true_harm"]]).all()
    recording_files.save(recorded, tmp_path, run.name)
    assert recording_files.load(tmp_path)[0].metadata == metadata


@pytest.mark.slow
@pytest.mark.usefixtures("jax_defaults")
def test_a_run_is_repeated_and_only_the_batches_of_its_branches_are_others(recorded_run, monkeypatch):
    run, first, folder, prepare_once = recorded_run
    monkeypatch.setattr(repeat_harm, "runs", lambda: [run])
    monkeypatch.setattr(repeat_harm, "prepare", prepare_once)
    args = repeat_harm.parse(f"--recordings {folder} --data-dir {folder}".split())
    second = repeat_harm.measure_again(first, args)
    assert first.branch_harm is not None
    np.testing.assert_array_equal(np.isnan(second), np.isnan(first.branch_harm))
    assert not np.array_equal(second, first.branch_harm, equal_nan=True)
    monkeypatch.setattr(repeat_harm, "_OTHER_BATCHES", 0)
    np.testing.assert_array_equal(repeat_harm.measure_again(first, args), first.branch_harm)
    of_order = []
    for order in recording_of_a_run._BRANCH_ORDERS:
        monkeypatch.setattr(recording_of_a_run, "_BRANCH_ORDERS", (order,))
        of_order.append(repeat_harm.measure_again(first, args))
    assert not np.array_equal(*of_order, equal_nan=True)
    np.testing.assert_allclose(np.mean(of_order, axis=0), first.branch_harm, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="recordings: other is not in the list"):
        repeat_harm.measure_again(dataclasses.replace(first, metadata={"name": "other"}), args)


@pytest.mark.slow
@pytest.mark.usefixtures("jax_defaults")
def test_what_is_fine_tuned_is_pretrained_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "_STEPS", {"weak": 2, "good": 4})
    run = tiny(steps=4, pretraining="fashion_mnist:good", batch_norm="fixed")
    said = []
    first, again = (prepare(run, tmp_path, tmp_path, None, said.append) for _ in range(2))
    assert sum("pre-training" in text for text in said) == 1
    chex.assert_trees_all_equal(first.weights, again.weights)
    state = again.start(0)
    trained = again.train(state, again.rates, seed=0)
    for name, array in state.weights.items():
        if not name.startswith("fc/"):
            np.testing.assert_array_equal(array, again.weights[name])
        assert np.array_equal(array, trained.weights[name]) == name.endswith(("mean", "var")), name  # they are fixed
    assert [path.name for path in (tmp_path / "pretrained").glob("*.npz")] == ["resnet8-fashion_mnist-good.npz"]


@pytest.mark.slow
def test_a_killed_collection_goes_on_where_it_was(tmp_path, capfd, monkeypatch):
    names = ["vgg9-fashion_mnist-scratch-0", "resnet8-fashion_mnist-scratch-0"]
    arguments = ["--only", "[rv]*[89]-fashion_mnist-scratch-0", "--steps", "4", "--data-dir", str(tmp_path)]
    arguments += ["--out", str(tmp_path / "out"), "--jobs", "2"]
    killed = subprocess.Popen(
        [sys.executable, "-m", "research.recordings", names[0], *arguments[2:-2]],
        cwd=Path(collect.__file__).resolve().parents[2],
    )
    with pytest.raises(subprocess.TimeoutExpired):
        killed.wait(3)
    killed.kill()
    killed.wait()
    assert not list((tmp_path / "out").glob("*.npz"))
    in_process, started = subprocess.run, []

    def with_few_examples(command, **options):
        started.append(command[:3])
        return in_process([*command[:2], "tests.research.recordings.small_recording", *command[3:]], **options)

    monkeypatch.setattr(collect.subprocess, "run", with_few_examples)
    one = ["--only", names[0], *arguments[2:]]
    assert collect.main(one) == 0
    assert started == [[sys.executable, "-m", "research.recordings"]]
    assert "1 runs, 0 of them" in capfd.readouterr().out
    (recorded,) = recording_files.load(tmp_path / "out")
    assert recorded.total_steps == 4
    recordings = []

    def run(command, **_):
        recordings.append(command[3])
        return subprocess.CompletedProcess(command, returncode=0)

    monkeypatch.setattr(collect.subprocess, "run", run)
    assert collect.main(one) == 0
    assert not recordings
    assert collect.main(arguments) == 0
    assert recordings == names[1:]
    assert "2 runs, 1 of them" in capfd.readouterr().out


def test_kept_recordings_have_no_weights_and_are_not_made_again(tmp_path, capsys, monkeypatch):
    made, started = [f"resnet8-{data}-scratch-0" for data in ("cifar10", "fashion_mnist")], []

    def save(name):
        recording_files.save(example(architecture=name), tmp_path / "out", name)

    def run(command, **_):
        started.append(command[3])
        save(command[3])
        return subprocess.CompletedProcess(command, returncode=0)

    monkeypatch.setattr(collect.subprocess, "run", run)
    save(made[0])  # before there was a folder to keep it in
    kept = tmp_path / "kept"
    arguments = ["--only", "resnet8-*-scratch-0", "--data-dir", str(tmp_path), "--keep", str(kept), "--out"]
    assert collect.main([*arguments, str(tmp_path / "out")]) == 0
    assert sorted(started) == ["resnet8-cifar100-scratch-0", made[1]]
    assert [item.weights.shape for item in recording_files.load(kept)] == 3 * [(4, 2, 0)]
    assert {item.metadata["architecture"] for item in recording_files.load(kept)} == {*started, made[0]}
    assert collect.main([*arguments, str(tmp_path / "elsewhere")]) == 0
    assert len(started) == 2
    assert "3 runs, 3 of them are in" in capsys.readouterr().out


def test_a_failed_run_is_told_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    started = []

    def run(command, **_):
        started.append(command[3])
        return subprocess.CompletedProcess(command, returncode=1 if "resnet8" in command[3] else 0)

    monkeypatch.setattr(collect.subprocess, "run", run)
    arguments = ["--only", "*-cifar10-scratch-0", "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]
    assert collect.main(arguments) == 1
    assert len(started) == 10
    assert "1 of 10 could not be recorded: resnet8-cifar10-scratch-0" in capsys.readouterr().out


def test_processes_have_one_thread_and_the_users_flags(tmp_path, monkeypatch):
    environments = []

    def run(command, *, env, **_):
        environments.append(env)
        return subprocess.CompletedProcess(command, returncode=0)

    monkeypatch.setattr(collect.subprocess, "run", run)
    monkeypatch.setenv("XLA_FLAGS", "--xla_of_the_user=1")
    assert collect.main(["--limit", "1", "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert environments[0]["XLA_FLAGS"] == "--xla_of_the_user=1 --xla_cpu_multi_thread_eigen=false"
    assert environments[0]["PJRT_NPROC"] == "1"


def test_list_prints_the_chosen_runs(capsys):
    assert collect.main(["--list", "--only", "deit6-*-scratch-0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("deit6-") and "rate" in line for line in lines)
    assert collect.main(["--list", "--limit", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--only", "alexnet-*"], "only: no run's name matches 'alexnet-*'"),
        (["--data-dir", "nowhere"], "data-dir: nowhere is not a directory"),
        (["--weights", "nowhere"], "weights: nowhere is not a directory"),
    ],
)
def test_what_cannot_run_says_why(changed, message, tmp_path, capsys):
    arguments = ["--data-dir", str(tmp_path), "--out", str(tmp_path / "out"), *changed]
    assert collect.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jobs", "0", "--list"], "argument --jobs: got 0, expected at least 1"),
        (["--limit", "0", "--list"], "argument --limit: got 0"),
        (["--out", "x"], "argument --data-dir: it is needed"),
        (["--data-dir", "x"], "argument --out: it is needed"),
    ],
)
def test_the_command_line_is_checked(arguments, message, capsys):
    with pytest.raises(SystemExit):
        collect.main(arguments)
    assert message in capsys.readouterr().err


def test_a_recording_without_its_data_says_why(tmp_path, capsys):
    arguments = ["resnet8-cifar10-scratch-0", "--out", str(tmp_path / "out"), "--data-dir", str(tmp_path / "none")]
    assert worker.main(arguments) == 1
    assert "none is not a directory" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.npz"))


def test_published_weights_that_are_not_there_say_how_to_go_on(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"efficientnet_lite0.safetensors is not in .*--weights.*--only"):
        pretraining.published_file(ARCHITECTURES["efficientnet-lite0"], tmp_path)
