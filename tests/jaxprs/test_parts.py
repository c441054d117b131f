"""What a jaxpr is made of."""

import jax
import jax.numpy as jnp
import pytest

from smartfrz_jax.jaxprs.parts import as_function, lookup, variables

CLOSED = jax.make_jaxpr(lambda x, y: (x * 2.0 + y, 1.0))(jnp.float32(0), jnp.float32(0))


def test_literals_are_no_variables():
    product, _ = CLOSED.jaxpr.eqns
    assert variables(product.invars) == [CLOSED.jaxpr.invars[0]]
    assert len(product.invars) == 2


def test_nothing_is_known_of_literals():
    x, literal = CLOSED.jaxpr.eqns[0].invars
    assert [lookup({x: "known"}, atom, "default") for atom in (x, literal, CLOSED.jaxpr.invars[1])] == [
        "known", "default", "default"
    ]  # fmt: skip
    assert lookup({}, x) is None


@pytest.mark.parametrize(("part", "expected"), [(slice(0, 1), 6.0), (slice(1, 2), 8.0)])
def test_a_part_as_a_function_of_what_it_reads(part, expected):
    """Of 3 and 5: the product of 3 with 2; the sum of 3, in place of the product, and 5."""
    (eqn,) = CLOSED.jaxpr.eqns[part]
    read = variables(eqn.invars)
    run = as_function(CLOSED, [eqn], read, eqn.outvars)
    assert [float(value) for value in run(*map(jnp.float32, (3, 5)[: len(read)]))] == [expected]
