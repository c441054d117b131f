import dataclasses
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartfrz_jax.learning import recording_files
from smartfrz_jax.learning.recording import SUPERVISION, Recording


def example(seed=0, /, records=4, layers=("first", "second"), size=3, supervision=("cka",), **metadata):
    rng = np.random.default_rng(seed)

    def matrix(name):
        values = rng.random((records, len(layers))).astype(np.float32)
        values[:, -1] = np.nan if name.endswith("harm") and len(layers) > 1 else values[:, -1]
        return values

    return Recording(
        layers=layers,
        steps=np.arange(1, records + 1) * 10,
        record_every=10,
        total_steps=10 * records + 5,
        weights=rng.standard_normal((records, len(layers), size)).astype(np.float32),
        start=rng.standard_normal((len(layers), size)).astype(np.float32),
        losses=np.where(rng.random(records) < 0.3, np.nan, rng.random(records)).astype(np.float32),
        first_loss=0.5,
        **{name: matrix(name) for name in supervision},
        metadata=metadata,
    )


def assert_equal(got: Recording, expected: Recording):
    for field in dataclasses.fields(Recording):
        a, b = getattr(got, field.name), getattr(expected, field.name)
        assert type(a) is type(b)
        if isinstance(b, np.ndarray):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_equal(a, b)


class TestRecording:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"steps": np.zeros((0,), np.int64)}, r"steps, layers: got steps of shape \(0,\)"),
            ({"steps": np.zeros((4, 1), np.int64)}, r"steps, layers: got steps of shape \(4, 1\)"),
            ({"steps": np.int64(3)}, r"steps, layers: got steps of shape \(\)"),
            ({"layers": ()}, "and 0 layers"),
            ({"layers": ("first",)}, r"weights: got shape \(4, 2, 3\), expected \(4, 1, size\)"),
            ({"weights": np.zeros((4, 2), np.float32)}, r"weights: got shape \(4, 2\)"),
            ({"start": np.zeros((2, 4), np.float32)}, r"start: got shape \(2, 4\), expected \(2, 3\)"),
            ({"losses": np.zeros(3, np.float32)}, r"losses: got shape \(3,\), expected \(4,\)"),
            ({"cka": np.zeros((3, 2), np.float32)}, r"cka: got shape \(3, 2\), expected \(4, 2\)"),
            ({"own_cka": np.zeros((4, 3), np.float32)}, r"own_cka: got shape \(4, 3\), expected \(4, 2\)"),
            ({"branch_harm": np.zeros(4, np.float32)}, r"branch_harm: got shape \(4,\), expected \(4, 2\)"),
            ({"cka": None}, "cka, own_cka, swap_harm, branch_harm: got none of them"),
            ({"steps": np.array([10, 20, 20, 30])}, "step: got 20 after 20, expected 30"),
            ({"steps": np.array([10, 20, 40, 50])}, "step: got 40 after 20, expected 30: records are record_every, 10"),
            ({"steps": np.array([5, 15, 25, 35])}, "step: got 5, expected a multiple of record_every, 10"),
            ({"record_every": 0}, "record_every: got 0, expected an integer of at least 1"),
            ({"total_steps": 39}, "total_steps: got 39"),
            ({"cka": np.array([[0, 0], [0, 0], [0, np.nan], [0, 0]])}, "cka: not finite for layer 'second' at step 30"),
            ({"own_cka": np.full((4, 2), np.inf)}, "own_cka: not finite for layer 'first' at step 10"),
            ({"start": np.full((2, 3), np.nan)}, "start: not finite for layer 'first' at step 0"),
            ({"weights": np.full((4, 2, 3), np.nan)}, "weights: not finite for layer 'first' at step 10"),
            ({"swap_harm": np.full((4, 2), np.nan)}, "swap_harm: has 0 infinite and 8 NaN of 8 values"),
            ({"branch_harm": np.array([[np.inf, 1.0]] * 4)}, "branch_harm: has 4 infinite and 0 NaN"),
            ({"losses": np.array([1, 1, np.inf, 1])}, "losses, first_loss: one is infinite"),
            ({"first_loss": -np.inf}, "losses, first_loss: one is infinite"),
            ({"metadata": {"path": object()}}, "metadata: JSON cannot hold it"),
        ],
    )
    def test_refuses_what_does_not_fit(self, change, message):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(example(), **change)

    def test_without_weights_all_else_is_the_same(self, tmp_path):
        whole = example(supervision=("cka", "branch_harm"), architecture="vgg")
        got = recording_files.read(recording_files.save(whole.without_weights(), tmp_path, "small"))
        assert (got.weights.shape, got.start.shape) == ((4, 2, 0), (2, 0))
        assert_equal(dataclasses.replace(got, weights=whole.weights, start=whole.start), whole)

    def test_refuses_other_kinds_of_numbers(self):
        with pytest.raises(TypeError, match="steps: got dtype float64, expected int64"):
            dataclasses.replace(example(), steps=np.arange(4.0))
        with pytest.raises(TypeError, match="cka: got dtype complex128, expected float32"):
            dataclasses.replace(example(), cka=np.ones((4, 2), complex))

    def test_casts_to_the_stated_dtypes(self):
        got = dataclasses.replace(
            example(),
            steps=np.arange(4, dtype=np.int16),
            record_every=np.int32(1),
            weights=np.ones((4, 2, 3)),
            first_loss=np.float32(2.0),
        )
        assert (got.steps.dtype, got.weights.dtype) == (np.int64, np.float32)
        assert (type(got.record_every), type(got.first_loss)) == (int, float)

    def test_what_may_be_unknown(self):
        harm = np.array([[np.nan, 0.5]] * 4)
        got = dataclasses.replace(
            example(), losses=np.full(4, np.nan), first_loss=np.nan, cka=None, own_cka=None, swap_harm=harm
        )
        np.testing.assert_array_equal(got.swap_harm, harm)

    def test_metadata_is_as_it_will_be_read(self):
        assert example(shape=(1, 2)).metadata == {"shape": [1, 2]}


class TestFiles:
    def test_round_trip_and_append(self, tmp_path):
        directory = tmp_path / "made" / "here"
        recordings = [example(seed, records=3 + seed, seed=seed, note="é") for seed in range(3)]
        before = {}
        for name, item in zip(["b", "c", "a"], recordings, strict=True):
            path = recording_files.save(item, directory, name)
            assert path == directory / f"{name}.npz"
            assert all(file.read_bytes() == content for file, content in before.items())
            before[path] = path.read_bytes()
        assert sorted(file.name for file in directory.iterdir()) == ["a.npz", "b.npz", "c.npz"]
        for got, index in zip(recording_files.load(directory), [2, 0, 1], strict=True):
            assert_equal(got, recordings[index])

    @settings(deadline=None, max_examples=15)
    @given(st.sets(st.sampled_from(SUPERVISION), min_size=1), st.integers(0, 99), st.integers(1, 5), st.integers(1, 3))
    def test_round_trip_of_any(self, tmp_path_factory, supervision, seed, records, layers):
        names = tuple(f"layer/{i}" for i in range(layers))
        item = example(seed, records=records, layers=names, supervision=sorted(supervision), seed=seed)
        directory = tmp_path_factory.mktemp("any")
        recording_files.save(item, directory, "run")
        assert_equal(recording_files.load(directory)[0], item)

    def test_is_plain_numpy(self, tmp_path):
        item = example(4, supervision=("own_cka", "swap_harm"), seeds=[1, 2])
        with np.load(recording_files.save(item, tmp_path, "run"), allow_pickle=False) as archive:
            assert set(archive) == {
                "format_version",
                "layers",
                "steps",
                "record_every",
                "total_steps",
                "weights",
                "start",
                "losses",
                "first_loss",
                "own_cka",
                "swap_harm",
                "metadata",
            }
            assert archive["format_version"] == 2
            assert (archive["first_loss"].dtype, archive["first_loss"].shape) == (np.float32, ())
            assert archive["record_every"] == 10
            assert archive["layers"].tolist() == ["first", "second"]
            assert json.loads(str(archive["metadata"])) == {"seeds": [1, 2]}
            assert archive["total_steps"] == 45
            np.testing.assert_array_equal(archive["weights"], item.weights)

    def test_is_compressed(self, tmp_path):
        constant = dataclasses.replace(example(), weights=np.ones((4, 2, 10_000)), start=np.ones((2, 10_000)))
        assert recording_files.save(constant, tmp_path, "run").stat().st_size < constant.weights.nbytes / 10

    def test_does_not_overwrite(self, tmp_path):
        path = recording_files.save(example(0), tmp_path, "run")
        before = path.read_bytes()
        with pytest.raises(FileExistsError, match=r"name: .*run.npz exists"):
            recording_files.save(example(1), tmp_path, "run")
        assert path.read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == ["run.npz"]

    @pytest.mark.parametrize("where", ["fsync", "replace"])
    def test_a_failure_while_writing_leaves_nothing_behind(self, tmp_path, monkeypatch, where):
        recording_files.save(example(0), tmp_path, "first")

        def fail(*args):
            raise OSError("disk full")

        with monkeypatch.context() as patch:
            patch.setattr(os, where, fail)
            with pytest.raises(OSError, match="disk full"):
                recording_files.save(example(1), tmp_path, "second")
        assert [file.name for file in tmp_path.iterdir()] == ["first.npz"]
        assert len(recording_files.load(tmp_path)) == 1

    def test_a_file_left_by_a_killed_process_is_not_read(self, tmp_path):
        recording_files.save(example(0), tmp_path, "first")
        (tmp_path / ".second.123.tmp").write_bytes(b"half")
        assert len(recording_files.load(tmp_path)) == 1

    @pytest.mark.parametrize("name", ["", "a/b", "../a", "/a", ".hidden", ".."])
    def test_name_is_a_file_name(self, tmp_path, name):
        with pytest.raises(ValueError, match=r"name: got .*expected a file name"):
            recording_files.save(example(), tmp_path / "inner", name)
        assert not list(tmp_path.rglob("*"))

    def test_nothing_to_load(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"directory: there is no directory .*missing"):
            recording_files.load(tmp_path / "missing")
        with pytest.raises(FileNotFoundError, match=r"directory: .* holds no recordings"):
            recording_files.load(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"path: there is no file .*run\.npz"):
            recording_files.read(tmp_path / "run.npz")

    @pytest.mark.parametrize("damage", ["truncated", "empty", "text", "npy", "flipped"])
    def test_damaged_file_is_named(self, tmp_path, damage):
        recording_files.save(example(0), tmp_path, "good")
        path = recording_files.save(example(1), tmp_path, "late")
        content = path.read_bytes()
        if damage == "npy":
            with path.open("wb") as file:
                np.save(file, np.ones(3))
        else:
            middle = content.index(b"weights.npy") + 40
            path.write_bytes(
                {
                    "truncated": content[: len(content) // 2],
                    "empty": b"",
                    "text": b"no archive",
                    "flipped": content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :],
                }[damage]
            )
        with pytest.raises(ValueError, match=r"^directory: .*late\.npz is not a complete recording"):
            recording_files.load(tmp_path)
        with pytest.raises(ValueError, match=r"^path: .*late\.npz is not a complete recording"):
            recording_files.read(path)

    def write(self, path, **changes):
        arrays = {
            "format_version": np.int64(2),
            "layers": np.array(["first"]),
            "steps": np.arange(2),
            "record_every": np.int64(1),
            "total_steps": np.int64(5),
            "weights": np.ones((2, 1, 3), np.float32),
            "start": np.ones((1, 3), np.float32),
            "losses": np.ones(2, np.float32),
            "first_loss": np.float32(1),
            "cka": np.ones((2, 1), np.float32),
            "metadata": np.array("{}"),
        } | changes
        np.savez(path, **{name: array for name, array in arrays.items() if array is not None})

    def test_a_file_written_by_hand(self, tmp_path):
        others = {"alignment": np.ones((2, 1)), "start_alignment": np.ones(1)}  # older versions wrote these
        self.write(tmp_path / "hand.npz", a_remark=np.array("of no concern"), **others)
        assert recording_files.load(tmp_path)[0].total_steps == 5

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"format_version": np.int64(1)},
                r"version 1, expected 2; record that run again .version 1 lacks its losses",
            ),
            (
                {"format_version": np.int64(3)},
                r"hand\.npz has format version 3, expected 2; .* or read it with the version",
            ),
            ({"format_version": None}, r"hand\.npz is not a complete recording .*format_version"),
            ({"start": None}, r"hand\.npz is not a complete recording .*start"),
            ({"first_loss": None}, r"hand\.npz is not a complete recording .*first_loss"),
            ({"cka": None}, r"hand\.npz is not a complete recording .*cka, own_cka.* got none of them"),
            ({"cka": np.ones((3, 1), np.float32)}, r"hand\.npz is not a complete recording .*cka: got shape \(3, 1\)"),
            ({"metadata": np.array("{")}, r"hand\.npz is not a complete recording .*JSON"),
            ({"layers": np.array([object()])}, r"hand\.npz is not a complete recording .*allow_pickle"),
        ],
    )
    def test_a_file_that_does_not_fit(self, tmp_path, changes, message):
        self.write(tmp_path / "hand.npz", **changes)
        with pytest.raises(ValueError, match=f"^directory: .*{message}"):
            recording_files.load(tmp_path)
        with pytest.raises(ValueError, match=f"^path: .*{message}"):
            recording_files.read(tmp_path / "hand.npz")
