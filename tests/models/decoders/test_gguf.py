"""GGUF files: the same network as before it was written, dequantised by the formats' formulas; what is refused."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from models import gguf as reader
from models import weights
from tests.models.decoders.gguf_writer import write_gguf
from tests.models.transformers import RNG, call, lively, tiny_llama
from tests.support.rounding import assert_close

gguf = pytest.importorskip("gguf", reason="needs the package gguf: pip install 'smartfrz_jax[llm]'")

IDS = jnp.asarray(RNG.integers(0, 20, size=(2, 6)), jnp.int32)
SIZES = {"dim": 32, "heads": 4, "kv_heads": 2, "hidden": 64}
HEADS = {"heads": 4, "kv_heads": 2, "rope_theta": 50.0}


def network(**kwargs):
    return lively(partial(tiny_llama, **SIZES, **kwargs))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_network_is_the_same_when_it_is_read(tied, tmp_path):
    model = network(tied=tied)
    write_gguf(tmp_path / "model.gguf", weights.get_tensors(model), **HEADS)
    read = reader.llama(tmp_path / "model.gguf")
    expected = weights.get_tensors(model)
    assert weights.get_tensors(read).keys() == expected.keys()
    for name, value in weights.get_tensors(read).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    assert (read.tied, read.rope_theta, read.norm.epsilon) == (tied, 50.0, 1e-5)
    assert_close(call(read, IDS), call(model, IDS))


@pytest.mark.slow
def test_arguments_go_before_the_files_and_a_head_of_its_own_starts_as_the_embedding(tmp_path):
    model = network()
    write_gguf(tmp_path / "model.gguf", weights.get_tensors(model), **HEADS)
    read = reader.llama(tmp_path / "model.gguf", tied=False, scan=True, param_dtype=jnp.bfloat16)
    assert read.scan
    np.testing.assert_array_equal(read.lm_head.kernel[...], read.embed_tokens.embedding[...].T)
    assert read.lm_head.kernel.dtype == jnp.bfloat16


def by_formula(kind, rows):
    """What blocks of 32 numbers stand for, in float64, from their bytes."""
    blocks = rows.reshape(-1, {"Q8_0": 34, "Q4_1": 20}[kind])
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float64)
    if kind == "Q8_0":
        values = scale * blocks[:, 2:].copy().view(np.int8)
    else:  # a minimum; the low halves of the bytes, then the high ones
        least = blocks[:, 2:4].copy().view(np.float16).astype(np.float64)
        values = scale * np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1) + least
    return values.reshape(rows.shape[0], -1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_quantised_matrices_are_what_the_format_says_and_near_what_they_were(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    tensors = weights.get_tensors(network())
    write_gguf(tmp_path / "model.gguf", tensors, kind=kind, **HEADS)
    read = reader.read(tmp_path / "model.gguf").tensors
    for name, value in tensors.items():
        if value.ndim == 1:
            np.testing.assert_array_equal(read[name], value)
            continue
        half_a_step = {"Q8_0": 1 / 254, "Q4_1": 1 / 15}[kind.name] * np.abs(value).max()
        assert np.abs(read[name] - value).max() <= 1.13 * half_a_step, "and the rounding of its scale to float16"
        if "q_proj" not in name and "k_proj" not in name:
            assert_close(read[name], by_formula(kind.name, gguf.quantize(value, kind)))


@pytest.mark.slow
def test_what_is_not_a_llama_is_refused(tmp_path, monkeypatch):
    path, tensors = tmp_path / "model.gguf", weights.get_tensors(network())
    with pytest.raises(FileNotFoundError, match=r"path: .*model.gguf is not there"):
        reader.llama(path)
    with pytest.raises(ValueError, match=r"path: got gs://bucket/model.gguf, expected a local file"):
        reader.llama("gs://bucket/model.gguf")
    path.write_bytes(b"GGML" * 10)
    with pytest.raises(ValueError, match=r"is not a complete GGUF file"):
        reader.llama(path)
    write_gguf(path, tensors, architecture="qwen2", **HEADS)
    with pytest.raises(ValueError, match=r"general.architecture 'qwen2', expected 'llama'"):
        reader.llama(path)
    write_gguf(path, tensors, **HEADS)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"is not a complete GGUF file"):
        reader.llama(path)
    monkeypatch.setitem(reader._PARTS, "attn_q", "self_attn.q_norm")
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"missing: model.layers.0.self_attn.q_proj.weight"):
        reader.llama(path)
