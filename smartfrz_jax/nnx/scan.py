"""Equal blocks in a row, run as one ``jax.lax.scan`` over their stacked weights: a body is traced and compiled once.

Stacking is done inside the compiled step. Outside it, parameters, checkpoints and optimizer state keep one leaf per
block, the same with and without the scan, so that layers freeze one by one. Weights that are stacked outside, as
``nn.scan`` of Linen has them, freeze row by row with ``find_layers(..., rows=True)``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from smartfrz_jax.layers.lookups import Lookup
from smartfrz_jax.pytrees import checks
from smartfrz_jax.pytrees.types import PyTree


def scan_blocks(blocks: Sequence[nnx.Module], x: PyTree, *args: PyTree, live: bool = True) -> PyTree:
    """``x = block(x, *args)`` for one block after another, those that are alike in a row as one scan.

    Blocks are alike if they have equal ``nnx.graphdef``s (structure and static attributes) and equal shapes and dtypes.
    Parameters (``nnx.Param``) are only read; other variables, such as the counts of dropout's random streams, get their
    new values, block by block. A block that shares one of them with a block before it, or that is one of those, comes
    into another scan, for it has to find the new value.

    A scan over frozen and live weights together would save nothing: the gradient of a stack of weights is computed in
    full as soon as one of them wants it. A block that freezes must therefore have a static attribute
    ``frozen_params: frozenset[str]``, empty by default, which :class:`smartfrz_jax.nnx.Optimizer` sets, while it
    differentiates, to the names (relative to the block) of the block's frozen parameters. Blocks of which other
    parameters are frozen are then not alike, and come into separate scans; of those of the frozen blocks, the backward
    pass disappears just as it does without scan. For the same reason the first block that is not wholly frozen runs on
    its own where the gradient of its input is not wanted.

    Args:
        blocks: Modules to be called as ``block(x, *args)``; the result has the structure, shapes and dtypes of ``x``.
        x: Input of the first block.
        *args: Further arguments, the same for each block.
        live: Whether the gradient of ``x`` is wanted, if any is: false where all that comes before is frozen.

    Returns:
        Output of the last block.

    Example:
        >>> blocks = [nnx.Linear(4, 4, rngs=nnx.Rngs(seed)) for seed in range(3)]
        >>> x = jnp.ones((1, 4))
        >>> bool(jnp.allclose(scan_blocks(blocks, x), blocks[2](blocks[1](blocks[0](x))), atol=1e-6))
        True
    """
    checks.instance(blocks, Iterable, "blocks", "a sequence of nnx modules")
    checks.flag(live, "live")
    blocks = tuple(blocks)
    for block in blocks:
        checks.function(block, "blocks", "modules that are called as block(x, *args)")
    for run in _runs(blocks):
        if not live and is_live(run[0]):
            x, run, live = _call(run[0], x, args), run[1:], True
        if run:
            x = _call(run[0], x, args) if len(run) == 1 else _scan(run, x, args)
    return x


def is_live(module: nnx.Module) -> bool:
    """Whether gradients are wanted of what the module gives, called as ``module(x)``, by any of its parameters.

    Those in its ``frozen_params`` do not count, nor does a table whose lookups are there.
    """
    frozen = getattr(module, "frozen_params", frozenset())
    names = ("/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param)))
    return any(frozen.isdisjoint((name, Lookup(name).name)) for name in names)


def _call(block: nnx.Module, x: PyTree, args: tuple[PyTree, ...]) -> PyTree:
    out = block(x, *args)  # pyright: ignore[reportCallIssue]
    if jax.tree.structure(out) != jax.tree.structure(x) or jax.tree.map(jnp.shape, out) != jax.tree.map(jnp.shape, x):
        raise ValueError(
            f"blocks: got an output of shape {jax.tree.map(jnp.shape, out)} from a {type(block).__name__}, expected "
            f"that of its input, {jax.tree.map(jnp.shape, x)}; call what changes the shape outside scan_blocks"
        )
    return out


def _runs(blocks: Iterable[nnx.Module]) -> Iterator[list[nnx.Module]]:
    """Blocks in a row that are alike and share no variables but parameters."""
    for _, alike in itertools.groupby(blocks, _kind):
        run: list[nnx.Module] = []
        seen: set[int] = set()
        for block in alike:
            changing = {
                id(value)
                for _, value in nnx.iter_graph(block)
                if isinstance(value, nnx.Variable) and not isinstance(value, nnx.Param)
            }
            if run and changing & seen:
                yield run
                run, seen = [], set()
            run.append(block)
            seen |= changing
        yield run


def _kind(block: nnx.Module) -> tuple[Any, ...]:
    graphdef, variables = nnx.split(block)
    leaves, structure = jax.tree.flatten(nnx.as_pure(variables))
    return graphdef, structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _scan(blocks: Sequence[nnx.Module], x: PyTree, args: tuple[PyTree, ...]) -> PyTree:
    graphdef = nnx.graphdef(blocks[0])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[_split(block) for block in blocks])

    def body(x: PyTree, variables: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        block = nnx.merge(graphdef, *variables, copy=True)
        return _call(block, x, args), _split(block)[1]

    x, updated = jax.lax.scan(body, x, stacked)
    for i, block in enumerate(blocks):
        nnx.update(block, jax.tree.map(lambda leaf, i=i: leaf[i], updated))
    return x


def _split(block: nnx.Module) -> tuple[PyTree, PyTree]:
    _, params, rest = nnx.split(block, nnx.Param, ...)
    return nnx.as_pure(params), nnx.as_pure(rest)
