"""Batch normalization as PyTorch's and TensorFlow's fused kernels have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class BatchNorm(nnx.BatchNorm):
    """``nnx.BatchNorm`` over the last axis, whose running variance is that of an unbiased estimate.

    In training mode the batch is normalized with its mean and variance, sums divided by the ``n`` values per feature;
    the running average takes the variance times ``n / (n - 1)``. ``nnx.BatchNorm`` leaves that factor out, so that its
    statistics drift from the original's. Everything is computed in float32 (float64 for float64 input), the variance
    from the centred values.

    Args:
        num_features: Number of features.
        momentum: Weight of the old statistics in the running average; one minus PyTorch's ``momentum``.
        epsilon: Added to the variance.
        dtype: Type of the output; that of the input by default.
        param_dtype: Type of scale and bias.
        axis_name: Axis of ``jax.vmap``, ``jax.pmap`` or ``jax.shard_map`` over which the statistics are taken too.
        axis_index_groups: Groups of indices of that axis, each with statistics of its own.
        rngs: Random streams for initialisation.

    Example:
        >>> norm = BatchNorm(1, momentum=0.0, rngs=nnx.Rngs(0))
        >>> norm(jnp.array([[1.0], [2.0], [3.0]])).shape
        (3, 1)
        >>> float(norm.mean[0]), float(norm.var[0])
        (2.0, 1.0)
    """

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        axis_name: str | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            num_features,
            momentum=momentum,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=False,
            rngs=rngs,
        )

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Array, "*batch features"], use_running_average: bool | None = None
    ) -> Float[Array, "*batch features"]:
        """Normalizes ``x`` with its own statistics, or with the running ones.

        Args:
            x: The input.
            use_running_average: Overrides the mode set by ``train()`` and ``eval()``.

        Returns:
            Array of the shape of ``x``.
        """
        dtype = x.dtype if self.dtype is None else self.dtype
        wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
        x = x.astype(wide)
        if self.use_running_average if use_running_average is None else use_running_average:
            mean, var = self.mean[...].astype(wide), self.var[...].astype(wide)
        else:
            mean = self._mean(x)
            var = self._mean(jnp.square(x - _row(mean, x)))
            n = x.size // x.shape[-1]
            if self.axis_name is not None:
                n = jax.lax.psum(n, self.axis_name, axis_index_groups=self.axis_index_groups)
            unbiased = var * (n / max(n - 1, 1))  # one value alone counts as variance 0, as in TensorFlow
            # Not by `[...] =`: it asks tracers for their sharding, which is two fifths of the time of tracing ResNet50.
            self.mean.set_value(self._moved(self.mean[...], mean))
            self.var.set_value(self._moved(self.var[...], unbiased))
        scale, bias = (param[...].astype(wide) for param in (self.scale, self.bias) if param is not None)
        y = (x - _row(mean, x)) * _row(jax.lax.rsqrt(var + self.epsilon) * scale, x) + _row(bias, x)
        return y.astype(dtype)

    def _mean(self, x: Float[Array, "*batch features"]) -> Float[Array, " features"]:
        mean = jnp.mean(x, axis=tuple(range(x.ndim - 1)))
        if self.axis_name is None:
            return mean
        return jax.lax.pmean(mean, self.axis_name, axis_index_groups=self.axis_index_groups)

    def _moved(self, old: Float[Array, " features"], new: Float[Array, " features"]) -> Float[Array, " features"]:
        return jax.lax.stop_gradient(self.momentum * old + (1 - self.momentum) * new.astype(old.dtype))


def _row(vector: Float[Array, " features"], x: Float[Array, "*batch features"]) -> Float[Array, "*ones features"]:
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))
