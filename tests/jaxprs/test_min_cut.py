"""No set of values that separates is cheaper."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from smartfrz_jax.jaxprs.min_cut import min_cut


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_no_cut_is_cheaper(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 8))
    costs = {i: int(rng.integers(0, 9)) for i in range(n)}
    edges = [(i, j) for i in range(n) for j in range(i + 1, n) if rng.random() < 0.4]
    sources, sinks = [0, *rng.integers(0, n, 1).tolist()], [n - 1, *rng.integers(0, n, 1).tolist()]

    def separates(cut):
        reached = set(sources) - set(cut)
        for i, j in sorted(edges):
            if i in reached and j not in cut:
                reached.add(j)
        return not reached.intersection(sinks)

    subsets = itertools.chain.from_iterable(itertools.combinations(range(n), k) for k in range(n + 1))
    best = min(sum(costs[i] for i in subset) for subset in subsets if separates(subset))
    cut = min_cut(costs, edges, sources, sinks)
    assert separates(cut)
    assert sum(costs[i] for i in cut) == best


def test_of_equal_cuts_the_last_is_taken():
    assert min_cut({"a": 2, "b": 2, "c": 2}, [("a", "b"), ("b", "c")], ["a"], ["c"]) == ["c"]
