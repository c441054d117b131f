"""The frozen front of a network, computed once for each example."""

from smartfrz_jax.caching.break_even import BreakEven as BreakEven
from smartfrz_jax.caching.break_even import break_even as break_even
from smartfrz_jax.caching.prefix_cache import PrefixCache as PrefixCache
from smartfrz_jax.caching.store import ActivationCache as ActivationCache
from smartfrz_jax.caching.store import Storage as Storage
