"""Modules that users write themselves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

WIDTH = 8


def of_head(path, value):
    """A filter, for a model in which little else trains."""
    return isinstance(value, nnx.Param) and "middle" not in path


class Words(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, WIDTH, rngs=rngs)
        self.body, self.head = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Linear(WIDTH, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.body(self.embed(x))))


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.body = nnx.Embed(5, WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.embed.attend(self.body(self.embed(x)))


class Dropping(nnx.Module):
    """A dropout that gets its random stream with the call."""

    def __init__(self, rngs):
        self.inner, self.dropout = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Dropout(0.5)

    def __call__(self, x, rngs):
        return self.dropout(self.inner(x), rngs=rngs)


class Experts(nnx.Module):
    """Two experts, and a router that weighs them."""

    def __init__(self, rngs):
        self.router = nnx.Linear(WIDTH, 2, rngs=rngs)
        self.up = nnx.Param(rngs.params.normal((2, WIDTH, WIDTH)))
        self.down = nnx.Param(rngs.params.normal((2, WIDTH, WIDTH)))

    def __call__(self, x):
        hidden = nnx.relu(jnp.einsum("bi,eij->ebj", x, self.up[...]))
        out = jnp.einsum("ebj,ejk->ebk", hidden, self.down[...])
        return jnp.einsum("be,ebk->bk", nnx.softmax(self.router(x)), out)


class SharedKernel(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.second.kernel = self.first.kernel

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.norm = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.BatchNorm(WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(nnx.relu(self.norm(self.linear(x))))


class Residual(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Scanned(nnx.Module):
    """Blocks whose variables are stacked, run by a scan."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs):
            return Block(rngs)

        self.blocks = stacked(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(block, x):
            return block(x)

        return forward(self.blocks, x)


class Vmapped(nnx.Module):
    """The mean of two linear layers with batch norms."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs):
            return Block(rngs)

        self.members = stacked(rngs)

    def __call__(self, x):
        return nnx.vmap(lambda member, x: member(x), in_axes=(0, None))(self.members, x).mean(0)


class Complex(nnx.Module):
    def __init__(self, rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (WIDTH, WIDTH), jnp.complex64))

    def __call__(self, x):
        return jnp.abs(jnp.fft.fft(x) @ self.kernel[...])


class Centered(nnx.Module):
    """A linear layer that takes off a running mean of its outputs."""

    def __init__(self, rngs):
        self.linear, self.mean = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.BatchStat(jnp.zeros(WIDTH))

    def __call__(self, x):
        x = self.linear(x)
        self.mean[...] = 0.9 * self.mean[...] + 0.1 * x.mean(0)
        return x - self.mean[...]


class Counting(nnx.Module):
    """A linear layer that counts its calls, and whose outputs grow with the count."""

    def __init__(self, rngs):
        self.linear, self.count = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.count[...] += 1
        return self.linear(x) * self.count[...]


class Clipped(nnx.Module):
    """A linear layer that clips its own weights before it uses them, as the critic of a Wasserstein GAN."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        self.linear.kernel[...] = jnp.clip(self.linear.kernel[...], -0.3, 0.3)
        return self.linear(x)


class Sowing(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = self.linear(x)
        self.sow(nnx.Intermediate, "features", x)
        return x


class Noisy(nnx.Module):
    """Noise from streams that the module keeps whole, and a linear layer."""

    def __init__(self, rngs):
        self.rngs, self.linear = rngs.fork(), nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.linear(x + 0.1 * jax.random.normal(self.rngs.dropout(), x.shape))


def from_linen(rngs):
    return nnx.bridge.ToNNX(nn.Dense(WIDTH), rngs=rngs).lazy_init(jnp.ones((1, WIDTH)))
