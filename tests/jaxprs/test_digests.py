"""Digests are equal for values that are computed in the same way, and for no others."""

import jax
import jax.numpy as jnp
import pytest

from smartfrz_jax.jaxprs.digests import digests
from tests.support.prefix_caches import PARAMS, X

pytestmark = pytest.mark.usefixtures("jax_defaults")


def test_digests_tell_values_apart():
    def function(w, x):
        a = jax.nn.relu(x @ w)
        return a, jax.nn.relu(x @ w), jnp.tanh(x @ w), a + 1.0, a + 2.0

    def of(function):
        closed = jax.make_jaxpr(function)(PARAMS["w0"], X)
        known = digests(closed, ("w", "x"), closed.jaxpr.eqns)
        return [known[var] for var in closed.jaxpr.outvars]

    first, again, *others = of(function)
    assert first == again
    assert len({first, *others}) == 4
    assert of(function) == of(lambda w, x: function(w, x))
