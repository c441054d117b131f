"""Depthwise convolutions that are fast on a CPU, as sums of shifted products.

XLA has fast convolutions with a channel for each group on GPU and TPU. On CPU its forward pass is 20 to 100 times
slower than the memory allows, and it computes the gradient of the kernel for every *pair* of channels. There the
convolution is computed as what it is, a sum over the kernel's positions of the shifted image times a weight for each
channel, which XLA fuses into one loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_Pair = tuple[int, int]

# Into how many pieces the rows are cut that are added up before the sum over all rows.
_PIECES = 8


def conv_general_dilated(
    x: Float[Array, "n h w c"],
    kernel: Float[Array, "kh kw c_in c"],
    strides: _Pair,
    padding: Any,
    *,
    feature_group_count: int,
    lhs_dilation: _Pair = (1, 1),
    rhs_dilation: _Pair = (1, 1),
    **options: Any,
) -> Float[Array, "n h2 w2 c"]:
    if jax.default_backend() != "cpu":
        return lax.conv_general_dilated(x, kernel, strides, padding, feature_group_count=feature_group_count, lhs_dilation=lhs_dilation, rhs_dilation=rhs_dilation, **options)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    return depthwise_conv(x, kernel[:, :, 0], tuple(strides), tuple(map(tuple, padding)))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise_conv(
    x: Float[Array, "n h w c"], kernel: Float[Array, "kh kw c"], strides: _Pair, padding: tuple[_Pair, _Pair]
) -> Float[Array, "n h2 w2 c"]:
    size = _output_size(x, kernel, strides, padding)
    padded = _padded(_wide(x), padding)
    kernel = _wide(kernel)
    taps = (_shifted(padded, at, size, strides) * kernel[at] for at in _positions(kernel))
    return _sum(taps).astype(x.dtype)


def _forward(x, kernel, strides, padding):
    return depthwise_conv(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, residuals, cotangent):
    x, kernel = residuals
    cotangent = _wide(cotangent)
    dx = _input_gradient(cotangent, _wide(kernel), x.shape[1:3], strides, padding)
    dkernel = _kernel_gradient(_wide(x), cotangent, kernel.shape[:2], strides, padding)
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


depthwise_conv.defvjp(_forward, _backward)


def _input_gradient(cotangent, kernel, size, strides, padding):
    # Pixels whose distances differ by the stride see the same positions of the kernel: one image for each phase.
    spans = [-(-k // s) for k, s in zip(kernel.shape[:2], strides, strict=True)]
    rows, cols = (-(-(n + low) // s) for n, (low, _), s in zip(size, padding, strides, strict=True))
    room = [(span - 1, max(n - out, 0)) for span, n, out in zip(spans, (rows, cols), cotangent.shape[1:3], strict=True)]
    padded = _padded(cotangent, room)

    def phase(row, col):
        taps = [
            _shifted(padded, (spans[0] - 1 - i // strides[0], spans[1] - 1 - j // strides[1]), (rows, cols), (1, 1)) * kernel[i, j]
            for i in range(row, kernel.shape[0], strides[0])
            for j in range(col, kernel.shape[1], strides[1])
        ]
        return _sum(taps) if taps else jnp.zeros((cotangent.shape[0], rows, cols, cotangent.shape[3]), cotangent.dtype)

    phases = jnp.stack([jnp.stack([phase(a, b) for b in range(strides[1])], 3) for a in range(strides[0])], 2)
    whole = phases.reshape(cotangent.shape[0], rows * strides[0], cols * strides[1], cotangent.shape[3])
    top, left = padding[0][0], padding[1][0]
    return whole[:, top : top + size[0], left : left + size[1]]


def _kernel_gradient(x, cotangent, kernel_size, strides, padding):
    n, rows, cols, channels = cotangent.shape
    piece = -(-rows // _PIECES)
    pieces = -(-rows // piece)
    extra = pieces * piece - rows
    cotangent = _padded(cotangent, [(0, extra), (0, 0)])
    padded = _padded(x, [(padding[0][0], padding[0][1] + extra * strides[0]), padding[1]])
    ones = jnp.ones((1, n * piece * cols), x.dtype)

    def of(at):
        shifted = _shifted(padded, at, (pieces * piece, cols), strides)
        products = (
            shifted[:, start : start + piece] * cotangent[:, start : start + piece]
            for start in range(0, pieces * piece, piece)
        )
        return (ones @ _sum(products).reshape(-1, channels))[0]

    return jnp.stack([of((i, j)) for i in range(kernel_size[0]) for j in range(kernel_size[1])]).reshape(*kernel_size, channels)


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _padded(x, padding):
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*p, 0) for p in padding), (0, 0, 0)))


def _output_size(x, kernel, strides, padding):
    return tuple((n + sum(p) - k) // s + 1 for n, k, s, p in zip(x.shape[1:3], kernel.shape[:2], strides, padding, strict=True))


def _positions(kernel):
    return [(i, j) for i in range(kernel.shape[0]) for j in range(kernel.shape[1])]


def _shifted(x, at, size, strides):
    ends = (start + (n - 1) * s + 1 for start, n, s in zip(at, size, strides, strict=True))
    return lax.slice(x, (0, *at, 0), (x.shape[0], *ends, x.shape[3]), (1, *strides, 1))


def _sum(terms):
    total = None
    for t in terms:
        total = t if total is None else total + t
    return total
