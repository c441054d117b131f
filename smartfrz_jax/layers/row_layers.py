"""Layers of stacked blocks, one for each row that a scan reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from smartfrz_jax.jaxprs.row_axes import Scan
from smartfrz_jax.layers.layers import Layer, Layers
from smartfrz_jax.layers.rows import Row
from smartfrz_jax.pytrees import paths


def by_row(
    layers: Layers,
    leaves: Mapping[str, Any],
    scans: Sequence[Scan],
    is_kernel: Callable[[str, Any], bool],
    rank: Mapping[str, tuple[int, ...]],
) -> Layers:
    """The layers, with one for each row in place of those that a scan reads row by row.

    What belongs to such a layer beside its rows, as a normalisation behind the last block, goes to the last row; or to
    the first, if it is used before.

    Args:
        layers: The layers.
        leaves: Parameters by name.
        scans: What the scans of the forward pass read.
        is_kernel: Whether a parameter, of that name and with that leaf, stands for its layer.
        rank: Where each parameter, and each variable of the state, is used first.
    """
    found: list[Layer] = []
    for layer in layers:
        scan = _scan_of(layer, leaves, scans)
        found.extend([layer] if scan is None else _rows(layer, leaves, scan, is_kernel, rank))
    return Layers(tuple(found))


def _scan_of(layer: Layer, leaves: Mapping[str, Any], scans: Sequence[Scan]) -> Scan | None:
    """What is read of a layer, if every scan reads it in the same way, and it is more than a table of vectors."""
    own = [scan for scan in scans if not scan.axes.keys().isdisjoint(layer.params)]
    axes: dict[str, int] = {}
    for scan in own:
        if (scan.length, scan.reverse) != (own[0].length, own[0].reverse):
            return None
        for name, axis in scan.axes.items():
            if axes.setdefault(name, axis) != axis:
                return None
    if not any(name in leaves and len(leaves[name].shape) > 2 for name in axes):
        return None
    return own[0]._replace(axes=axes)


def _rows(
    layer: Layer,
    leaves: Mapping[str, Any],
    scan: Scan,
    is_kernel: Callable[[str, Any], bool],
    rank: Mapping[str, tuple[int, ...]],
) -> list[Layer]:
    start = min(rank[name] for name in layer.params if name in scan.axes)
    before = tuple(name for name in layer.params if name not in scan.axes and rank[name] < start)
    after = tuple(name for name in layer.params if name not in scan.axes and name not in before)
    order = range(scan.length)[:: -1 if scan.reverse else 1]
    shapes = {n: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for n, leaf in leaves.items()}
    found = []
    for index in order:
        rows = {name: Row(name, scan.axes[name], index) for name in (*layer.params, *layer.state) if name in scan.axes}
        params = tuple(rows[name].name for name in layer.params if name in rows)
        kernels = tuple(
            row.name for name, row in rows.items() if name in leaves and is_kernel(name, row.of(shapes[name]))
        )
        state = tuple(rows[name].name if name in rows else name for name in layer.state)
        name = f"{layer.name}{paths.SEPARATOR}{index}"
        found.append(Layer(name, params, kernels or params, state, tuple(rows.values())))
    found[0] = dataclasses.replace(found[0], params=(*before, *found[0].params))
    found[-1] = dataclasses.replace(found[-1], params=(*found[-1].params, *after))
    return found
