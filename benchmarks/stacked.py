"""Blocks stacked for a scan, some rows frozen, against the same blocks unrolled and against the scan as it is.

A decoder-like stack of attention and MLP blocks, of Linen (``nn.scan``) and of NNX (``nnx.scan``), with 12 and 30
blocks. For each frozen set: FLOPs of the step by its equations, loops as often as they run, over those of the network
unrolled; temporary bytes of the compiled step and bytes of optimizer state, over those with nothing frozen; processor
time of compiling it, over that of the scan that nothing splits.

Usage: python -m benchmarks.stacked [--depth 12 30] [--network linen flax_nnx] [--frozen "front half" ...]
           [--out benchmarks/stacked.jsonl]
       python -m benchmarks.stacked --table benchmarks/stacked.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax.cost.step_program import StepProgram

WIDTH, HEADS, LENGTH, BATCH = 64, 4, 32, 8
TX = optax.adamw(1e-3)


class LinenBlock(nn.Module):
    """A block of attention and an MLP."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        """The output, and nothing."""
        x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x))
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x)))), None


class NNXBlock(nnx.Module):
    """The same of NNX."""

    def __init__(self, rngs: nnx.Rngs):
        self.first, self.second = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The output."""
        x = x + self.attention(self.first(x))
        return x + self.down(nnx.gelu(self.up(self.second(x))))


class Network(NamedTuple):
    """A network, stacked and unrolled.

    Attributes:
        params: Its parameters, stacked.
        scan: The blocks by a scan, of ``(rows, x)``.
        block: One block, of ``(row, x)``.
    """

    params: Any
    scan: Callable[..., jax.Array]
    block: Callable[..., jax.Array]


def linen(depth: int) -> Network:
    """The network of Linen."""
    scanned = nn.scan(LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=depth)()
    rows = jax.eval_shape(scanned.init, jax.random.key(0), jnp.ones((BATCH, LENGTH, WIDTH)), None)["params"]
    return Network(
        _params(rows),
        lambda rows, x: scanned.apply({"params": rows}, x, None)[0],
        lambda row, x: LinenBlock().apply({"params": row}, x)[0],
    )


def flax_nnx(depth: int) -> Network:
    """The network of NNX."""
    make = nnx.split_rngs(splits=depth)(nnx.vmap(NNXBlock))
    graphdef, rows = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    run = nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    return Network(
        _params(nnx.as_pure(rows)),
        lambda rows, x: run(nnx.merge(graphdef, rows), x),
        lambda row, x: nnx.merge(graphdef, row)(x),
    )


NETWORKS = (linen, flax_nnx)


def _params(rows: Any) -> Any:
    shape = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
    return {"stem": shape, "blocks": nnx.to_pure_dict(rows) if isinstance(rows, nnx.State) else rows, "head": shape}


def losses(network: Network, depth: int) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """The loss of the scan, and that of the network unrolled, of rows by name."""

    def by_scan(params: Any, x: jax.Array) -> jax.Array:
        return jnp.square(network.scan(params["blocks"], x @ params["stem"]) @ params["head"]).mean()

    leaves, structure = jax.tree_util.tree_flatten_with_path(network.params["blocks"])
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]

    def unrolled(params: Any, x: jax.Array) -> jax.Array:
        x = x @ params["stem"]
        for row in range(depth):
            x = network.block(jax.tree.unflatten(structure, [params[f"blocks/{name}[{row}]"] for name in names]), x)
        return jnp.square(x @ params["head"]).mean()

    return by_scan, unrolled


def step_of(loss: Callable[..., jax.Array], frozen: sfj.Frozen) -> Any:
    """A train step, jitted."""
    tx = sfj.freeze(TX, frozen)

    def step(params: Any, opt_state: Any, x: jax.Array) -> Any:
        value, grads = sfj.value_and_grad(loss, frozen)(params, x)
        updates, opt_state = tx.update(grads, opt_state, params)
        return value, sfj.apply_updates(params, updates, frozen), opt_state

    return jax.jit(step, donate_argnums=(0, 1))


def measured(loss: Callable[..., jax.Array], params: Any, frozen: sfj.Frozen) -> dict[str, float]:
    """FLOPs, bytes and seconds of a step."""
    opt_state = jax.eval_shape(sfj.freeze(TX, frozen).init, params)
    x = jax.ShapeDtypeStruct((BATCH, LENGTH, WIDTH), jnp.float32)
    traced = step_of(loss, frozen).trace(params, opt_state, x)
    lowered = traced.lower()
    start = time.process_time()
    compiled = lowered.compile()
    return {
        "flops": StepProgram(traced.jaxpr, "cpu").cost(),
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "optimizer": sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(opt_state)),
        "compile": time.process_time() - start,
    }


def sets(depth: int) -> dict[str, list[str]]:
    """Frozen sets by name."""
    blocks = [f"blocks/{row}" for row in range(depth)]
    return {
        "nothing": [],
        "front third": ["stem", *blocks[: depth // 3]],
        "front half": ["stem", *blocks[: depth // 2]],
        "all but two": ["stem", *blocks[:-2]],
        "every other": ["stem", *blocks[::2]],
        "one block trains": ["stem", *blocks[: depth // 2], *blocks[depth // 2 + 1 :], "head"],
    }


def run(make: Callable[[int], Network], depth: int, only: list[str]) -> Iterator[dict[str, Any]]:
    """A line for each frozen set; for nothing frozen, and the sets of ``only``, if there are any."""
    network = make(depth)
    by_scan, unrolled = losses(network, depth)
    x = jax.ShapeDtypeStruct((BATCH, LENGTH, WIDTH), jnp.float32)
    layers = sfj.find_layers(network.params, by_scan, x, rows=True)
    rows = layers.unstacked(network.params)
    base: dict[str, float] = {}
    for name, names in sets(depth).items():
        if only and name not in ("nothing", *only):
            continue
        got = measured(by_scan, network.params, sfj.Frozen(layers, names))
        base = base or got
        plain = jax.make_jaxpr(sfj.value_and_grad(unrolled, sfj.Frozen(layers.of_parts, names)))(rows, x)
        own = jax.make_jaxpr(sfj.value_and_grad(by_scan, sfj.Frozen(layers, names)))(network.params, x)
        yield {
            "network": make.__name__,
            "blocks": depth,
            "frozen": name,
            "flops_over_unrolled": round(StepProgram(own, "cpu").cost() / StepProgram(plain, "cpu").cost(), 4),
            **{f"{key}_over_nothing_frozen": round(got[key] / base[key], 3) for key in got},
        }


def table(lines: list[dict[str, Any]]) -> str:
    """The lines as a table in Markdown."""
    head = ("network", "blocks", "frozen", "FLOPs / unrolled", "FLOPs", "temporary", "optimizer", "compiling")
    rows = [head, tuple("---" for _ in head)]
    rows += [tuple(str(value) for value in line.values()) for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Measures, or prints the table of what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--depth", type=int, nargs="+", default=[12, 30])
    parser.add_argument("--network", choices=[make.__name__ for make in NETWORKS], nargs="+")
    parser.add_argument("--frozen", nargs="+", default=[])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table([json.loads(line) for line in arguments.table.read_text().splitlines()]))
        return
    for depth in arguments.depth:
        for make in NETWORKS:
            if arguments.network and make.__name__ not in arguments.network:
                continue
            for line in run(make, depth, arguments.frozen):
                print(json.dumps(line), flush=True)
                if arguments.out is not None:
                    with arguments.out.open("a") as file:
                        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
