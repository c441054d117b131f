"""Comparison of what two programs compute that may add up the same products in another order."""

import jax
import numpy as np


def assert_close(got, expected, scale=None):
    """Equal up to the last bits of the largest entry, or of ``scale``; an entry that cancels has no more to offer.

    Arrays without an entry above 0.001 are compared as if they had one: they are what is left of larger numbers.
    """
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        largest = float(np.abs(b).max()) if scale is None else scale
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6 * max(largest, 1e-3))
