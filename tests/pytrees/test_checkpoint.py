import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from smartfrz_jax.pytrees import checkpoint

TREE = {
    "block": [
        {"kernel": jnp.arange(12.0).reshape(3, 4) / 7, "bias": jnp.array([-0.0, np.nan, np.inf])},
        (jnp.int32(3),),
    ],
    "a.b/c": jnp.ones((2, 2), jnp.bfloat16) / 3,
    "flags": jnp.array([True, False]),
    "bytes": jnp.arange(5, dtype=jnp.uint8),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "tree"
    checkpoint.write(path, TREE, "thing", {"step": 7, "names": ["a", "b"]})
    return path


def assert_bit_identical(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_round_trip_is_bit_identical(saved):
    assert_bit_identical(checkpoint.read(saved, TREE, "thing"), TREE)
    assert checkpoint.read_metadata(saved, "thing") == {"kind": "thing", "step": 7, "names": ["a", "b"]}


def test_abstract_and_numpy_templates(saved):
    abstract = jax.eval_shape(lambda: TREE)
    assert_bit_identical(checkpoint.read(str(saved), abstract, "thing"), TREE)
    arrays = checkpoint.read(saved, jax.tree.map(np.asarray, TREE), "thing")
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(arrays))
    assert arrays["a.b/c"].dtype == ml_dtypes.bfloat16


@pytest.mark.slow
def test_typed_random_keys(tmp_path):
    keys = {"key": jax.random.split(jax.random.key(3), 2), "rbg": jax.random.key(1, impl="rbg")}
    checkpoint.write(tmp_path / "x", keys, "keys", {})
    for like in (keys, jax.eval_shape(lambda: keys)):
        got = checkpoint.read(tmp_path / "x", like, "keys")
        assert got["key"].dtype == keys["key"].dtype
        np.testing.assert_array_equal(jax.random.normal(got["key"][1]), jax.random.normal(keys["key"][1]))
        np.testing.assert_array_equal(jax.random.normal(got["rbg"]), jax.random.normal(keys["rbg"]))


def test_a_random_key_of_another_kind_is_refused(tmp_path):
    checkpoint.write(tmp_path / "x", {"key": jax.random.key(1, impl="rbg")}, "keys", {})
    with pytest.raises(ValueError, match=r"\['key'\] is key<rbg>\[\] there, expected key<urbg>\[\]"):
        checkpoint.read(tmp_path / "x", {"key": jax.random.key(0, impl="unsafe_rbg")}, "keys")
    assert checkpoint.read_metadata(tmp_path / "x", "keys") == {"kind": "keys"}


def test_keys_of_checkpoints_that_do_not_say_their_kind(tmp_path):
    from orbax.checkpoint import v1 as ocp

    key = jax.random.key(3)
    ocp.save(str(tmp_path / "x"), {"['key']": jax.random.key_data(key)}, custom_metadata={"kind": "keys"})
    got = checkpoint.read(tmp_path / "x", {"key": jax.random.key(0)}, "keys")["key"]
    np.testing.assert_array_equal(jax.random.key_data(got), jax.random.key_data(key))
    with pytest.raises(ValueError, match=r"\['key'\] is uint32\[2\] there, expected uint32\[4\]"):
        checkpoint.read(tmp_path / "x", {"key": jax.random.key(0, impl="rbg")}, "keys")


def test_arrays_of_size_zero(tmp_path):
    everywhere = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
    tree = {
        "some": jnp.ones(2),
        "none": jnp.zeros((0, 3), jnp.bfloat16),
        "numpy": np.zeros((2, 0)),
        "keys": jax.random.split(jax.random.key(0), 0),
        "split": jax.device_put(jnp.zeros((0, 2)), everywhere),
    }
    checkpoint.write(tmp_path / "x", tree, "tree", {})
    got = checkpoint.read(tmp_path / "x", tree, "tree")
    for name, leaf in tree.items():
        assert (got[name].shape, got[name].dtype, type(got[name])) == (leaf.shape, leaf.dtype, type(leaf))
    assert got["split"].sharding == everywhere
    with pytest.raises(ValueError, match=r"\['none'\] is bfloat16\[0, 3\] there, expected bfloat16\[1, 3\]"):
        checkpoint.read(tmp_path / "x", tree | {"none": jnp.zeros((1, 3), jnp.bfloat16)}, "tree")
    with pytest.raises(ValueError, match="tree: the tree has no array with elements"):
        checkpoint.write(tmp_path / "y", {"none": tree["none"]}, "tree", {})


def test_numbers_of_python_and_numpy_are_exact(tmp_path):
    tree = {
        "count": 2**70,
        "best": -np.inf,
        "third": 1 / 3,
        "flag": True,
        "word": "a",
        "long": np.array([2**40 + 1, -1]),
        "double": np.float64(1) / 3,
        "small": np.int8(3),
        "array": jnp.ones(2),
    }
    checkpoint.write(tmp_path / "x", tree, "tree", {"step": 1})
    like = {name: leaf * 0 for name, leaf in tree.items()} | {"best": 0.0, "flag": False}
    got = checkpoint.read(tmp_path / "x", like, "tree")
    for name, leaf in tree.items():
        assert type(got[name]) is type(leaf), name
        np.testing.assert_array_equal(got[name], leaf, err_msg=name)
    assert checkpoint.read_metadata(tmp_path / "x", "tree") == {"kind": "tree", "step": 1}
    with pytest.raises(ValueError, match=r"\['count'\] is int\[\] there, expected float\[\]"):
        checkpoint.read(tmp_path / "x", like | {"count": 0.0}, "tree")


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"tree: \['b'\] is object, expected an array or a number; make it"):
        checkpoint.write(tmp_path / "x", {"a": jnp.ones(2), "b": object()}, "tree", {})
    assert not (tmp_path / "x").exists()


def test_leaves_come_onto_the_shardings_of_the_template(tmp_path):
    mesh = Mesh(np.array(jax.devices()), ("x",))
    split, whole = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())
    tree = {"w": jax.device_put(jnp.arange(16.0), split)}
    checkpoint.write(tmp_path / "x", tree, "tree", {})
    for sharding in (split, whole):
        like = {"w": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=sharding)}
        got = checkpoint.read(tmp_path / "x", like, "tree")["w"]
        assert got.sharding.is_equivalent_to(sharding, 1)
        np.testing.assert_array_equal(got, np.arange(16))
    alone = checkpoint.read(tmp_path / "x", {"w": jax.ShapeDtypeStruct((16,), jnp.float32)}, "tree")["w"]
    assert alone.devices() == {jax.devices()[0]}


def test_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.write("here", {"a": jnp.ones(2)}, "tree", {})
    assert checkpoint.read_metadata(tmp_path / "here", "tree") == {"kind": "tree"}


def test_existing_path_is_left_alone(tmp_path):
    path = tmp_path / "x"
    checkpoint.write(path, {"a": jnp.zeros(2)}, "tree", {"version": 1})
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(FileExistsError, match=r"path: .*x exists; .* overwrite=True"):
        checkpoint.write(path, {"a": jnp.ones(2)}, "tree", {"version": 2})
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    checkpoint.write(path, {"a": jnp.ones(3)}, "tree", {"version": 2}, overwrite=True)
    np.testing.assert_array_equal(checkpoint.read(path, {"a": jnp.zeros(3)}, "tree")["a"], [1, 1, 1])
    assert checkpoint.read_metadata(path, "tree")["version"] == 2


def test_existing_file_is_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="path: "):
        checkpoint.write(path, {"a": jnp.zeros(2)}, "tree", {})
    assert path.read_text() == "mine"


def test_failed_write_leaves_nothing_that_looks_complete(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(TypeError):
        checkpoint.write(path, {"a": jnp.zeros(2)}, "tree", {"not json": object()})
    assert not path.exists()
    checkpoint.write(path, {"a": jnp.zeros(2)}, "tree", {})


def test_missing_directory(tmp_path):
    for call in (checkpoint.read_metadata, lambda path, kind: checkpoint.read(path, TREE, kind)):
        with pytest.raises(FileNotFoundError, match=r"path: there is no directory .*nowhere; expected .* a thing"):
            call(tmp_path / "nowhere", "thing")


def test_file_instead_of_a_directory(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(FileNotFoundError, match="path: there is no directory"):
        checkpoint.read_metadata(tmp_path / "x", "thing")


def test_directory_that_is_no_checkpoint(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"path: .* is not a complete checkpoint of a thing"):
        checkpoint.read_metadata(tmp_path, "thing")


def test_wrong_kind(saved):
    with pytest.raises(ValueError, match=r"path: .* is not the checkpoint of a predictor; .*'kind': 'thing'"):
        checkpoint.read(saved, TREE, "predictor")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flags": jnp.zeros(3, bool)}, r"\['flags'\] is bool\[2\] there, expected bool\[3\] \(1 of 6 arrays"),
        ({"flags": jnp.zeros(2)}, r"\['flags'\] is bool\[2\] there, expected float32\[2\]"),
        ({"new": jnp.zeros(2)}, r"\['new'\] is missing there, expected float32\[2\]"),
    ],
    ids=["shape", "dtype", "missing"],
)
def test_misfit_names_the_array_and_both_shapes(saved, change, message):
    with pytest.raises(ValueError, match="path: the thing in .* does not fit: " + message):
        checkpoint.read(saved, TREE | change, "thing")


def test_left_over_array(saved):
    fewer = {name: leaf for name, leaf in TREE.items() if name != "flags"}
    with pytest.raises(ValueError, match=r"\['flags'\] is bool\[2\] there, expected missing"):
        checkpoint.read(saved, fewer, "thing")


def test_no_custom_metadata(tmp_path):
    from orbax.checkpoint import v1 as ocp

    ocp.save(str(tmp_path / "x"), {"a": jnp.ones(2)})
    with pytest.raises(ValueError, match="is not the checkpoint of a thing"):
        checkpoint.read_metadata(tmp_path / "x", "thing")


def damage(path: Path, file: Path, how: str) -> Path:
    """A copy of the checkpoint with one of its files damaged."""
    target = path.parent / f"{how}-{str(file).replace('/', '-')}"
    shutil.copytree(path, target)
    content = (target / file).read_bytes()
    if how == "delete":
        (target / file).unlink()
    elif how == "garble":
        (target / file).write_bytes(bytes(byte ^ 0x5A for byte in content))
    elif how.startswith("flip"):
        place = int(len(content) * float(how.split()[1]))
        (target / file).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    else:
        (target / file).write_bytes(content[: len(content) // 2])
    return target


def read_damaged(path: Path, like) -> str:
    try:
        got, metadata = checkpoint.read(path, like, "thing"), checkpoint.read_metadata(path, "thing")
    except ValueError as error:
        return str(error)
    for name in ("w", "random"):
        assert_bit_identical(got[name], like[name])
    assert (got["n"], metadata) == (7, {"kind": "thing", "frozen": ["a"]})
    return ""


def main(path: Path) -> None:
    """Reads damaged copies of a checkpoint; prints the error for each, by kind of damage and file."""
    tree = {"n": 7, "w": jnp.arange(1000.0), "random": np.random.default_rng(0).standard_normal(4096)}
    checkpoint.write(path, tree, "thing", {"frozen": ["a"]})
    files = [file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file()]
    damaged = {(how, str(file)): damage(path, file, how) for how in ("delete", "garble", "truncate") for file in files}
    flips = [f"flip {place}" for place in (0.3, 0.4, 0.5, 0.6, 0.7, 0.9)]
    damaged |= {
        (how, str(file)): damage(path, file, how) for how in flips for file in files if (path / file).stat().st_size
    }
    errors = {" ".join(case): read_damaged(target, tree) for case, target in damaged.items()}
    target = Path(shutil.copytree(path, path.parent / "no data"))
    shutil.rmtree(target / "state" / "d")
    print(json.dumps(errors | {"no data": read_damaged(target, tree)}))


def test_values_and_metadata_that_are_not_those_that_were_saved_are_noticed(tmp_path):
    checkpoint.write(tmp_path / "x", {"w": jnp.arange(4.0), "n": 7}, "thing", {})
    file = tmp_path / "x/_CHECKPOINT_METADATA"
    text = file.read_text()
    for old, new, message in (
        ('"value": 7', '"value": 3', "its metadata are not those that were saved"),
        ('"value": 7', '"value": 7.0', "its metadata are not those that were saved"),
    ):
        assert old in text
        file.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=f"is not a complete checkpoint of a thing .*{message}.*another copy"):
            checkpoint.read(tmp_path / "x", {"w": jnp.zeros(4), "n": 0}, "thing")


def test_a_folder_of_something_else(tmp_path):
    import orbax.checkpoint as ocp

    ocp.PyTreeCheckpointer().save(tmp_path / "older", {"a": jnp.ones(2)})
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"PK")
    for name, error, message in (
        ("older", ValueError, "is not the checkpoint of a thing|is not a complete checkpoint of a thing"),
        ("empty", ValueError, "is not a complete checkpoint of a thing"),
        ("file", FileNotFoundError, "there is no directory .*file, it is a file; expected the checkpoint of a thing"),
        ("nowhere", FileNotFoundError, "there is no directory .*nowhere; expected"),
    ):
        with pytest.raises(error, match=f"^path: .*({message})"):
            checkpoint.read(tmp_path / name, TREE, "thing")


@pytest.mark.slow
def test_damage_to_any_file_is_a_clear_error_or_harmless(tmp_path):
    """Never wrong numbers, never an error that does not say what is damaged.

    In a process of its own, for Orbax leaves reads running when one fails, which end in warnings at any later time.
    """
    script = [sys.executable, __file__, str(tmp_path / "saved")]
    env = os.environ | {"PYTHONPATH": str(Path(checkpoint.__file__).parents[2])}
    done = subprocess.run(script, capture_output=True, text=True, check=False, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    refused = {case: error for case, error in errors.items() if error}
    for error in refused.values():
        assert error.startswith(f"path: {tmp_path}")
        assert "is not" in error
    for how in ("delete", "garble", "truncate"):
        assert f"{how} _CHECKPOINT_METADATA" in refused
        assert sum(case.startswith(how) for case in refused) >= 3
    data = [case[7:] for case in refused if case.startswith("delete state/ocdbt.process_0/d")]  # Orbax reads no others
    assert data  # one or several: how many files Orbax divides so little data among depends on the time it takes
    for file in ("_CHECKPOINT_METADATA", *data):
        assert sum(case.startswith("flip") and case.endswith(file) for case in refused) >= 2
    wrong = [error for error in refused.values() if "the values of ['random'] are not those that were saved" in error]
    assert len(wrong) == 6  # Orbax itself does not see a bit that is flipped in the data
    assert "is not a complete checkpoint of a thing" in refused["no data"]
    assert "restore another copy" in refused["no data"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
