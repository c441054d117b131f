"""Figure 3: do 1024 sampled weights have the gradients of their layer? Of every layer, with a distance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax.layers.layers import Layer
from smartfrz_jax.pytrees import paths
from train.data.open import open_data
from train.finetune import batches_of, make_model
from train.options import Options
from train.train_step import loss_fn

if TYPE_CHECKING:
    from jaxtyping import Float

SIZE = 1024
_DRAWS = 3  # samples of each layer; figures are means over them
_BINS = 41
_RANGE = 3.0  # standard deviations of the layer's gradient; what is beyond falls into the outer bins
_ATTENTION = ("attn", "attention")
_EMBEDDINGS = ("embedding", "pos_embed", "cls_token", "dist_token")  # the last ones of DeiT

Kind = Literal[
    "first layer", "convolution", "1 x 1 convolution", "depthwise convolution", "dense", "attention", "embedding",
    "head",
]  # fmt: skip


def measure(options: Options, steps: int) -> dict[str, Any]:
    """Takes some plain gradient steps, and compares the gradients of the next batch with samples of them.

    Args:
        options: What is trained, and on what, as by ``train.finetune``; of the optimizer only the rate.
        steps: Steps before.

    Returns:
        ``layers``: for every layer its kind, weights and figures of :func:`compare`; ``histograms``: of the middle
        layer of each kind; ``steps``.
    """
    run = options.run
    data, _ = open_data(options.data, options.network.reads, batch_size=run.batch_size, seed=run.seed)
    model = make_model(options.network, image_size=options.data.image_size, num_classes=data.num_classes, seed=run.seed)
    batches = [data.augment(key, inputs, labels) for key, inputs, labels in batches_of(data, 0, steps + 1, "no")]
    layers = sfj.nnx.find_layers(model, *batches[0][0])
    graphdef, own, rest = nnx.split(model, nnx.Param, ...)
    params, others, rate = jax.device_get(nnx.as_pure(own)), nnx.as_pure(rest), options.optimizer.learning_rate

    @jax.jit
    def gradients_at(params: Any, inputs: tuple[jax.Array, ...], labels: jax.Array) -> Any:
        return jax.grad(lambda params: loss_fn(nnx.merge(graphdef, params, others, copy=True), inputs, labels))(params)

    for step in range(steps):  # on the host: an optimizer would be one more program to compile
        gradients = gradients_at(params, *batches[step])
        params = jax.tree.map(lambda a, b: a - np.float32(rate) * np.asarray(b), params, gradients)
    return of_gradients(layers, gradients_at(params, *batches[steps])) | {"steps": steps}


def of_gradients(layers: sfj.Layers, gradients: Any) -> dict[str, Any]:
    """The row of some gradients, but for ``steps``; see :func:`measure`."""
    tailorings = [sfj.predictor.Tailoring.create(layers, gradients, size=SIZE, seed=seed) for seed in range(_DRAWS)]
    samples = np.stack([np.asarray(tailoring(gradients)) for tailoring in tailorings])
    leaves = paths.flatten(jax.device_get(gradients))
    table, whole = [], {}
    for place, layer in enumerate(layers):
        whole[layer.name] = np.concatenate([np.ravel(leaves[name]) for name in layer.kernels]).astype(np.float32)
        kind = kind_of(layer, np.shape(leaves[layer.kernels[0]]), place, len(layers))
        table.append({"layer": layer.name, "kind": kind} | compare(whole[layer.name], samples[:, place]))
    histograms = {}
    for kind in dict.fromkeys(row["kind"] for row in table):
        names = [row["layer"] for row in table if row["kind"] == kind]
        middle = names[len(names) // 2]
        histograms[kind] = histogram(whole[middle], samples[0, layers.names.index(middle)]) | {"layer": middle}
    return {"layers": table, "histograms": histograms}


def kind_of(layer: Layer, shape: Sequence[int], place: int, layers: int) -> Kind:
    """What kind a layer is, by its place, its name and the shape of its kernel."""
    if layer.kernels[0].rpartition("/")[2] in _EMBEDDINGS:
        return "embedding"
    if place == layers - 1:
        return "head"
    if place == 0:
        return "first layer"
    if len(shape) == 4:
        if shape[2] == 1:
            return "depthwise convolution"
        return "1 x 1 convolution" if shape[:2] == (1, 1) else "convolution"
    return "attention" if any(word in layer.name for word in _ATTENTION) else "dense"


def compare(whole: Float[np.ndarray, " n"], samples: Float[np.ndarray, "draws size"]) -> dict[str, Any]:
    """How far samples are from the layer that they were drawn from.

    Args:
        whole: All values.
        samples: Several samples of them.

    Returns:
        ``weights``: their number; ``distance``: of Kolmogorov and Smirnov, mean over the samples; ``size_error``: root
        of the mean square of the error of the sample's root mean square, as a share of the whole's; ``zeros``: share
        of zeros; ``tail``: kurtosis, 3 for a normal distribution.
    """
    size = float(np.sqrt(np.mean(whole.astype(np.float64) ** 2)))
    sampled = np.sqrt(np.mean(samples.astype(np.float64) ** 2, axis=1))
    centred = whole - whole.mean(dtype=np.float64)
    variance = np.mean(centred**2)
    return {
        "weights": len(whole),
        "distance": _rounded(np.mean([distance(whole, sample) for sample in samples])),
        "size_error": _rounded(np.sqrt(np.mean((sampled / size - 1) ** 2))) if size else 0.0,
        "zeros": _rounded(np.mean(whole == 0)),
        "tail": _rounded(np.mean(centred**4) / variance**2) if variance else 0.0,
    }


def distance(whole: Float[np.ndarray, " n"], sample: Float[np.ndarray, " size"]) -> float:
    """Kolmogorov and Smirnov's: the largest difference of the two distribution functions, from 0 to 1."""
    values, counts = np.unique(sample, return_counts=True)
    up_to = np.cumsum(counts) / len(sample)
    # Between two values of the sample its function is flat, so the largest difference is at one of them or just below.
    at_most = np.bincount(np.searchsorted(values, whole, side="left"), minlength=len(values) + 1)
    below = np.bincount(np.searchsorted(values, whole, side="right"), minlength=len(values) + 1)
    at = np.abs(np.cumsum(at_most)[:-1] / len(whole) - up_to)
    just_below = np.abs(np.cumsum(below)[:-1] / len(whole) - (up_to - counts / len(sample)))
    return float(np.maximum(at, just_below).max())


def histogram(whole: Float[np.ndarray, " n"], sample: Float[np.ndarray, " size"]) -> dict[str, Any]:
    """Shares of both in bins of equal width, and how many standard deviations these reach to either side."""
    scale = float(whole.std()) or 1.0
    edges = np.linspace(-_RANGE, _RANGE, _BINS + 1)
    shares = [np.histogram(np.clip(part / scale, -_RANGE, _RANGE), edges)[0] / len(part) for part in (whole, sample)]
    return {
        "range": _RANGE,
        "whole": [_rounded(share) for share in shares[0]],
        "sample": [_rounded(share) for share in shares[1]],
    }


def by_kind(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The layers of several networks, by kind."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        for layer in row["layers"]:
            found.setdefault(layer["kind"], []).append(layer)
    return found


def _rounded(value: Any) -> float:
    return float(f"{float(value):.4g}")
