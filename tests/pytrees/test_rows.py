"""Some rows of an array are taken and put back as NumPy does."""

import jax.numpy as jnp
import numpy as np
import pytest

from smartfrz_jax.pytrees import rows

INDICES = [[2], [0, 1, 2], [0, 2], [1, 3, 5, 7], [0, 3, 6], [0, 2, 4, 5, 6], [0, 1, 3, 5, 7], list(range(8))]


@pytest.mark.parametrize("indices", INDICES, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_rows_are_those_of_numpy(indices, axis):
    at = (slice(None),) * axis + (indices,)
    array = np.random.default_rng(0).normal(size=(8, 2) if axis == 0 else (2, 8)).astype(np.float32)
    new, zeros = -array[at], np.zeros_like(array)
    assert [index for run in rows.runs(indices) for index in run] == indices
    np.testing.assert_array_equal(rows.take(jnp.asarray(array), indices, axis), array[at])
    np.testing.assert_array_equal(rows.spread(jnp.asarray(new), indices, 8, axis), _with(zeros, at, new))
    np.testing.assert_array_equal(rows.put(jnp.asarray(array), jnp.asarray(new), indices, axis), _with(array, at, new))


def _with(array, at, new):
    array = array.copy()
    array[at] = new
    return array
