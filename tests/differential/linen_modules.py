"""Linen modules that users write themselves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

WIDTH = 8


class Words(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Embed(5, WIDTH, name="embed")(x)
        return nn.Dense(2, name="a_head")(nn.relu(nn.Dense(WIDTH, name="body")(x)))


class Tied(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        embed = nn.Embed(5, WIDTH, name="embed")
        return embed.attend(nn.Dense(WIDTH, name="body")(embed(x)))


class Attention(nn.Module):
    options: Any

    @nn.compact
    def __call__(self, x, deterministic):
        return nn.MultiHeadDotProductAttention(2, **self.options)(x, deterministic=deterministic)


class Decoding(nn.Module):
    """Attention that sees a sequence word by word."""

    @nn.compact
    def __call__(self, x):
        attend = nn.MultiHeadDotProductAttention(2, decode=True)
        if self.is_initializing():
            return attend(x)
        return jnp.concatenate([attend(x[:, i : i + 1]) for i in range(x.shape[1])], axis=1)


class ConvLSTM(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.ConvLSTMCell(WIDTH, (3, 3)))(jnp.stack([x, 2 * x], axis=1))[:, -1]


class Bidirectional(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Bidirectional(nn.RNN(nn.GRUCell(4)), nn.RNN(nn.GRUCell(4)))(x)


class LoRA(nn.Module):
    @nn.compact
    def __call__(self, x):
        low = nn.Dense(2, use_bias=False, name="lora_a")(x)
        return nn.Dense(WIDTH, name="base")(x) + nn.Dense(WIDTH, use_bias=False, name="lora_b")(low)


class Experts(nn.Module):
    """Two experts, and a router that weighs them."""

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal(batch_axis=0)
        up, down = (self.param(name, init, (2, WIDTH, WIDTH)) for name in ("up", "down"))
        hidden = nn.relu(jnp.einsum("bi,eij->ebj", x, up))
        weights = nn.softmax(nn.Dense(2, name="router")(x))
        return jnp.einsum("be,ebk->bk", weights, jnp.einsum("ebj,ejk->ebk", hidden, down))


class Shared(nn.Module):
    """A submodule that is called by another one too."""

    @nn.compact
    def __call__(self, x):
        inside = nn.Dense(WIDTH, name="inside")
        return Residual1(inside, name="outer")(inside(x))


class Residual1(nn.Module):
    inside: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(WIDTH)(x) + self.inside(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        y = nn.BatchNorm(use_running_average=not train)(nn.Dense(WIDTH)(x))
        return x + nn.Dropout(0.5)(nn.relu(y), deterministic=not train)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for _ in range(2):
            x = Block()(x, train)
        return x


class Scanned(nn.Module):
    """Blocks whose variables are stacked, run by a scan."""

    remat: bool = False

    @nn.compact
    def __call__(self, x, train):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return Block(name="block")(x, train), None

        step = nn.remat(Step) if self.remat else Step
        stacked = nn.scan(
            step, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True, "dropout": True}, length=2
        )
        return stacked(name="blocks")(x, None)[0]


class Vmapped(nn.Module):
    """The mean of two blocks."""

    @nn.compact
    def __call__(self, x, train):
        members = nn.vmap(
            Block,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(None, None),
            axis_size=2,
        )
        return members(name="members")(x, train).mean(0)


class Doubled(nn.Module):
    """A dense layer whose kernel is another one each time that it is looked at."""

    @nn.compact
    def __call__(self, x):
        doubled = nn.map_variables(
            nn.Dense, "params", lambda params: jax.tree.map(lambda leaf: 2 * leaf, params), init=self.is_initializing()
        )
        return doubled(WIDTH, name="inside")(x)


class Complex(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal(1.0, jnp.complex64)
        return jnp.abs(jnp.fft.fft(x) @ self.param("kernel", init, (WIDTH, WIDTH)))


class Centered(nn.Module):
    """A dense layer that takes off a running mean of its outputs."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(WIDTH)(x)
        mean = self.variable("batch_stats", "mean", jnp.zeros, WIDTH)
        if not self.is_initializing():
            mean.value = 0.9 * mean.value + 0.1 * x.mean(0)
        return x - mean.value


class Counting(nn.Module):
    """A dense layer that counts its calls, and whose outputs grow with the count."""

    @nn.compact
    def __call__(self, x):
        count = self.variable("counters", "count", jnp.zeros, (), jnp.int32)
        if not self.is_initializing():
            count.value += 1
        return nn.Dense(WIDTH)(x) * count.value


class Sowing(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(WIDTH)(x)
        self.sow("intermediates", "features", x)
        return x


class Perturbed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return self.perturb("features", nn.Dense(WIDTH)(x))


class Methods(nn.Module):
    """Submodules of ``setup``, one of which is called through a method of its own."""

    def setup(self):
        self.inside, self.norm = nn.Dense(WIDTH), nn.BatchNorm()

    def normed(self, x, train):
        return self.norm(x, use_running_average=not train)

    def __call__(self, x, train):
        return self.normed(self.inside(x), train)
