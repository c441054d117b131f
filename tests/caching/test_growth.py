"""When the frozen set changes, what is stored is the input of what will be."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax.caching import Storage
from tests.support.prefix_caches import PARAMS, N, X, Y, cached, mlp
from tests.support.rounding import assert_close
from tests.support.train_steps import loss_fn, make_step

pytestmark = pytest.mark.usefixtures("jax_defaults")


def run_epoch(cache, params, x, y):
    parts = np.split(np.arange(len(x)), 2)
    return jnp.concatenate([cache.fetch(params, rows, x[rows], y[rows])[0] for rows in parts])


@pytest.mark.slow
def test_when_the_prefix_grows_only_the_new_layers_are_run():
    cache = cached(mlp, PARAMS, (X, Y), ["w0"])
    cache.keep(N)
    first = run_epoch(cache, PARAMS, X, Y)
    assert_close(first, np.tanh(X @ PARAMS["w0"]))
    old = cache.store
    new = cache.follow(PARAMS, cache.frozen.add(["w1", "w2"]))
    assert cache.store is None
    grown = new.grown_from(cache)
    flops = sfj.program_cost(jax.jit(lambda a: grown(PARAMS, (a,), None, Y)), first).flops
    assert flops == 2 * N * (5 * 3 + 3 * 4)
    # The inputs are not needed any more: the activations come from the old ones.
    for rows in np.split(np.arange(N), 2):
        new.fetch(PARAMS, rows, None, Y[rows])
    assert new.store.is_complete
    assert new._source is None
    assert old.is_complete
    from_inputs = new.activations(PARAMS, X, Y)
    assert_close(new.store.take(np.arange(N))[0], from_inputs[0])


def test_a_cache_stays_as_it_was_if_the_next_cannot_be(tmp_path):
    cache = cached(mlp, PARAMS, (X, Y), ["w0"])
    store = cache.keep(N, place=tmp_path / "first")
    run_epoch(cache, PARAMS, X, Y)
    with pytest.raises(FileExistsError, match="place"):  # without a place, it would be the same directory
        cache.follow(PARAMS, cache.frozen.add(["w1"]))
    assert cache.store is store
    assert cache.fetch_flops(np.arange(N)) == 0
    new = cache.follow(PARAMS, cache.frozen.add(["w1"]), place=tmp_path / "second")
    assert cache.store is None
    assert new._source.store is store


@pytest.mark.parametrize(
    ("names", "place", "message"),
    [
        ([], None, "nothing is worth keeping"),
        (["w1"], None, "nothing is worth keeping"),
        (["w0"], "/proc/activations", "place"),
    ],
)
def test_what_is_stored_is_forgotten_if_its_layers_train_and_the_next_cannot_be(names, place, message):
    cache = cached(mlp, PARAMS, (X, Y), ["w0", "w1"])
    cache.keep(N)
    run_epoch(cache, PARAMS, X, Y)
    frozen, fewer = cache.frozen, sfj.Frozen(cache.frozen.layers, frozenset(names))
    with pytest.raises((ValueError, OSError), match=message):
        cache.follow(PARAMS, fewer, place=place)
    changed = {**PARAMS, "w1": 2 * PARAMS["w1"]}  # by a plain step
    same = cache.follow(changed, frozen)
    assert same is cache
    assert_close(run_epoch(same, changed, X, Y), np.tanh(np.tanh(X @ PARAMS["w0"]) @ changed["w1"]))


@pytest.mark.slow
def test_when_the_prefix_shrinks_what_was_kept_is_dropped():
    cache = cached(mlp, PARAMS, (X, Y), ["w0", "w1"])
    cache.keep(N)
    run_epoch(cache, PARAMS, X, Y)
    new = cache.follow(PARAMS, sfj.Frozen(cache.frozen.layers, frozenset({"w0"})))
    assert new.grown_from(cache) is None
    assert new._source is None
    assert not new.store.filled.any()
    changed = {**PARAMS, "w1": 2 * PARAMS["w1"]}  # it trains again
    got = run_epoch(new, changed, X, Y)
    assert_close(got, np.tanh(X @ PARAMS["w0"]))


def test_old_and_new_activations_share_the_budget():
    cache = cached(mlp, PARAMS, (X, Y), ["w0"])
    first = cache.keep(N, place="host", budget=N * (5 + 3) * 4)
    run_epoch(cache, PARAMS, X, Y)
    second = cache.follow(PARAMS, cache.frozen.add(["w1"]))
    assert first.nbytes + second.store.nbytes == N * (5 + 3) * 4
    assert second._kept["budget"] == N * (5 + 3) * 4  # of which more is free once the old ones are gone
    assert_close(run_epoch(second, PARAMS, X, Y), second.activations(PARAMS, X, Y)[0])

    cache = cached(mlp, PARAMS, (X, Y), ["w0"])
    cache.keep(N, budget=N * (5 + 3) * 4 - 1)
    with pytest.raises(ValueError, match="the budget is 47"):
        cache.follow(PARAMS, cache.frozen.add(["w1"]))
    assert cache.store is not None


@pytest.mark.slow
def test_a_step_drops_old_activations_where_the_budget_does_not_hold_both():
    model = nnx.Sequential(*(nnx.Linear(6, size, rngs=nnx.Rngs(size)) for size in (6, 6, 3)))
    optimizer = sfj.nnx.Optimizer(model, optax.sgd(0.1), layers=sfj.nnx.find_layers(model, np.ones((4, 6), np.float32)))
    images, labels = np.random.default_rng(0).standard_normal((8, 6), np.float32), np.arange(8) % 3
    step = sfj.nnx.CachedStep(make_step, loss_fn, examples=8, storage=Storage("host", budget=8 * 6 * 4))
    for names in (["layers/0"], ["layers/1"]):
        optimizer.freeze(model, names)
        for rows in (np.arange(4), np.arange(4, 8), np.arange(4)):
            before = nnx.clone((model, optimizer))
            loss = step(model, optimizer, rows, images[rows], labels[rows])
            assert_close(loss, sfj.TrainStep(make_step(loss_fn))(*before, images[rows], labels[rows]))
            assert step.cache.store.nbytes == 8 * 6 * 4
            assert step.cache._source is None
        assert step.cache.frozen == optimizer.frozen


def test_where_the_old_values_are_not_enough_they_are_computed_from_the_inputs():
    def two_branches(params, x, y):
        left = jnp.tanh(x @ params["w0"])
        right = jnp.tanh(x @ params["w9"])
        return jnp.square((left * right) @ params["w1"] @ params["w2"] @ params["w3"] - y).mean()

    params = PARAMS | {"w9": 2 * PARAMS["w0"]}
    cache = cached(two_branches, params, (X, Y), ["w0"])
    new = cache.follow(params, cache.frozen.add(["w9"]))
    grown = new.grown_from(cache)  # the other branch is new work, and reads the input
    assert_close(grown(params, cache.activations(params, X, Y), X, Y), new.activations(params, X, Y))
    with pytest.raises(ValueError, match="inputs:0"):
        grown(params, cache.activations(params, X, Y), None, Y)
    other = cached(
        lambda params, x, y: mlp({k: v for k, v in params.items() if k != "w9"}, x + 1, y), PARAMS, (X, Y), ["w0"]
    )
    assert new.grown_from(other) is None


class Noisy(nnx.Module):
    """Layers that run in another way once they are frozen, and a head."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.linear = nnx.List([nnx.Linear(24, 24, use_bias=False, rngs=rngs) for _ in range(6)])
        self.norm = nnx.List([nnx.BatchNorm(24, rngs=rngs) for _ in range(6)])
        self.dropout = nnx.List([nnx.Dropout(0.1, rngs=rngs) for _ in range(6)])
        self.head = nnx.Linear(24, 3, rngs=rngs)

    def __call__(self, x):
        for linear, norm, dropout in zip(self.linear, self.norm, self.dropout, strict=True):
            x = dropout(nnx.relu(norm(linear(x))))
        return self.head(x)


class Late:
    """A run of eight epochs in which a layer freezes when what it saves does not pay for computing it any more."""

    images = np.random.default_rng(0).standard_normal((64, 24), np.float32)
    labels = np.random.default_rng(1).integers(0, 3, 64).astype(np.int32)

    def __init__(self, *, keeps=True, lead=0):
        self.model = Noisy()
        layers = sfj.nnx.find_layers(self.model, self.images[:16])
        tx = optax.sgd(0.1)
        self.optimizer = sfj.nnx.Optimizer(self.model, tx, layers=layers)
        account = sfj.nnx.account(self.model, layers, loss_fn, self.images[:16], self.labels[:16], tx=tx)
        options = {"examples": 64, "account": account, "total_steps": 32}
        self.keeps = keeps
        self.step = sfj.nnx.CachedStep(make_step, loss_fn, **options) if keeps else sfj.TrainStep(make_step(loss_fn))

        def update(state, layers, *, step, params, **signals):
            return frozenset(layers.names[: 4 if step < 29 else 5]), state

        policy = sfj.Policy(lambda layers, params: (), update)
        self.freezer = sfj.nnx.Freezer(self.model, self.optimizer, policy, train_step=self.step, lead=lead)
        self.losses, self.flops = [], []

    def run(self, stop):
        for at in range(self.freezer.steps, stop):
            rows = np.random.default_rng(at // 4).permutation(64)[at % 4 * 16 :][:16]
            batch = self.images[rows], self.labels[rows]
            self.losses.append(float(self.step(self.model, self.optimizer, *[rows] * self.keeps, *batch)))
            self.flops.append(self.step.flops if self.keeps else self.step.last.cost.flops)
            self.freezer.step()
        return self


@pytest.mark.slow
@pytest.mark.parametrize("lead", [0, 2])
def test_a_freeze_that_does_not_pay_any_more_leaves_what_is_kept(lead):
    kept, plain = Late(lead=lead).run(32), Late(keeps=False, lead=lead).run(32)
    assert [len(event.names) for event in kept.freezer.events] == [4, 1]
    np.testing.assert_allclose(kept.losses, plain.losses, rtol=1e-4)
    last = kept.freezer.events[-1].step
    assert kept.step.cache.frozen.names == set(kept.optimizer.frozen.layers.names[:4])
    assert kept.flops[last] < kept.flops[last - 1] < plain.flops[last - 1]
    assert kept.step.programs[-1].ahead == (lead > 0)


@pytest.mark.slow
def test_a_run_that_is_restored_behind_such_a_freeze_keeps_the_same(tmp_path):
    straight = Late().run(31)
    straight.freezer.save(tmp_path / "checkpoint")
    straight.run(32)
    again = Late()
    again.freezer.restore(tmp_path / "checkpoint")
    again.run(32)
    assert again.step.cache.frozen == straight.step.cache.frozen
    assert again.losses == straight.losses[-1:]
