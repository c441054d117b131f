"""Small Linen networks, each with another module between two dense layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from tests.differential import linen_modules as own

WIDTH = 8
FLAT = jax.random.normal(jax.random.key(0), (4, WIDTH))
SEQUENCE = jax.random.normal(jax.random.key(1), (2, 3, WIDTH))
IMAGE = jax.random.normal(jax.random.key(2), (2, 4, 4, WIDTH))
WORDS = jnp.arange(8, dtype=jnp.int32).reshape(2, 4) % 5


def plain(module: nn.Module, x: jax.Array, train: bool) -> jax.Array:
    return module(x)  # pyright: ignore[reportCallIssue]


def running(module: nn.Module, x: jax.Array, train: bool) -> jax.Array:
    return module(x, use_running_average=not train)  # pyright: ignore[reportCallIssue]


def dropping(module: nn.Module, x: jax.Array, train: bool) -> jax.Array:
    return module(x, deterministic=not train)  # pyright: ignore[reportCallIssue]


def training(module: nn.Module, x: jax.Array, train: bool) -> jax.Array:
    return module(x, train)  # pyright: ignore[reportCallIssue]


def updating(module: nn.Module, x: jax.Array, train: bool) -> jax.Array:
    return module(x, update_stats=train)  # pyright: ignore[reportCallIssue]


class Net(nn.Module):
    """A dense layer, something, another dense layer; the names sort against the order of use."""

    middle: Callable[..., nn.Module]
    call: Callable[..., Any]

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(WIDTH, name="z_front")(x)
        return nn.Dense(2, name="a_head")(self.call(self.middle(), x, train))


@dataclasses.dataclass(frozen=True)
class Model:
    """A network, and what is to happen if what is in the middle is frozen.

    Attributes:
        middle: Makes the module in the middle, whose name is to be ``"middle"``.
        x: The batch.
        call: Calls that module; its last argument is false when that is in evaluation mode.
        frozen: Where the variables are that freeze with it, as beginnings of their names.
        make: Makes the network, if it is not a ``Net``.
    """

    middle: Callable[[], Any]
    x: jax.Array = dataclasses.field(default_factory=lambda: FLAT)
    call: Callable[..., Any] = plain
    frozen: tuple[str, ...] = ("middle",)
    make: Callable[[], nn.Module] | None = None

    def network(self) -> nn.Module:
        return self.make() if self.make else Net(self.middle, self.call)


def norm(middle: Callable[[], nn.Module], x: jax.Array = FLAT, call: Callable[..., Any] = plain) -> Model:
    """A module without a kernel belongs to the layer before it."""
    return Model(middle, x, call, frozen=("middle", "z_front"))


def recurrent(cell: type[nn.Module]) -> Model:
    return Model(lambda: nn.RNN(cell(WIDTH), name="middle"), SEQUENCE)


def of(kind: Callable[..., Any], *args: Any, **options: Any) -> Callable[[], Any]:
    return lambda: kind(*args, **options, name="middle")


def attention(**options: Any) -> Callable[[], Any]:
    return lambda: own.Attention(options, name="middle")


MODELS: dict[str, Model] = {
    "dense": Model(of(nn.Dense, WIDTH)),
    "dense without bias": Model(of(nn.Dense, WIDTH, use_bias=False)),
    "dense general": Model(of(nn.DenseGeneral, WIDTH)),
    "einsum": Model(of(nn.Einsum, (WIDTH, WIDTH), "bi,ij->bj")),
    "conv": Model(of(nn.Conv, WIDTH, (3, 3)), IMAGE),
    "depthwise conv": Model(of(nn.Conv, WIDTH, (3, 3), feature_group_count=WIDTH), IMAGE),
    "conv of a sequence": Model(of(nn.Conv, WIDTH, (3,)), SEQUENCE),
    "local conv": Model(of(nn.ConvLocal, WIDTH, (3, 3)), IMAGE),
    "transposed conv": Model(of(nn.ConvTranspose, WIDTH, (3, 3)), IMAGE),
    "embedding": Model(lambda: None, WORDS, make=own.Words, frozen=("embed",)),
    "tied embedding": Model(lambda: None, WORDS, make=own.Tied, frozen=("embed",)),
    "batch norm": norm(of(nn.BatchNorm), call=running),
    "batch norm without parameters": norm(of(nn.BatchNorm, use_scale=False, use_bias=False), IMAGE, running),
    "layer norm": norm(of(nn.LayerNorm)),
    "rms norm": norm(of(nn.RMSNorm)),
    "group norm": norm(of(nn.GroupNorm, num_groups=2), IMAGE),
    "instance norm": norm(of(nn.InstanceNorm), IMAGE),
    "weight norm": Model(
        lambda: nn.WeightNorm(nn.Dense(WIDTH, name="inside"), name="middle"), frozen=("middle", "inside")
    ),
    "spectral norm": Model(
        lambda: nn.SpectralNorm(nn.Dense(WIDTH, name="inside"), name="middle"), FLAT, updating, ("middle", "inside")
    ),
    "spectral norm of a conv": Model(
        lambda: nn.SpectralNorm(nn.Conv(WIDTH, (3, 3), name="inside"), n_steps=2, name="middle"),
        IMAGE,
        updating,
        ("middle", "inside"),
    ),
    "dropout": norm(of(nn.Dropout, 0.5), call=dropping),
    "attention": Model(attention(), SEQUENCE, dropping),
    "attention with dropout": Model(attention(dropout_rate=0.5), SEQUENCE, dropping),
    "attention with norms": Model(attention(normalize_qk=True), SEQUENCE, dropping),
    "attention with a cache": Model(of(own.Decoding), SEQUENCE),
    "simple rnn": recurrent(nn.SimpleCell),
    "lstm": recurrent(nn.LSTMCell),
    "optimized lstm": recurrent(nn.OptimizedLSTMCell),
    "gru": recurrent(nn.GRUCell),
    "minimal gated unit": recurrent(nn.MGUCell),
    "lstm of images": Model(of(own.ConvLSTM), IMAGE),
    "bidirectional": Model(of(own.Bidirectional), SEQUENCE),
    "lora": Model(of(own.LoRA)),
    "mixture of experts": Model(of(own.Experts)),
    "one layer twice": Model(of(nn.Dense, WIDTH), call=lambda module, x, train: module(nn.relu(module(x)))),
    "shared module": Model(of(own.Shared)),
    "scanned": Model(of(own.Scanned), call=training),
    "scanned in remat": Model(of(own.Scanned, remat=True), call=training),
    "vmapped": Model(of(own.Vmapped), call=training),
    "remat": Model(lambda: nn.remat(own.Block, static_argnums=(2,))(name="middle"), call=training),
    "jitted": Model(lambda: nn.jit(own.Block, static_argnums=(2,))(name="middle"), call=training),
    "mapped variables": Model(of(own.Doubled)),
    "residual blocks": Model(of(own.Residual), call=training),
    "prelu": norm(of(nn.PReLU)),
    "bfloat16 parameters": Model(of(nn.Dense, WIDTH, param_dtype=jnp.bfloat16)),
    "bfloat16 computation": Model(of(nn.Dense, WIDTH, dtype=jnp.bfloat16)),
    "complex": Model(of(own.Complex)),
    "own statistics": Model(of(own.Centered)),
    "own counter": Model(of(own.Counting)),
    "sown": Model(of(own.Sowing)),
    "perturbed": Model(of(own.Perturbed)),
    "setup and methods": Model(of(own.Methods), call=training),
}

# One of each kind of state and of sharing, for the quick subset.
QUICK = {"dense", "tied embedding", "batch norm", "weight norm", "dropout", "own counter", "sown", "perturbed"}
