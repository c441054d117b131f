"""Small NNX networks, each with another module between two linear layers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tests.differential import nnx_modules as own

WIDTH = 8
FLAT = jax.random.normal(jax.random.key(0), (4, WIDTH))
SEQUENCE = jax.random.normal(jax.random.key(1), (2, 3, WIDTH))
IMAGE = jax.random.normal(jax.random.key(2), (2, 4, 4, WIDTH))
WORDS = jnp.arange(8, dtype=jnp.int32).reshape(2, 4) % 5


class Net(nnx.Module):
    """A linear layer, something, another linear layer; the attributes not in forward order."""

    def __init__(self, middle: Callable[[nnx.Rngs], nnx.Module], call: Callable[..., Any], rngs: nnx.Rngs):
        self.a_head = nnx.Linear(WIDTH, 2, rngs=rngs)
        self.middle = middle(rngs)
        self.z_front = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.call = call

    def __call__(self, x, *args):
        return self.a_head(self.call(self.middle, self.z_front(x), *args))


@dataclasses.dataclass(frozen=True)
class Model:
    """A network, and what is to happen if what is in the middle is frozen.

    Attributes:
        middle: Makes the module in the middle.
        x: The batch.
        call: Calls that module.
        frozen: Where the variables are that freeze with it, as beginnings of their names.
        make: Makes the network, if it is not a ``Net``.
        wrt: Which variables train.
        streams: Whether the network gets random streams as a further argument.
        compiled: Whether steps are compiled; if not, because two programs of it differ in rounding.
    """

    middle: Callable[[nnx.Rngs], Any]
    x: jax.Array = dataclasses.field(default_factory=lambda: FLAT)
    call: Callable[..., Any] = lambda module, x: module(x)
    frozen: tuple[str, ...] = ("middle",)
    make: Callable[[nnx.Rngs], nnx.Module] | None = None
    wrt: Any = nnx.Param
    streams: bool = False
    compiled: bool = True

    @functools.cached_property
    def _network(self) -> nnx.Module:
        rngs = nnx.Rngs(0, dropout=1)
        network = self.make(rngs) if self.make else Net(self.middle, self.call, rngs)
        network.train()
        return network

    def network(self) -> nnx.Module:
        """A new one, always with the same numbers."""
        return nnx.clone(self._network)


def norm(make: Callable[[nnx.Rngs], nnx.Module], x: jax.Array = FLAT) -> Model:
    """A module without a kernel belongs to the layer before it."""
    return Model(make, x, frozen=("middle", "z_front"))


def recurrent(cell: type[nnx.Module]) -> Model:
    return Model(lambda rngs: nnx.RNN(cell(WIDTH, WIDTH, rngs=rngs)), SEQUENCE)


def whole(make: Callable[[nnx.Rngs], nnx.Module], x: jax.Array = FLAT, **options: Any) -> Model:
    return Model(lambda rngs: None, x, make=make, **options)


def linear(rngs: nnx.Rngs, **options: Any) -> nnx.Linear:
    return nnx.Linear(WIDTH, WIDTH, rngs=rngs, **options)


def conv(rngs: nnx.Rngs, **options: Any) -> nnx.Conv:
    return nnx.Conv(WIDTH, WIDTH, (3, 3), rngs=rngs, **options)


def attention(rngs: nnx.Rngs, **options: Any) -> nnx.MultiHeadAttention:
    return nnx.MultiHeadAttention(2, WIDTH, rngs=rngs, **({"decode": False} | options))


def decoding(rngs: nnx.Rngs) -> nnx.MultiHeadAttention:
    module = attention(rngs, decode=True)
    module.init_cache((2, 3, WIDTH))
    return module


def decode(module: nnx.MultiHeadAttention, x: jax.Array) -> jax.Array:
    module.init_cache(x.shape)
    return jnp.concatenate([module(x[:, i : i + 1]) for i in range(x.shape[1])], axis=1)


MODELS: dict[str, Model] = {
    "linear": Model(linear),
    "linear without bias": Model(lambda rngs: linear(rngs, use_bias=False)),
    "linear general": Model(lambda rngs: nnx.LinearGeneral(WIDTH, WIDTH, axis=-1, rngs=rngs)),
    "einsum": Model(lambda rngs: nnx.Einsum("bi,ij->bj", (WIDTH, WIDTH), (WIDTH,), rngs=rngs)),
    "conv": Model(conv, IMAGE),
    "depthwise conv": Model(lambda rngs: conv(rngs, feature_group_count=WIDTH), IMAGE),
    "conv of a sequence": Model(lambda rngs: nnx.Conv(WIDTH, WIDTH, (3,), rngs=rngs), SEQUENCE),
    "transposed conv": Model(lambda rngs: nnx.ConvTranspose(WIDTH, WIDTH, (3, 3), rngs=rngs), IMAGE),
    "embedding": whole(own.Words, WORDS, frozen=("embed",)),
    "tied embedding": whole(own.Tied, WORDS, frozen=("embed",)),
    "batch norm": norm(lambda rngs: nnx.BatchNorm(WIDTH, rngs=rngs)),
    "batch norm without parameters": norm(
        lambda rngs: nnx.BatchNorm(WIDTH, use_scale=False, use_bias=False, rngs=rngs), IMAGE
    ),
    "layer norm": norm(lambda rngs: nnx.LayerNorm(WIDTH, rngs=rngs)),
    "rms norm": norm(lambda rngs: nnx.RMSNorm(WIDTH, rngs=rngs)),
    "group norm": norm(lambda rngs: nnx.GroupNorm(WIDTH, num_groups=2, rngs=rngs), IMAGE),
    "instance norm": norm(lambda rngs: nnx.InstanceNorm(WIDTH, rngs=rngs), IMAGE),
    "weight norm": Model(lambda rngs: nnx.WeightNorm(linear(rngs), rngs=rngs)),
    "weight norm without scale": Model(lambda rngs: nnx.WeightNorm(linear(rngs), use_scale=False, rngs=rngs)),
    "weight norm of a conv": Model(lambda rngs: nnx.WeightNorm(conv(rngs), rngs=rngs), IMAGE),
    "spectral norm": Model(lambda rngs: nnx.SpectralNorm(linear(rngs), rngs=rngs)),
    "spectral norm of a conv": Model(lambda rngs: nnx.SpectralNorm(conv(rngs), n_steps=2, rngs=rngs), IMAGE),
    "dropout": norm(lambda rngs: nnx.Dropout(0.5, rngs=rngs)),
    "dropout without a stream": Model(
        own.Dropping, call=lambda module, x, rngs: module(x, rngs), frozen=("z_front",), streams=True
    ),
    "attention": Model(attention, SEQUENCE, lambda module, x: module(x)),
    "attention with dropout": Model(lambda rngs: attention(rngs, dropout_rate=0.5), SEQUENCE, compiled=False),
    "attention with norms": Model(lambda rngs: attention(rngs, normalize_qk=True), SEQUENCE, compiled=False),
    "attention with a cache": Model(decoding, SEQUENCE, decode),
    "simple rnn": recurrent(nnx.SimpleCell),
    "lstm": recurrent(nnx.LSTMCell),
    "optimized lstm": recurrent(nnx.OptimizedLSTMCell),
    "gru": recurrent(nnx.GRUCell),
    "bidirectional": Model(
        lambda rngs: nnx.Bidirectional(
            nnx.RNN(nnx.GRUCell(WIDTH, 4, rngs=rngs)), nnx.RNN(nnx.GRUCell(WIDTH, 4, rngs=rngs))
        ),
        SEQUENCE,
    ),
    "lora": Model(lambda rngs: nnx.LoRA(WIDTH, 2, WIDTH, base_module=linear(rngs), rngs=rngs)),
    "lora alone trains": Model(
        lambda rngs: nnx.LoRALinear(WIDTH, WIDTH, lora_rank=2, rngs=rngs), wrt=nnx.Any(nnx.LoRAParam, own.of_head)
    ),
    "mixture of experts": Model(own.Experts, frozen=("middle",)),
    "one layer twice": Model(linear, call=lambda module, x: module(nnx.relu(module(x)))),
    "shared kernel": Model(own.SharedKernel),
    "scanned": Model(own.Scanned),
    "vmapped": Model(own.Vmapped),
    "remat": Model(linear, call=lambda module, x: nnx.remat(lambda module, x: module(x))(module, x)),
    "residual blocks": Model(own.Residual),
    "prelu": norm(lambda rngs: nnx.PReLU()),
    "bfloat16 parameters": Model(lambda rngs: linear(rngs, param_dtype=jnp.bfloat16)),
    "bfloat16 computation": Model(lambda rngs: linear(rngs, dtype=jnp.bfloat16)),
    "complex": Model(own.Complex),
    "own statistics": Model(own.Centered),
    "own counter": Model(own.Counting),
    "own parameter that it writes": Model(own.Clipped),
    "sown": Model(own.Sowing),
    "noise": Model(own.Noisy, frozen=("z_front",)),
    "from Linen": Model(own.from_linen),
}

# One of each kind of state and of sharing, for the quick subset.
QUICK = {
    "linear",
    "tied embedding",
    "batch norm",
    "weight norm",
    "dropout without a stream",
    "lora alone trains",
    "own parameter that it writes",
    "sown",
}
