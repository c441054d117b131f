"""Weights of the networks in safetensors files, under the names of torchvision, timm and Hugging Face, both ways.

Files from the Hugging Face hub are read as they are. A ``.pth`` or ``.bin`` of PyTorch is converted once, where torch
is installed::

    import torch, safetensors.torch
    tensors = torch.load("resnet50.pth", map_location="cpu", weights_only=True)
    tensors = tensors.get("model", tensors)  # DeiT's files have the tensors under "model"
    safetensors.torch.save_file({name: x.contiguous() for name, x in tensors.items()}, "resnet50.safetensors")

Layouts: kernels of convolutions are ``(height, width, in, out)`` here and ``(out, in, height, width)`` there, those of
linear layers ``(in, out)`` and ``(out, in)``; all else is the same.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax.tree_util import keystr

from models.deit import DeiT
from models.layers.positions import resample_pos_embed
from smartfrz_jax.pytrees.file_paths import Path, PathLike, as_path, is_remote

# Buffers that hold no weights: a counter, indices 0, 1, 2, ..., and frequencies of rotary positions.
_IGNORED = re.compile(r"(^|\.)(num_batches_tracked|position_ids|token_type_ids|rotary_emb\.inv_freq)$")
# The layer, or layers, whose width is the number of classes: torchvision's ResNet; the EfficientNet port; timm; VGG,
# MobileNetV2 and Hugging Face; and Hugging Face's heads of pretraining and of other tasks.
_HEAD = re.compile(r"^(_?fc|head(_dist)?|classifier(\.[16])?|qa_outputs|lm_head)\.(weight|bias)$|^cls\.")
# Belongs to the head in so far as only one side may have it: files of masked language models and networks with
# pool="mean" are without it.
_POOLER = re.compile(r"^(bert\.)?pooler\.")
_POSITIONS, _DISTILLED = "pos_embed", "dist_token"
_TODAY = {"gamma": "weight", "beta": "bias"}
_METADATA = {"format": "pt"}  # transformers insists on it
_WEIGHTS = (nnx.Param, nnx.BatchStat)


def load(
    model: nnx.Module, path: PathLike, *, prefix: str = "", new_head: bool = False, resample: bool = False
) -> None:
    """Reads a model's parameters and statistics from a safetensors file.

    Args:
        model: A network of this package; set in place, or left as it was if anything does not fit. Values are cast to
            the dtypes it has, and go where its arrays are.
        path: The file. An encoder without a head and without the prefix ``bert.`` is read too, and so are Hugging
            Face's old names (``gamma``, ``beta``). From a decoder without a head one with a head gets the embedding.
        prefix: What is taken off the names in the file, such as ``module.`` of DataParallel, ``_orig_mod.`` of
            ``torch.compile`` or ``model.`` of Lightning.
        new_head: Whether to keep the model's own, fresh head, whatever head the file has or lacks.
        resample: Whether position embeddings of a DeiT for another image size are resampled to this network's.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a complete safetensors file, or tensors are missing, left over, of another shape, NaN
            or infinite, or variances are negative; all of them are named.

    Example:
        >>> import pathlib, tempfile
        >>> from models.resnet import BasicBlock, ResNet
        >>> network = lambda classes: ResNet((1,), (4,), BasicBlock, num_classes=classes, rngs=nnx.Rngs(classes))
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "network.safetensors"
        >>> save(network(10), path)
        >>> load(network(10), path)
        >>> load(network(3), path, new_head=True)
    """
    set_tensors(
        model, _read(as_path(path)), prefix=prefix, new_head=new_head, resample=resample, source=f"path: {path}"
    )


def save(model: nnx.Module, path: PathLike, *, dtype: Any = None, overwrite: bool = False) -> None:
    """Writes a model's parameters and statistics as a safetensors file that the original library reads.

    Args:
        model: A network of this package.
        path: The file to make, atomically.
        dtype: Type to store; that of each array by default.
        overwrite: Whether to replace a file that is there.

    Raises:
        FileExistsError: If ``path`` exists and ``overwrite`` is false.
        FileNotFoundError: If its directory does not exist.
        ValueError: If a value is too large for ``dtype``.
    """
    path = as_path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"path: {path} exists; choose another name or pass overwrite=True")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: there is no directory {path.parent} to save in; make it first")
    tensors = {
        name: _cast(name, value, value.dtype if dtype is None else dtype) for name, value in get_tensors(model).items()
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if is_remote(partial):
            partial.write_bytes(safetensors.numpy.save(tensors, _METADATA))
        else:
            safetensors.numpy.save_file(tensors, partial, metadata=_METADATA)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def get_tensors(model: nnx.Module, values: Any = None) -> dict[str, np.ndarray]:
    """Parameters and statistics under the names, and in the layout, of the original library.

    The arrays are contiguous; safetensors would store the memory of others without regard to their strides.

    Args:
        model: A network of this package.
        values: Other arrays to name, such as gradients: an ``nnx.State`` with a part of the model's paths.
    """
    leaves, _ = _flatten(nnx.state(model, _WEIGHTS) if values is None else values)
    return {
        _tensor_name(model, name): np.ascontiguousarray(_to_torch(name, np.asarray(leaf)))
        for name, leaf in leaves.items()
    }


def set_tensors(
    model: nnx.Module,
    tensors: Mapping[str, np.ndarray],
    *,
    prefix: str = "",
    new_head: bool = False,
    resample: bool = False,
    source: str = "tensors",
) -> None:
    """Sets a model's parameters and statistics from arrays in memory; otherwise like :func:`load`.

    Args:
        model: A network of this package.
        tensors: Arrays under the names, and in the layout, of the original library.
        prefix: What is taken off the names of ``tensors``.
        new_head: Whether to keep the model's own head.
        resample: Whether to resample position embeddings.
        source: Where the tensors come from, for the error.

    Raises:
        TypeError: If the model's class does not say how the original library calls its variables.
        ValueError: If tensors are missing, left over, of another shape, NaN or infinite, or variances are negative; all
            of them are named.
    """
    leaves, treedef = _flatten(nnx.state(model, _WEIGHTS))
    names = {name: _tensor_name(model, name) for name in leaves}
    _check_prefix(tensors, prefix, set(names.values()), source)
    found = _tied(model, _renamed(tensors, set(names.values()), prefix), set(names.values()))
    expected = {
        tensor: _to_torch(name, np.broadcast_to(np.float32(0), leaves[name].shape)).shape
        for name, tensor in names.items()
    }
    if new_head:
        own = {tensor for tensor in {*found, *expected} if _HEAD.search(tensor)}
        own |= {tensor for tensor in found.keys() ^ expected.keys() if _POOLER.search(tensor)}
        found = {tensor: value for tensor, value in found.items() if tensor not in own}
        expected = {tensor: shape for tensor, shape in expected.items() if tensor not in own}
    same_kind = (_DISTILLED in found) == (_DISTILLED in expected)
    if resample and isinstance(model, DeiT) and _POSITIONS in found and same_kind:
        found[_POSITIONS] = _resampled(model, found[_POSITIONS])
    _check(found, expected, source, type(model).__name__)
    _check_values({name: found[tensor] for name, tensor in names.items() if tensor in expected}, names, source)
    values = [
        _placed(_cast(tensor, _from_torch(name, found[tensor]), leaf.dtype), leaf) if tensor in expected else leaf
        for (name, tensor), leaf in zip(names.items(), leaves.values(), strict=True)
    ]
    nnx.update(model, treedef.unflatten(values))


def _flatten(state: Any) -> tuple[dict[str, Any], Any]:
    named, treedef = jax.tree_util.tree_flatten_with_path(nnx.as_pure(state))
    return {keystr(path, simple=True, separator="/"): leaf for path, leaf in named}, treedef


def _tensor_name(model: Any, name: str) -> str:
    if not hasattr(type(model), "tensor_name"):
        raise TypeError(
            f"model: got {type(model).__name__}, expected a network whose class has a static method tensor_name, which "
            "turns a variable's name into that of its tensor; give it one"
        )
    return type(model).tensor_name(name)


def _to_torch(name: str, value: np.ndarray) -> np.ndarray:
    if not name.endswith("/kernel"):
        return value
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T


def _from_torch(name: str, value: np.ndarray) -> np.ndarray:
    if not name.endswith("/kernel"):
        return value
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def _cast(name: str, value: np.ndarray, dtype: Any) -> np.ndarray:
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"tensors: {name} is {value.dtype}, expected floating-point numbers; convert it first")
    with np.errstate(over="ignore"):
        cast = value.astype(dtype)
    if not np.isfinite(cast).all() and np.isfinite(value).all():
        raise ValueError(f"dtype: {name} has values too large for {np.dtype(dtype)}; choose bfloat16 or float32")
    return cast


def _resampled(model: DeiT, pos_embed: np.ndarray) -> np.ndarray:
    patch = model.patch_embed.proj.kernel_size
    rows, columns = (side // size for side, size in zip(model.image_shape, patch, strict=False))
    tokens = 2 if model.distilled else 1
    return np.asarray(resample_pos_embed(jnp.asarray(pos_embed), (rows, columns), prefix_tokens=tokens))


def _placed(value: np.ndarray, like: Any) -> jax.Array:
    return jax.device_put(value, getattr(like, "sharding", None))


def _renamed(tensors: Mapping[str, np.ndarray], known: set[str], prefix: str = "") -> dict[str, np.ndarray]:
    """Without prefix and buffers, and with Hugging Face's old names and those of a bare encoder made today's."""
    found = {}
    for name, value in tensors.items():
        name = name.removeprefix(prefix)
        if _IGNORED.search(name):
            continue
        today = re.sub(r"LayerNorm\.(gamma|beta)$", lambda old: f"LayerNorm.{_TODAY[old[1]]}", name)
        found[f"bert.{today}" if f"bert.{today}" in known else today] = value
    return found


def _tied(model: nnx.Module, found: dict[str, np.ndarray], known: set[str]) -> dict[str, np.ndarray]:
    """With the head that the file of a tied network lacks, or without one that is stored though it is tied."""
    for tensor, other in getattr(type(model), "same_tensors", {}).items():
        if tensor in known and other in found:
            found.setdefault(tensor, found[other])
        elif tensor in found and other in found and np.array_equal(found[tensor], found[other]):
            del found[tensor]
    return found


def _check_prefix(tensors: Mapping[str, np.ndarray], prefix: str, known: set[str], source: str) -> None:
    """Checks that the names are not those of the network behind another prefix, such as ``module.``."""

    def hits(candidate: str) -> int:
        return len(known & _renamed(tensors, known, candidate).keys())

    if 2 * hits(prefix) > len(known):
        return
    parts = [name.split(".") for name in tensors]
    candidates = {".".join([*part[:depth], ""]) for part in parts for depth in (1, 2) if len(part) > depth}
    best = max(sorted(candidates), key=hits, default="")
    if 2 * hits(best) > len(known):
        begin = sum(name.startswith(best) for name in tensors)
        raise ValueError(
            f"{source}: {begin} of the {len(tensors)} names begin with {best!r}, expected those of the network"
            f"{f' behind {prefix!r}' if prefix else ''}; take it off with prefix={best!r} (of train.finetune: "
            f"--weights-prefix {best})"
        )


def _check_values(found: Mapping[str, np.ndarray], names: Mapping[str, str], source: str) -> None:
    """Checks that all is finite, and no variance negative."""
    lines = [
        f"  {names[name]} has {wrong} of {value.size} values {what}"
        for name, value in found.items()
        for what, wrong in (
            ("NaN or infinite", value.size - np.count_nonzero(np.isfinite(value))),
            ("below 0, though it is a variance", np.count_nonzero(value < 0) if name.endswith("/var") else 0),
        )
        if wrong
    ]
    if lines:
        lines = [f"{source}: expected finite numbers, and no negative variance", *lines]
        raise ValueError(
            "\n".join([*lines, "choose another file: the run that made this one diverged, or it is damaged"])
        )


def _check(found: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]], source: str, network: str) -> None:
    missing = [name for name in expected if name not in found]
    surplus = [name for name in found if name not in expected]
    reshaped = [name for name in expected if name in found and found[name].shape != expected[name]]
    if not (missing or surplus or reshaped):
        return
    lines = [f"{source}: the tensors do not fit this {network}"]
    lines += [f"  missing: {name}, expected {list(expected[name])}" for name in missing]
    lines += [f"  left over: {name} {list(found[name].shape)}" for name in surplus]
    lines += [
        f"  other shape: {name} is {list(found[name].shape)}, expected {list(expected[name])}" for name in reshaped
    ]
    names = missing + surplus + reshaped
    distilled = _DISTILLED in found
    other_kind = distilled != (_DISTILLED in expected) and _POSITIONS in found.keys() & expected.keys()
    if other_kind:
        lines.append(
            f"the file is of a network that is {'' if distilled else 'not '}distilled: build it with "
            f"distilled={distilled} (of train.finetune: --model deit-tiny{'-distilled' if distilled else ''})"
        )
        names = [name for name in names if name not in (_DISTILLED, _POSITIONS) and not name.startswith("head_dist.")]
    heads = [name for name in names if _HEAD.search(name) or _POOLER.search(name)]
    if heads:
        lines.append("to keep this network's own, fresh head, pass new_head=True (of train.finetune: --head new)")
    if _POSITIONS in reshaped and not other_kind and found[_POSITIONS].shape[2:] == expected[_POSITIONS][2:]:
        lines.append(
            "to resample the position embeddings of another image size, pass resample=True (train.finetune does so "
            "for --weights; for --reference, take the --image-size that it was trained with)"
        )
    if set(names) - {_POSITIONS, *heads}:
        lines.append("build the network with the options that the file was made with, or choose another file")
    raise ValueError("\n".join(lines))


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        there = "is a directory" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"path: {path} {there}; expected a safetensors file")
    try:
        return safetensors.numpy.load(path.read_bytes()) if is_remote(path) else safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        with path.open("rb") as file:
            start = file.read(2)
        if start in (b"PK", b"\x80\x02"):
            cure = "it looks like a file of torch.save: convert it as the docstring of models.weights says"
        else:
            cure = "it is cut off, damaged or something else: copy or download it again"
        raise ValueError(f"path: {path} is not a complete safetensors file ({error}); {cure}") from error
