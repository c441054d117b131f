"""The front door for Flax Linen and for functional training loops: a ``TrainState`` that freezes.

The state works with any ``apply_fn`` on any parameter pytree; what is Linen's own here is that frozen BatchNorm and
Dropout modules run in evaluation mode.
"""

from smartfrz_jax.linen.freezer import Freezer as Freezer
from smartfrz_jax.linen.hold import hold as hold
from smartfrz_jax.linen.layers import find_layers as find_layers
from smartfrz_jax.linen.restore import restore_params as restore_params
from smartfrz_jax.linen.train_state import TrainState as TrainState
