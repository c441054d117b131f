"""The front door for Flax NNX: an ``nnx.Optimizer`` that freezes, and the object that decides when.

A stock NNX loop changes in five lines: an import, the optimizer's class, ``nnx.value_and_grad``, one line before the
loop and one in it. See :class:`Optimizer`.
"""

from smartfrz_jax.nnx.accounting import account as account
from smartfrz_jax.nnx.cached_step import CachedStep as CachedStep
from smartfrz_jax.nnx.freezer import Freezer as Freezer
from smartfrz_jax.nnx.layers import features as features
from smartfrz_jax.nnx.layers import find_layers as find_layers
from smartfrz_jax.nnx.optimizer import Optimizer as Optimizer
from smartfrz_jax.nnx.prefix_cache import PrefixCache as PrefixCache
from smartfrz_jax.nnx.probe import probe as probe
from smartfrz_jax.nnx.restore import restore_params as restore_params
from smartfrz_jax.nnx.scan import scan_blocks as scan_blocks
