import dataclasses
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from smartfrz_jax import Tailoring, find_layers, recording
from smartfrz_jax.cka import linear_cka
from smartfrz_jax.recording import Recorder, Recording

BATCH = jnp.asarray(np.random.default_rng(0).standard_normal((6, 4)), jnp.float32)


def forward(params, x):
    return x @ params["first"]["kernel"] @ params["second"]["kernel"]


def outputs(params, x=BATCH):
    hidden = x @ params["first"]["kernel"]
    return {"second": hidden @ params["second"]["kernel"], "first": hidden}


def parameters(seed):
    rng = np.random.default_rng(seed)
    return {
        name: {"kernel": jnp.asarray(rng.standard_normal(shape), jnp.float32)}
        for name, shape in (("first", (4, 5)), ("second", (5, 3)))
    }


REFERENCE = parameters(0)
LAYERS = find_layers(REFERENCE, forward, BATCH)
TAILORING = Tailoring.create(LAYERS, REFERENCE, size=7)


def recorder():
    return Recorder(LAYERS, TAILORING, outputs(REFERENCE))


def example(seed=0, /, records=4, layers=("first", "second"), size=3, **metadata):
    rng = np.random.default_rng(seed)
    return Recording(
        layers=layers,
        steps=np.arange(records) * 10,
        weights=rng.standard_normal((records, len(layers), size)).astype(np.float32),
        cka=rng.random((records, len(layers))).astype(np.float32),
        total_steps=10 * records,
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
            assert a == b


class TestRecorder:
    def test_records_weights_and_cka_of_every_layer(self):
        rec = recorder()
        runs = {0: parameters(1), 5: parameters(2), 20: REFERENCE}
        for step, params in runs.items():
            rec.record(step, params, outputs(params))
        got = rec.finish(30, architecture="two linear maps", seed=3)
        assert got.layers == ("first", "second")
        assert (got.total_steps, got.metadata) == (30, {"architecture": "two linear maps", "seed": 3})
        assert got.steps.tolist() == [0, 5, 20]
        assert (got.steps.dtype, got.weights.dtype, got.cka.dtype) == (np.int64, np.float32, np.float32)
        assert got.weights.shape == (3, 2, 7)
        for record, params in enumerate(runs.values()):
            np.testing.assert_array_equal(got.weights[record], TAILORING(params))
            for layer, name in enumerate(got.layers):
                expected = linear_cka(outputs(params)[name], outputs(REFERENCE)[name])
                np.testing.assert_allclose(got.cka[record, layer], expected, rtol=1e-6)
        np.testing.assert_allclose(got.cka[2], 1.0, rtol=1e-6)
        assert (got.cka[:2] < 0.99).all()

    def test_features_of_what_is_not_a_layer_are_ignored(self):
        rec = Recorder(LAYERS, TAILORING, outputs(REFERENCE) | {"other": jnp.ones((3, 1))})
        rec.record(0, REFERENCE, outputs(REFERENCE) | {"another": jnp.ones((2, 1))})
        np.testing.assert_allclose(rec.finish(1).cka, 1.0, rtol=1e-6)

    def test_tailoring_of_other_layers(self):
        other = find_layers({"x": {"kernel": jnp.eye(4)}}, lambda p, x: x @ p["x"]["kernel"], BATCH)
        with pytest.raises(
            ValueError, match=r"tailoring: made for other layers .2 from 'first' on. than layers .1 from 'x'"
        ):
            Recorder(other, TAILORING, {"x": BATCH})

    def test_missing_outputs(self):
        with pytest.raises(ValueError, match="reference_features: lacks the output of 1 of 2 layers: 'second'"):
            Recorder(LAYERS, TAILORING, {"first": BATCH})
        rec = recorder()
        with pytest.raises(ValueError, match="features: lacks the output of 1 of 2 layers: 'first'"):
            rec.record(0, REFERENCE, {"second": BATCH})

    def test_another_batch(self):
        with pytest.raises(ValueError, match=r"features\['first'\].*got 5 and 6 examples"):
            recorder().record(0, REFERENCE, outputs(REFERENCE, BATCH[:5]))

    def test_steps_may_be_arrays(self):
        rec = recorder()
        for step in (jnp.int32(3), np.int64(7)):
            rec.record(step, REFERENCE, outputs(REFERENCE))
        got = rec.finish(jnp.int32(9))
        assert got.steps.tolist() == [3, 7]
        assert type(got.total_steps) is int

    def test_steps_ascend(self):
        rec = recorder()
        with pytest.raises(ValueError, match="step: got -1, expected 0 or more"):
            rec.record(-1, REFERENCE, outputs(REFERENCE))
        with pytest.raises(TypeError, match=r"step: got .*1.5.*expected an integer"):
            rec.record(1.5, REFERENCE, outputs(REFERENCE))
        rec.record(5, REFERENCE, outputs(REFERENCE))
        for step in (5, 4):
            with pytest.raises(ValueError, match=f"step: got {step} after 5"):
                rec.record(step, REFERENCE, outputs(REFERENCE))
        assert rec.finish(5).steps.tolist() == [5]

    def test_non_finite_values_name_layer_and_step_and_are_not_recorded(self):
        rec = recorder()
        rec.record(0, REFERENCE, outputs(REFERENCE))
        bad = REFERENCE | {"second": {"kernel": jnp.full((5, 3), jnp.nan)}}
        with pytest.raises(ValueError, match="weights: not finite for layer 'second' at step 7"):
            rec.record(7, bad, outputs(REFERENCE))
        with pytest.raises(ValueError, match="cka: not finite for layer 'first' at step 7"):
            rec.record(7, REFERENCE, outputs(REFERENCE) | {"first": BATCH.at[0, 0].set(jnp.inf)})
        rec.record(7, REFERENCE, outputs(REFERENCE))
        assert rec.finish(7).steps.tolist() == [0, 7]

    def test_finish(self):
        rec = recorder()
        with pytest.raises(ValueError, match="nothing was recorded"):
            rec.finish(3)
        rec.record(9, REFERENCE, outputs(REFERENCE))
        with pytest.raises(ValueError, match="total_steps: got 8, expected at least the last recorded step, 9"):
            rec.finish(8)
        with pytest.raises(ValueError, match="metadata: JSON cannot hold it"):
            rec.finish(9, weights=np.ones(3))
        with pytest.raises(ValueError, match="metadata: JSON cannot hold it"):
            rec.finish(9, loss=float("nan"))


class TestRecording:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"steps": np.zeros((0,), np.int64)}, r"steps, layers: got steps of shape \(0,\)"),
            ({"steps": np.zeros((4, 1), np.int64)}, r"steps, layers: got steps of shape \(4, 1\)"),
            ({"steps": np.int64(3)}, r"steps, layers: got steps of shape \(\)"),
            ({"layers": ()}, "and 0 layers"),
            ({"layers": ("first",)}, r"weights: got shape \(4, 2, 3\), expected \(4, 1, size\)"),
            ({"weights": np.zeros((4, 2, 0), np.float32)}, "at least one weight each"),
            ({"weights": np.zeros((4, 2), np.float32)}, r"weights: got shape \(4, 2\)"),
            ({"cka": np.zeros((3, 2), np.float32)}, r"cka: got shape \(3, 2\), expected \(4, 2\)"),
            ({"steps": np.array([0, 2, 2, 3])}, "step: got 2 after 2"),
            ({"total_steps": 29}, "total_steps: got 29"),
            ({"cka": np.array([[0, 0], [0, 0], [0, np.nan], [0, 0]])}, "cka: not finite for layer 'second' at step 20"),
            ({"metadata": {"path": object()}}, "metadata: JSON cannot hold it"),
        ],
    )
    def test_refuses_what_does_not_fit(self, change, message):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(example(), **change)

    def test_refuses_other_kinds_of_numbers(self):
        with pytest.raises(TypeError, match="steps: got dtype float64, expected int64"):
            dataclasses.replace(example(), steps=np.arange(4.0))
        with pytest.raises(TypeError, match="cka: got dtype complex128, expected float32"):
            dataclasses.replace(example(), cka=np.ones((4, 2), complex))

    def test_casts_to_the_stated_dtypes(self):
        got = dataclasses.replace(example(), steps=np.arange(4, dtype=np.int16), weights=np.ones((4, 2, 3)))
        assert (got.steps.dtype, got.weights.dtype) == (np.int64, np.float32)

    def test_metadata_is_as_it_will_be_read(self):
        assert example(shape=(1, 2)).metadata == {"shape": [1, 2]}


class TestFiles:
    def test_round_trip_and_append(self, tmp_path):
        directory = tmp_path / "made" / "here"
        recordings = [example(seed, records=3 + seed, seed=seed, note="é") for seed in range(3)]
        before = {}
        for name, item in zip(["b", "c", "a"], recordings, strict=True):
            path = recording.save(item, directory, name)
            assert path == directory / f"{name}.npz"
            assert all(file.read_bytes() == content for file, content in before.items())
            before[path] = path.read_bytes()
        assert sorted(file.name for file in directory.iterdir()) == ["a.npz", "b.npz", "c.npz"]
        for got, index in zip(recording.load(directory), [2, 0, 1], strict=True):
            assert_equal(got, recordings[index])

    def test_is_plain_numpy(self, tmp_path):
        item = example(4, seeds=[1, 2])
        with np.load(recording.save(item, tmp_path, "run"), allow_pickle=False) as archive:
            assert set(archive) == {"format_version", "layers", "steps", "weights", "cka", "total_steps", "metadata"}
            assert archive["format_version"] == 1
            assert archive["layers"].tolist() == ["first", "second"]
            assert json.loads(str(archive["metadata"])) == {"seeds": [1, 2]}
            assert archive["total_steps"] == 40
            np.testing.assert_array_equal(archive["weights"], item.weights)

    def test_is_compressed(self, tmp_path):
        constant = dataclasses.replace(example(), weights=np.ones((4, 2, 10_000), np.float32))
        assert recording.save(constant, tmp_path, "run").stat().st_size < constant.weights.nbytes / 10

    def test_does_not_overwrite(self, tmp_path):
        path = recording.save(example(0), tmp_path, "run")
        before = path.read_bytes()
        with pytest.raises(FileExistsError, match=r"name: .*run.npz exists"):
            recording.save(example(1), tmp_path, "run")
        assert path.read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == ["run.npz"]

    @pytest.mark.parametrize("where", ["fsync", "replace"])
    def test_a_failure_while_writing_leaves_nothing_behind(self, tmp_path, monkeypatch, where):
        recording.save(example(0), tmp_path, "first")

        def fail(*args):
            raise OSError("disk full")

        with monkeypatch.context() as patch:
            patch.setattr(os, where, fail)
            with pytest.raises(OSError, match="disk full"):
                recording.save(example(1), tmp_path, "second")
        assert [file.name for file in tmp_path.iterdir()] == ["first.npz"]
        assert len(recording.load(tmp_path)) == 1

    def test_a_file_left_by_a_killed_process_is_not_read(self, tmp_path):
        recording.save(example(0), tmp_path, "first")
        (tmp_path / ".second.123.tmp").write_bytes(b"half")
        assert len(recording.load(tmp_path)) == 1

    @pytest.mark.parametrize("name", ["", "a/b", "../a", "/a", ".hidden", ".."])
    def test_name_is_a_file_name(self, tmp_path, name):
        with pytest.raises(ValueError, match=r"name: got .*expected a file name"):
            recording.save(example(), tmp_path / "inner", name)
        assert not list(tmp_path.rglob("*"))

    def test_nothing_to_load(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"directory: there is no directory .*missing"):
            recording.load(tmp_path / "missing")
        with pytest.raises(FileNotFoundError, match=r"directory: .* holds no recordings"):
            recording.load(tmp_path)

    @pytest.mark.parametrize("damage", ["truncated", "empty", "text", "npy", "flipped"])
    def test_damaged_file_is_named(self, tmp_path, damage):
        recording.save(example(0), tmp_path, "good")
        path = recording.save(example(1), tmp_path, "late")
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
        with pytest.raises(ValueError, match=r"late\.npz is not a complete recording"):
            recording.load(tmp_path)

    def write(self, path, **changes):
        arrays = {
            "format_version": np.int64(1),
            "layers": np.array(["first"]),
            "steps": np.arange(2),
            "weights": np.ones((2, 1, 3), np.float32),
            "cka": np.ones((2, 1), np.float32),
            "total_steps": np.int64(5),
            "metadata": np.array("{}"),
        } | changes
        np.savez(path, **{name: array for name, array in arrays.items() if array is not None})

    def test_a_file_written_by_hand(self, tmp_path):
        self.write(tmp_path / "hand.npz")
        assert recording.load(tmp_path)[0].total_steps == 5

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"format_version": np.int64(2)}, r"hand\.npz has format version 2, expected 1"),
            ({"format_version": None}, r"hand\.npz is not a complete recording .*format_version"),
            ({"cka": None}, r"hand\.npz is not a complete recording .*cka"),
            ({"cka": np.ones((3, 1), np.float32)}, r"hand\.npz is not a complete recording .*cka: got shape \(3, 1\)"),
            ({"metadata": np.array("{")}, r"hand\.npz is not a complete recording .*JSON"),
            ({"layers": np.array([object()])}, r"hand\.npz is not a complete recording .*allow_pickle"),
        ],
    )
    def test_a_file_that_does_not_fit(self, tmp_path, changes, message):
        self.write(tmp_path / "hand.npz", **changes)
        with pytest.raises(ValueError, match=message):
            recording.load(tmp_path)
