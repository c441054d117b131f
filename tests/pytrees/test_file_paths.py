"""Paths with ``~`` and of object stores, everywhere one is taken."""

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from orbax.checkpoint import v1 as ocp

import smartfrz_jax as sfj
from models import weights
from smartfrz_jax.learning import recording_files
from smartfrz_jax.pytrees import checkpoint, file_paths
from tests.learning.test_recording import example
from tests.models.test_weights import assert_same, resnet, values
from tests.support.boxes import unboxed
from tests.support.buckets import buckets
from train import command_line, finetune, log
from train.data import directory
from train.options import parse
from train.recovery import resume
from train.recovery.checkpoints import Checkpoints

ARGUMENTS = ["--model", "resnet50", "--data", "x", "--data-dir", "y"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The folder that ``~`` is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / "~").exists()


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with buckets(tmp_path / "store") as bucket:
        (tmp_path / "store/bucket").mkdir(parents=True)
        yield bucket


@pytest.fixture
def orbax(tmp_path, monkeypatch):
    """The paths that Orbax got; what it does with those of object stores happens in the bucket's folder."""
    got = []

    def mapped(original, path, *args, **kwargs):
        got.append(path)
        return original(path.replace("gs://", f"{tmp_path}/store/"), *args, **kwargs)

    for name in ("save", "load", "metadata"):
        monkeypatch.setattr(ocp, name, functools.partial(mapped, getattr(ocp, name)))
    return got


def test_local_paths(home):
    assert file_paths.as_path("~/a") == home / "a"
    assert file_paths.as_path(pathlib.Path("~/a")) == home / "a"
    assert file_paths.as_path("a/~b") == pathlib.Path("a/~b")
    assert file_paths.as_path("C:/a") == pathlib.Path("C:/a")
    assert type(file_paths.as_path(epath.Path("a"))) is type(home)
    assert file_paths.local_path("~/a") == home / "a"


@pytest.mark.parametrize("path", ["gs://bucket/a", "s3://bucket/a", epath.Path("gs://bucket/a")])
def test_paths_of_object_stores_stay_as_they_are(path):
    found = file_paths.as_path(path)
    assert os.fspath(found / "b") == f"{os.fspath(path)}/b"
    assert file_paths.is_remote(found)
    with pytest.raises(ValueError, match=r"place: got .*://bucket/a, expected a local path"):
        file_paths.local_path(path, "place")


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (
            pathlib.Path("gs://bucket/a"),
            ValueError,
            "place: got gs:/bucket/a, .* made of gs://bucket/a; pass",
        ),
        ("nowhere://a", ValueError, "place: got nowhere://a, expected a local path or one of an object store"),
        (3, TypeError, "place: got int, expected a path"),
        (None, TypeError, "place: got NoneType, expected a path"),
    ],
)
def test_what_is_no_path(path, error, message):
    with pytest.raises(error, match=message):
        file_paths.as_path(path, "place")


def test_checkpoints(home, bucket, orbax):
    for path in ("~/x", f"{bucket}/x"):
        checkpoint.write(path, {"a": jnp.arange(3)}, "tree", {"b": 1})
        np.testing.assert_array_equal(checkpoint.read(path, {"a": jnp.zeros(3, int)}, "tree")["a"], [0, 1, 2])
        assert checkpoint.read_metadata(path, "tree") == {"kind": "tree", "b": 1}
        with pytest.raises(FileExistsError, match=r"path: .*x exists"):
            checkpoint.write(path, {"a": jnp.arange(3)}, "tree", {})
        with pytest.raises(FileNotFoundError, match="path: there is no directory"):
            checkpoint.read_metadata(f"{path}/y", "tree")
    assert set(orbax) == {str(home / "x"), "gs://bucket/x"}


def test_recordings(home, bucket):
    for folder in ("~/set", f"{bucket}/set"):
        path = recording_files.save(example(0), folder, "run")
        assert [one.metadata for one in recording_files.load(folder)] == [recording_files.read(path).metadata]
        with pytest.raises(FileExistsError):
            recording_files.save(example(0), folder, "run")
    assert os.listdir(home / "set") == os.listdir(home / "store/bucket/set") == ["run.npz"]


def test_weights(home, bucket):
    model, other = resnet(seed=1), resnet(seed=2)
    for path in ("~/a.safetensors", f"{bucket}/a.safetensors"):
        weights.save(model, path)
        weights.load(other, path)
        assert_same(values(other), values(model))
        with pytest.raises(FileExistsError, match=r"path: .*a\.safetensors exists"):
            weights.save(model, path)
    with pytest.raises(FileNotFoundError, match="path: gs://bucket/b does not exist"):
        weights.load(model, f"{bucket}/b")
    assert safetensors.numpy.load_file(home / "store/bucket/a.safetensors").keys() == values(model).keys()


def test_programs(home, bucket):
    for folder, expected in (("~/programs", str(home / "programs")), (f"{bucket}/programs", f"{bucket}/programs")):
        sfj.enable_compilation_cache(folder)
        assert jax.config.values["jax_compilation_cache_dir"] == expected
    assert (home / "store/bucket/programs").is_dir()


def test_activations_on_disk_are_local(home):
    frontier = [jax.ShapeDtypeStruct((1, 2), jnp.float32)]
    sfj.caching.ActivationCache(frontier, 4, place="~/activations")
    assert any((home / "activations").iterdir())
    with pytest.raises(ValueError, match="place: got gs://bucket/x, expected a local path"):
        sfj.caching.ActivationCache(frontier, 4, place="gs://bucket/x")


def test_data_directories(home, bucket):
    for folder in ("~/tfds", f"{bucket}/tfds"):
        with pytest.raises(FileNotFoundError, match=f"data_dir: {file_paths.as_path(folder)} is not a directory"):
            directory.find("cifar10", folder)
    for real in (home / "tfds", home / "store/bucket/tfds"):
        (real / "cifar10/3.0.2").mkdir(parents=True)
        (real / "cifar10/3.0.2/dataset_info.json").write_text("{}")
    for folder in ("~/tfds", f"{bucket}/tfds"):
        assert directory.find("cifar10", folder) == file_paths.as_path(folder) / "cifar10/3.0.2"


def test_a_log_in_an_object_store_is_whole_when_flushed_and_at_the_end(bucket):
    path = file_paths.as_path(f"{bucket}/log.jsonl")
    with log.Log(path, log.Run("never", ("a",))) as written:
        written.add(log.Step(1, 1.0, 1.0, 0.0, 0, 1.0, 1))
        written.add(log.Evaluation(1, {"accuracy": 0.5}))
        written.flush()
        assert log.read(path) == written.run
        written.add(log.Step(2, 1.0, 1.0, 0.0, 0, 1.0, 1))
    assert log.read(path) == written.run


def test_checkpoints_of_a_run_in_an_object_store(bucket, tmp_path, monkeypatch):
    class Freezer:
        def contents(self):
            return checkpoint.contents({"run": np.ones(2)}, "training run", {})

    def mapped(folder, **options):
        assert folder == "gs://bucket/checkpoints"
        return original(tmp_path / "store/bucket/checkpoints", **options)

    original = ocp.training.Checkpointer
    monkeypatch.setattr(ocp.training, "Checkpointer", mapped)
    out = file_paths.as_path(bucket)
    with log.Log(out / "log.jsonl", log.Run("never", ("a",))):
        pass
    assert resume.read_started(out, {}, print) == []
    with Checkpoints(out / "checkpoints", keep_last=2) as checkpoints:
        for Freezer.steps in (2, 3, 4):
            checkpoints.save(Freezer())
    found = resume.read_started(out, {}, print)
    assert [os.fspath(path) for path in found] == [f"gs://bucket/checkpoints/0000000{step}" for step in (4, 3)]


def test_the_command_line_of_finetune(home, capsys):
    options = parse([*ARGUMENTS, "--out", "gs://bucket/run", "--weights", "~/a"])
    assert (options.settings()["out"], options.settings()["weights"]) == ("gs://bucket/run", str(home / "a"))
    with pytest.raises(SystemExit):
        parse([*ARGUMENTS, "--out", "nowhere://run"])
    assert "--out: path: got nowhere://run, expected a local path or one of an object store" in unboxed(
        capsys.readouterr().err
    )


def test_the_output_is_tried_before_anything_else(tmp_path, monkeypatch, capsys):
    def refused(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "write_text", refused)
    assert finetune.main([*ARGUMENTS, "--out", str(tmp_path)]) == 2
    assert f"--out: cannot make the folder {tmp_path} and write in it (Permission denied)" in capsys.readouterr().err
    assert command_line.exit_code(pytest.fail, file_paths.as_path("gs://bucket/run"), go_on="") == 2
    assert "--out: cannot make the folder gs://bucket/run and write in it (" in capsys.readouterr().err
