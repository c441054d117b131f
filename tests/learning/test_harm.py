"""How much freezing would harm: by swapping in earlier weights, and by training branches."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from smartfrz_jax import Frozen, find_layers
from smartfrz_jax import nnx as sfj_nnx
from smartfrz_jax.learning.harm import branch_harm, fill, swap_harm

NAMES = ("a", "b", "c", "d")


def chain(*values):
    return {name: jnp.full((1, 1), value) for name, value in zip(NAMES, values, strict=True)}


def forward(params, x):
    for kernel in params.values():
        x = x @ kernel
    return x


LAYERS = find_layers(chain(1.0, 1.0, 1.0, 1.0), forward, jnp.ones((1, 1)))
STEPS = np.array([10, 20, 30])
FINAL = chain(1.0, 2.0, 3.0, 4.0)
SNAPSHOTS = {10: chain(0.0, 0.0, 0.0, 0.0), 30: chain(1.0, 2.0, 3.5, 4.5)}


def distance(params):
    """A loss to which every layer adds its own: 1, 10, 100 or 1000 times how far it is from its final weight."""
    weight = dict(zip(NAMES, (1.0, 10.0, 100.0, 1000.0), strict=True))
    return sum(weight[name] * jnp.abs(params[name] - FINAL[name]).item() for name in NAMES) + 0.5


class TestSwap:
    def test_swaps_the_front(self):
        got = swap_harm(LAYERS, STEPS, SNAPSHOTS, FINAL, distance)
        assert (got.shape, got.dtype) == ((3, 4), np.float32)
        nan = np.nan
        np.testing.assert_allclose(got, [[1, 21, 321, nan], [nan] * 4, [0, 0, 50, nan]])

    def test_depths(self):
        got = swap_harm(LAYERS, STEPS, SNAPSHOTS, FINAL, distance, depths=["d", "b"])
        nan = np.nan
        np.testing.assert_allclose(got, [[nan, 21, nan, 4321], [nan] * 4, [nan, 0, nan, 550]])

    def test_the_network_is_not_changed_and_snapshots_may_be_numpy(self):
        before = jax.tree.map(np.array, FINAL)
        on_host = {step: jax.device_get(snapshot) for step, snapshot in SNAPSHOTS.items()}
        got = swap_harm(LAYERS, STEPS, on_host, FINAL, distance)
        np.testing.assert_array_equal(got, swap_harm(LAYERS, STEPS, SNAPSHOTS, FINAL, distance))
        jax.tree.map(np.testing.assert_array_equal, FINAL, before)

    @pytest.mark.slow
    def test_statistics_go_with_their_layer(self):
        class Network(nnx.Module):
            def __init__(self, rngs):
                self.first = nnx.Linear(2, 3, rngs=rngs)
                self.norm = nnx.BatchNorm(3, rngs=rngs)
                self.head = nnx.Linear(3, 2, rngs=rngs)

            def __call__(self, x):
                return self.head(self.norm(self.first(x)))

        model = Network(nnx.Rngs(0))
        layers = sfj_nnx.find_layers(model, jnp.ones((4, 2)))
        final = nnx.state(model, (nnx.Param, nnx.BatchStat))
        then = jax.tree.map(lambda leaf: leaf + 1, final)
        seen = []

        def loss(variables):
            seen.append(variables)
            return 0.0

        swap_harm(layers, np.array([5]), {5: then}, final, loss)
        swapped = seen[1]
        for module, expected in ((swapped.first, then.first), (swapped.norm, then.norm), (swapped.head, final.head)):
            assert len(jax.tree.leaves(module)) >= 2
            jax.tree.map(np.testing.assert_array_equal, module, expected)

    def test_owner(self):
        def variables(params, mean):
            return {"params": params, "batch_stats": {"norm": {"mean": jnp.full(1, mean)}}}

        def owner(name):
            return "b" if name.startswith("batch_stats/") else name.rpartition("/")[2]

        def loss(v):
            return distance(v["params"]) + v["batch_stats"]["norm"]["mean"].item()

        args = LAYERS, STEPS, {10: variables(FINAL, 7.0)}, variables(FINAL, 2.0)
        np.testing.assert_allclose(swap_harm(*args, loss, owner=owner)[0, :3], [0, 5, 5])
        with pytest.raises(
            ValueError, match=r"final: 'batch_stats/norm/mean' belongs to no layer .they have 'a'.*owner"
        ):
            swap_harm(*args, loss)
        with pytest.raises(ValueError, match="owner: no layer is called"):
            swap_harm(*args, loss, owner=lambda name: "nowhere")

    def test_snapshot_of_other_variables(self):
        other = {name: kernel for name, kernel in FINAL.items() if name != "b"}
        with pytest.raises(ValueError, match="snapshots: 'b' is only in final"):
            swap_harm(LAYERS, STEPS, {10: other}, FINAL, distance)
        with pytest.raises(ValueError, match="snapshots: 'e' is only in that of step 10"):
            swap_harm(LAYERS, STEPS, {10: FINAL | {"e": jnp.ones(1)}}, FINAL, distance)

    def test_loss_that_is_not_finite(self):
        bad = {30: FINAL | {"b": jnp.full((1, 1), jnp.nan)}}
        seen = []
        with pytest.raises(ValueError, match=r"loss: got nan with the first 2 layers of step 30, expected a finite"):
            swap_harm(LAYERS, STEPS, bad, FINAL, lambda params: seen.append(params) or distance(params))
        assert len(seen) == 3  # of final and of two fronts: there it ends
        with pytest.raises(ValueError, match=r"loss: got nan of final, expected a finite"):
            swap_harm(LAYERS, STEPS, SNAPSHOTS, bad[30], lambda params: np.nan)


class Branches:
    """Counts the branches; each frozen layer costs 1, 2, ... and all is dearer earlier."""

    def __init__(self, fail_at=None):
        self.calls = []
        self.fail_at = fail_at

    def __call__(self, snapshot, frozen):
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append((snapshot, frozen))
        return 5.0 + sum(1 + NAMES.index(name) for name in frozen.names) / snapshot


EXPECTED = np.array([[0.1, 0.3, 0.6, np.nan], [np.nan] * 4, [1 / 30, 0.1, 0.2, np.nan]])


class TestBranch:
    def test_harm_is_over_the_branch_with_nothing_frozen(self):
        branches = Branches()
        got = branch_harm(LAYERS, STEPS, {30: 30, 10: 10}, branches)
        assert (got.shape, got.dtype) == ((3, 4), np.float32)
        np.testing.assert_allclose(got, EXPECTED, rtol=1e-6)
        fronts = [frozenset(NAMES[:n]) for n in range(4)]
        assert branches.calls == [(step, Frozen(LAYERS, front)) for step in (10, 30) for front in fronts]

    def test_freezing_nothing_costs_nothing(self):
        assert (branch_harm(LAYERS, STEPS, {10: 10}, lambda snapshot, frozen: 3.0)[0, :3] == 0).all()

    def test_goes_on_after_an_interruption(self):
        known, first = {}, Branches(fail_at=5)
        with pytest.raises(KeyboardInterrupt):
            branch_harm(LAYERS, STEPS, {10: 10, 30: 30}, first, known=known)
        assert sorted(known) == [(10, 0), (10, 1), (10, 2), (10, 3), (30, 0)]
        second = Branches()
        got = branch_harm(LAYERS, STEPS, {10: 10, 30: 30}, second, known=known)
        np.testing.assert_allclose(got, EXPECTED, rtol=1e-6)
        assert [snapshot for snapshot, _ in second.calls] == [30, 30, 30]
        third = Branches()
        np.testing.assert_array_equal(branch_harm(LAYERS, STEPS, {10: 10, 30: 30}, third, known=known), got)
        assert not third.calls

    def test_depths_and_progress(self):
        seen = []

        def progress(cells):
            assert len(cells) == 4
            for cell in cells:
                yield cell
                seen.append(cell)

        got = branch_harm(LAYERS, STEPS, {20: 20, 30: 30}, Branches(), depths=["b"], progress=progress)
        assert seen == [(20, 0), (20, 2), (30, 0), (30, 2)]
        assert np.isfinite(got).sum() == 2
        np.testing.assert_allclose(got[1:, 1], [3 / 20, 3 / 30], rtol=1e-6)

    def test_a_snapshot_is_read_once(self):
        read = []

        class Files(dict):
            def __getitem__(self, step):
                read.append(step)
                return super().__getitem__(step)

        branch_harm(LAYERS, STEPS, Files({10: 10, 20: 20}), Branches())
        assert read == [10, 20]

    def test_refusals(self):
        with pytest.raises(
            ValueError, match="snapshots: got none, expected some of the 3 recorded steps, from 10 to 30"
        ):
            branch_harm(LAYERS, STEPS, {}, Branches())
        with pytest.raises(ValueError, match="snapshots: got one of step 15, expected some of the 3"):
            branch_harm(LAYERS, STEPS, {10: 10, 15: 15}, Branches())
        with pytest.raises(ValueError, match="depths: no layer is called 'z'"):
            branch_harm(LAYERS, STEPS, {10: 10}, Branches(), depths=["z"])
        with pytest.raises(ValueError, match="depths: got no layers"):
            branch_harm(LAYERS, STEPS, {10: 10}, Branches(), depths=[])

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_a_loss_that_is_not_finite_ends_it_and_is_not_kept(self, bad):
        known, calls = {}, []

        def diverging(snapshot, frozen):
            calls.append(len(frozen.names))
            return bad if len(frozen.names) == 2 else 1.0

        with pytest.raises(ValueError, match=f"train_branch: got {bad} with the first 2 layers frozen from step 10"):
            branch_harm(LAYERS, STEPS, {10: 10, 30: 30}, diverging, known=known)
        assert calls == [0, 1, 2]
        assert known == {(10, 0): 1.0, (10, 1): 1.0}
        got = branch_harm(LAYERS, STEPS, {10: 10, 30: 30}, lambda snapshot, frozen: 1.0, known=known)
        assert np.nansum(np.abs(got)) == 0
        with pytest.raises(ValueError, match=rf"known: got {bad} for \(10, 2\), .* take it out to measure it again"):
            branch_harm(LAYERS, STEPS, {10: 10}, diverging, known={(10, 2): bad})
        assert calls == [0, 1, 2]


def closest_monotone(grid):
    """Isotonic regression by the max-min formula over all upper and lower sets: rising to the right and upwards."""
    rows, columns = grid.shape
    profiles = [p for p in itertools.product(range(columns + 1), repeat=rows) if list(p) == sorted(p)]
    lower = [np.arange(columns)[None] >= np.array(p)[:, None] for p in profiles]  # the rising side of each staircase
    result = np.empty(grid.shape)
    for cell in np.ndindex(*grid.shape):
        result[cell] = max(
            min(grid[up & ~other].mean() for other in lower if not other[cell] and (up & ~other).any())
            for up in lower
            if up[cell]
        )
    return result


class TestFill:
    @settings(deadline=None, max_examples=40)
    @given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 3))
    def test_is_the_closest_that_rises_and_falls(self, seed, moments, depths):
        grid = np.random.default_rng(seed).standard_normal((moments, depths))
        got = fill(grid, np.arange(moments), moments - 1)
        np.testing.assert_allclose(got, np.maximum(closest_monotone(grid), 0), atol=1e-6)

    @settings(deadline=None, max_examples=40)
    @given(st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 8))
    def test_rises_along_layers_and_falls_along_records(self, seed, moments, depths):
        rng = np.random.default_rng(seed)
        harm = np.full((10, 9), np.nan)
        rows, columns = (np.sort(rng.choice(n, k, replace=False)) for n, k in ((10, moments), (9, depths)))
        harm[np.ix_(rows, columns)] = rng.standard_normal((moments, depths))
        got = fill(harm, np.arange(10) * 7, 100)
        known = got[rows[0] :, : columns[-1] + 1]
        assert np.isfinite(known).all()
        assert np.isnan(got[: rows[0]]).all()
        assert np.isnan(got[:, columns[-1] + 1 :]).all()
        assert (known >= 0).all()
        assert (np.diff(known, axis=0) <= 1e-9).all()
        assert (np.diff(known, axis=1) >= -1e-9).all()

    def test_measurements_in_order_stay_as_they_are(self):
        harm = np.array([[3.0, 4.0, 9.0], [1.0, 4.0, 5.0], [0.0, 2.0, 2.5]])
        np.testing.assert_allclose(fill(harm, np.arange(3), 2), harm, atol=1e-9)

    def test_between_measurements_it_is_linear(self):
        harm = np.full((5, 5), np.nan)
        harm[1, 1], harm[1, 3], harm[3, 1], harm[3, 3] = 4.0, 8.0, 2.0, 2.0
        got = fill(harm, np.array([10, 20, 30, 40, 50]), total_steps=60)
        expected = [[2, 4, 6, 8], [1.5, 3, 4, 5], [1, 2, 2, 2], [0.5, 1, 1, 1]]
        np.testing.assert_allclose(got[1:, :4], expected, atol=1e-9)
        assert np.isnan(got[0]).all()
        assert np.isnan(got[:, 4]).all()

    def test_noise_is_averaged_not_added_up(self):
        noise = np.random.default_rng(0).standard_normal((12, 12))
        got = fill(noise, np.arange(12), 11)
        maxima = np.maximum.accumulate(np.maximum.accumulate(noise, axis=1)[::-1], axis=0)[::-1]
        assert got.mean() < 0.25
        assert maxima.mean() > 1.0

    def test_what_is_not_a_grid(self):
        harm = np.full((3, 3), np.nan)
        with pytest.raises(ValueError, match="harm: measured at 0 moments"):
            fill(harm, np.arange(3), 3)
        harm[0, 0] = harm[2, 1] = 1.0
        with pytest.raises(
            ValueError, match=r"harm: measured at 2 moments and 2 depths, 2 values; expected .* every depth"
        ):
            fill(harm, np.arange(3), 3)
