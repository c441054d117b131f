"""Memory of a train step of large decoders, by part, for each frozen set: from shapes alone, nothing is allocated.

Each block is under ``jax.checkpoint``. Where blocks are stacked and only some of them frozen, XLA also copies the rows
of the split scan and pads their gradients with zeros: these bytes are told apart. Over several chips,
parameters, gradients and moments are sharded (FSDP); each chip gathers one layer at a time, in the type it computes in.

Usage: python -m benchmarks.decoder.memory
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.extend import core as jex

import smartfrz_jax as sfj
from models.layers.decoder import causal_mask, rotary_angles
from models.llama import Llama
from train.data.language.perplexity import next_token_loss

LLAMA2 = {
    "Llama-2 7B": {},
    "Llama-2 70B": {"dim": 8192, "depth": 80, "heads": 64, "kv_heads": 8, "hidden": 28672},
}
CHIPS = (8, 64)
TOKENS = 2048  # of the one sequence on each chip
_DRAWS = 12  # of a policy that draws, of which the one with the most memory counts


class Decoder(NamedTuple):
    """A decoder of stacked blocks.

    Attributes:
        params: Shapes of its parameters.
        layers: Its layers: embeddings, blocks, and norm with head.
        loss: Of ``(params, input_ids, segment_ids, labels)``.
        inside: Bytes that the backward pass of one block reads.
        tail: Bytes that the backward pass of norm, head and loss reads, and the gradient of the logits.
        batch: Shapes of the arguments of the loss behind the parameters.
        x: Shape of the residual stream.
    """

    params: dict[str, Any]
    layers: sfj.Layers
    loss: Callable[..., Any]
    inside: int
    tail: int
    batch: tuple[jax.ShapeDtypeStruct, ...]
    x: jax.ShapeDtypeStruct


class Memory(NamedTuple):
    """Bytes of one chip.

    Attributes:
        parameters: Weights.
        gradients: Of what trains.
        moments: The state of the optimizer.
        activations: What the backward pass keeps: inputs of blocks, and the inside of one block or of the loss.
        gathered: The largest layer, in the type to compute in, and the largest gradient; 0 on one chip.
        copies: Where blocks are stacked and some of them frozen, not counted in ``total``: at most the rows once more,
            and zeros for the gradients of the frozen ones.
    """

    parameters: float
    gradients: float
    moments: float
    activations: float
    gathered: float
    copies: float

    @property
    def total(self) -> float:
        """All of them, but for the copies."""
        return sum(self[:-1])


def decoder(depth: int, sequences: int, tokens: int, *, dtype: Any = jnp.bfloat16, **sizes: Any) -> Decoder:
    """A decoder with a head of its own, as shapes.

    Args:
        depth: Number of blocks.
        sequences: In a batch.
        tokens: Of a sequence.
        dtype: To compute in; parameters are float32.
        **sizes: Of :class:`models.llama.Llama`.
    """
    model = nnx.eval_shape(lambda: Llama(**sizes, depth=1, tied=False, dtype=dtype, rngs=nnx.Rngs(0)))
    parts = {name: getattr(model, name) for name in ("embed_tokens", "norm", "lm_head")} | {"layers": model.layers[0]}
    split = {name: nnx.split(part) for name, part in parts.items()}
    params = {name: nnx.as_pure(state) for name, (_, state) in split.items()}
    params["layers"] = jax.tree.map(lambda leaf: _shape((depth, *leaf.shape), leaf.dtype), params["layers"])

    def part(name: str, params: Any) -> Any:
        return nnx.merge(split[name][0], params)

    def run(params: Any, x: jax.Array, segment_ids: jax.Array) -> jax.Array:
        angles = rotary_angles(tokens, model.head_width, model.rope_theta, x.dtype)
        return part("layers", params)(x, causal_mask(tokens, segment_ids), angles)

    def tail(params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
        return next_token_loss(part("lm_head", params["lm_head"])(part("norm", params["norm"])(x)), labels)

    def loss(params: Any, input_ids: jax.Array, segment_ids: jax.Array, labels: jax.Array) -> jax.Array:
        @jax.checkpoint
        def body(x: jax.Array, block: Any) -> tuple[jax.Array, None]:
            return run(block, x, segment_ids), None

        x, _ = jax.lax.scan(body, part("embed_tokens", params["embed_tokens"])(input_ids), params["layers"])
        return tail(params, x, labels)

    def block(params: Any, x: jax.Array) -> jax.Array:
        return run(params, x, jnp.ones((sequences, tokens), jnp.int32))

    batch = (_shape((sequences, tokens), jnp.int32),) * 3
    layers = sfj.find_layers(params, loss, *batch, granularity="block", rows=True)
    vocabulary, dim = params["embed_tokens"]["embedding"].shape
    x = _shape((sequences, tokens, dim), dtype)
    one_block = jax.tree.map(lambda leaf: _shape(leaf.shape[1:], leaf.dtype), params["layers"])
    of_tail = _residuals(tail, {name: params[name] for name in ("norm", "lm_head")}, x, batch[-1])
    of_tail += 4 * sequences * tokens * vocabulary
    return Decoder(params, layers, loss, _residuals(block, one_block, x), of_tail, batch, x)


def predict(of: Decoder, frozen: sfj.Frozen, tx: optax.GradientTransformation, *, chips: int = 1) -> Memory:
    """Memory of a step, on each of some chips.

    Args:
        of: The decoder; its batch is one chip's.
        frozen: The frozen set.
        tx: The optimizer.
        chips: That share parameters, gradients and moments evenly.
    """
    moments = _bytes(jax.eval_shape(sfj.freeze(tx, frozen).init, of.params))
    sizes, blocks = _layer_sizes(of), [name for name in of.layers.names if name.startswith("layers/")]
    trains = [name for name in of.layers.names if name not in frozen.names]
    through = [] if not trains else blocks[sum(name in frozen.names for name in _front(of, trains)) :]
    activations = len(through) * _bytes(of.x) + max(of.inside if through else 0, of.tail)
    computed = jnp.dtype(of.x.dtype).itemsize
    gathered = computed * (max(sizes.values()) + max(map(sizes.__getitem__, trains), default=0)) if chips > 1 else 0
    gradients = 4 * sum(map(sizes.__getitem__, trains))
    held = len([name for name in blocks if name in frozen.names])
    copies = 4 * sizes[blocks[0]] * (len(blocks) + held) if 0 < held < len(blocks) else 0
    sharded = (_bytes(of.params) / chips, gradients / chips, moments / chips)
    return Memory(*sharded, activations, gathered, copies / chips)


def _front(of: Decoder, trains: list[str]) -> Iterator[str]:
    """Blocks before the first layer that trains."""
    for name in of.layers.names:
        if name in trains:
            return
        if name.startswith("layers/"):
            yield name


def sets(layers: sfj.Layers) -> dict[str, list[sfj.Frozen]]:
    """Frozen sets to compare; of policies that draw, several."""
    depth, names = len(layers.names) - 2, layers.names
    found = {"nothing": [sfj.Frozen(layers)]}
    for share in (0.25, 0.5, 0.75):
        front = frozenset(names[: 1 + round(share * depth)])
        found[f"embedding and the first {share:.0%} of the blocks"] = [sfj.Frozen(layers, front)]
    rotating = {
        'all but 2 blocks and the rest: `lisa(rest="train")`': sfj.policies.lisa(2, rest="train"),
        'all but 2 blocks and the head: `lisa(rest="freeze")`': sfj.policies.lisa(2, rest="freeze"),
        'all but 2 blocks: `lisa(rest="freeze", keep=())`': sfj.policies.lisa(2, rest="freeze", keep=()),
        "all but 1 block and the head: `badam()`": sfj.policies.badam(),
        "all but 1 block: `badam(keep=())`": sfj.policies.badam(keep=()),
    }
    for name, policy in rotating.items():
        found[name] = list(_drawn(policy, layers))
    found["all but the head"] = [sfj.Frozen(layers, frozenset(names[:-1]))]
    return found


def _drawn(policy: sfj.Policy, layers: sfj.Layers) -> Iterator[sfj.Frozen]:
    params: dict[str, Any] = {}
    state = policy.init(layers, params)
    for step in range(0, 100 * _DRAWS, 100):
        frozen, state = policy.update(state, layers, step=step, params=lambda: params)
        yield sfj.Frozen(layers, frozenset(frozen))


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        decoder: Name of the network.
        chips: Number of them.
        frozen: What is frozen.
        memory: Of one chip.
    """

    decoder: str
    chips: int
    frozen: str
    memory: Memory


def rows(decoders: Mapping[str, Mapping[str, Any]] = LLAMA2, tokens: int = TOKENS) -> list[Row]:
    """The table: AdamW, one sequence on each chip."""
    found, tx = [], optax.adamw(1e-5)
    for name, sizes in decoders.items():
        of = decoder(**{"depth": 32, **sizes}, sequences=1, tokens=tokens)
        for label, frozen in sets(of.layers).items():
            for chips in CHIPS:
                most = max((predict(of, one, tx, chips=chips) for one in set(frozen)), key=lambda one: one.total)
                found.append(Row(name, chips, label, most))
    return sorted(found, key=lambda row: (list(decoders).index(row.decoder), row.chips))


def table(found: list[Row]) -> str:
    """The rows as Markdown, in GiB, and in all relative to nothing frozen."""
    whole = math.nan
    head = ("frozen", *Memory._fields[:-1], "all", "of nothing frozen", "if stacked, also")
    text = ""
    for number, row in enumerate(found):
        if number == 0 or (row.decoder, row.chips) != (found[number - 1].decoder, found[number - 1].chips):
            text += f"\n**{row.decoder}, {row.chips} chips**, GiB a chip:\n\n| {' | '.join(head)} |\n|---|"
            text += "---:|" * (len(head) - 1) + "\n"
            whole = row.memory.total
        cells = [f"{part / 2**30:.1f}" for part in (*row.memory[:-1], row.memory.total)]
        cells += [f"{row.memory.total / whole:.0%}", f"{row.memory.copies / 2**30:.1f}"]
        text += f"| {row.frozen} | {' | '.join(cells)} |\n"
    return text


def _residuals(function: Callable[..., Any], *args: Any) -> int:
    """Bytes that the backward pass of a function reads, apart from its arguments."""
    closed = jax.make_jaxpr(lambda *args: jax.tree.leaves(jax.vjp(function, *args)[1]))(*args)
    known = {*closed.jaxpr.invars, *closed.jaxpr.constvars}
    kept = {var for var in closed.jaxpr.outvars if not isinstance(var, jex.Literal)} - known
    return sum(_bytes(_shape(var.aval.shape, var.aval.dtype)) for var in kept)


def _layer_sizes(of: Decoder) -> dict[str, int]:
    """Number of parameters of each layer."""
    embedding, tail = (
        sum(leaf.size for leaf in jax.tree.leaves([of.params[name] for name in names]))
        for names in (("embed_tokens",), ("norm", "lm_head"))
    )
    stack = jax.tree.leaves(of.params["layers"])
    sizes = dict.fromkeys(of.layers.names, sum(leaf.size // leaf.shape[0] for leaf in stack))
    return sizes | {of.layers.names[0]: embedding, of.layers.head: tail}


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _shape(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


if __name__ == "__main__":
    print(table(rows()))
