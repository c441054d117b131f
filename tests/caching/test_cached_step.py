"""``nnx.CachedStep``: the plain step's results under any policy, with the frozen front run once for every example."""

import contextlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import smartfrz_jax as sfj
from smartfrz_jax.caching import Storage
from tests.support.train_steps import loss_fn, make_step

EXAMPLES, BATCH, EPOCHS = 64, 16, 8
STEPS = EPOCHS * EXAMPLES // BATCH
IMAGES = np.random.default_rng(0).standard_normal((EXAMPLES, 12), np.float32)
LABELS = np.random.default_rng(1).integers(0, 3, EXAMPLES).astype(np.int32)

pytestmark = pytest.mark.usefixtures("jax_defaults")


class Net(nnx.Module):
    """Linear layers, each with a BatchNorm and a dropout behind it, and a head."""

    def __init__(self, depth=4, width=24, *, rngs):
        # A bias before a BatchNorm has no gradient but rounding, which Adam would make steps of.
        widths = [12, *[width] * depth]
        self.linear = nnx.List([nnx.Linear(*widths[i : i + 2], use_bias=False, rngs=rngs) for i in range(depth)])
        self.norm = nnx.List([nnx.BatchNorm(width, rngs=rngs) for _ in range(depth)])
        self.dropout = nnx.List([nnx.Dropout(0.1, rngs=rngs) for _ in range(depth)])
        self.head = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        for linear, norm, dropout in zip(self.linear, self.norm, self.dropout, strict=True):
            x = dropout(nnx.relu(norm(linear(x))))
        return self.head(x)


def noisy_loss_fn(model, images, labels):
    noise = jax.random.normal(jax.random.key(labels.sum()), images.shape)
    return loss_fn(model, images + 0.1 * noise, labels)


def batches(first=0, stop=STEPS):
    per_epoch = EXAMPLES // BATCH
    for step in range(first, stop):
        order = np.random.default_rng(step // per_epoch).permutation(EXAMPLES)
        yield order[step % per_epoch * BATCH :][:BATCH]


class Training:
    """A model, its optimizer and its layers."""

    def __init__(self):
        self.model = Net(rngs=nnx.Rngs(0))
        self.layers = sfj.nnx.find_layers(self.model, IMAGES[:BATCH])
        self.tx = optax.adamw(1e-2)
        self.optimizer = sfj.nnx.Optimizer(self.model, self.tx, layers=self.layers)

    @property
    def args(self):
        return self.model, self.optimizer

    def account(self):
        return sfj.nnx.account(self.model, self.layers, loss_fn, IMAGES[:BATCH], LABELS[:BATCH], tx=self.tx)

    def params(self):
        return sfj.pytrees.paths.flatten(nnx.as_pure(nnx.state(self.model, (nnx.Param, nnx.BatchStat))))


def stages():
    return sfj.static_prefix(total_steps=STEPS, stages=((0.2, 0.4), (0.6, 1.0)))


def cached(loss=loss_fn, **options):
    return sfj.nnx.CachedStep(make_step, loss, examples=EXAMPLES, **options)


def run(training, step, policy, *, lead=0):
    """Losses, FLOPs of every step, and events."""
    keeps = isinstance(step, sfj.nnx.CachedStep)
    freezer = sfj.nnx.Freezer(*training.args, policy, train_step=step, lead=lead)
    losses, flops = [], []
    for indices in batches():
        batch = IMAGES[indices], LABELS[indices]
        loss = step(*training.args, indices, *batch) if keeps else step(*training.args, *batch)
        losses.append(float(loss))
        flops.append(step.flops if keeps else step.program(*training.args, *batch).cost.flops)
        freezer.step(loss=loss)
    return losses, flops, freezer.events


@pytest.mark.slow
@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize("lead", [0, 2])
def test_results_are_those_of_the_plain_step(place, lead):
    plain, kept = Training(), Training()
    step = cached(storage=Storage(place))
    expected, flops, events = run(plain, sfj.TrainStep(make_step(loss_fn)), stages(), lead=lead)
    got, kept_flops, kept_events = run(kept, step, stages(), lead=lead)
    assert len(events) == 2
    assert kept_events == events
    np.testing.assert_allclose(got, expected, rtol=2e-5)
    want = plain.params()
    for name, leaf in kept.params().items():
        np.testing.assert_allclose(leaf, want[name], rtol=1e-3, atol=2e-5, err_msg=name)
    first, second = (event.step for event in events)
    per_epoch = EXAMPLES // BATCH
    assert kept_flops[:first] == flops[:first]
    # At first activations are computed, as in the plain step, and then from those of fewer layers, all at once; two
    # epochs later everything is there.
    assert kept_flops[first] == pytest.approx(flops[first], rel=0.05)
    assert sum(kept_flops[second:]) < 0.5 * sum(flops[second:])
    assert max(kept_flops[second + 1 :]) < 0.3 * flops[second]
    for begin, end, share in ((first, second, 0.9), (second, STEPS, 0.3)):
        known = begin - begin % per_epoch + 2 * per_epoch
        assert known < end
        assert max(kept_flops[known:end]) < share * flops[known]
    assert step.cache.store.is_complete
    assert [len(program.frozen.names) for program in step.programs] == [0, 2, 4]
    assert [program.ahead for program in step.programs] == [False, lead > 0, lead > 0]


@pytest.mark.slow
def test_frozen_layers_hold_still_and_their_activations_are_computed_once():
    training, step = Training(), cached()
    computed = []
    for indices in batches(stop=4):
        step(*training.args, indices, IMAGES[indices], LABELS[indices])
    training.optimizer.freeze(training.model, training.layers.names[:2])
    before = training.params()
    for indices in batches(4, 16):
        missing = not (step.cache is not None and step.cache.store.has(indices))
        step(*training.args, indices, IMAGES[indices], LABELS[indices])
        computed.append(missing)
        assert (step.flops > step.program(*training.args, indices, IMAGES[indices], LABELS[indices]).cost.flops) == (
            missing
        )
    assert computed == [True] * 4 + [False] * 8
    for name, leaf in training.params().items():
        held = name.startswith(("linear/0", "linear/1", "norm/0", "norm/1"))
        assert np.array_equal(leaf, before[name]) == held, name
    assert len(step.programs) == 2


@pytest.mark.slow
def test_activations_of_a_larger_set_are_computed_from_those_of_the_smaller():
    training, step = Training(), cached()
    training.optimizer.freeze(training.model, training.layers.names[:1])
    for indices in batches(0, 4):
        step(*training.args, indices, IMAGES[indices], LABELS[indices])
    small = step.cache.build_flops
    training.optimizer.freeze(training.model, training.layers.names[:3])
    indices = next(batches(4))
    program = step.program(*training.args, indices, IMAGES[indices], LABELS[indices])
    step(*training.args, indices, IMAGES[indices], LABELS[indices])
    # All 64 of them at once.
    assert step.flops - program.cost.flops == pytest.approx(EXAMPLES * (step.cache.build_flops - small))
    assert step.cache.store.is_complete
    assert 0 < small < step.cache.build_flops


@pytest.mark.slow
def test_where_activations_cannot_be_kept_the_plain_step_goes_on_and_says_why_once():
    plain, kept = Training(), Training()
    expected, flops, _ = run(plain, sfj.TrainStep(make_step(noisy_loss_fn)), stages())
    step = sfj.nnx.CachedStep(make_step, noisy_loss_fn, examples=EXAMPLES)
    with pytest.warns(sfj.SavingWarning, match="activations are not kept: .*not the same for an example every") as said:
        got, kept_flops, _ = run(kept, step, stages())
    assert len(said) == len({str(one.message) for one in said})
    assert step.cache is None
    assert (got, kept_flops) == (expected, flops)


@pytest.mark.slow
def test_where_frozen_layers_compute_with_the_number_of_examples_a_smaller_batch_ends_the_cache():
    def loss(model, images, labels):
        return loss_fn(model, images / len(images), labels)

    plain, kept = Training(), Training()
    step, reference = cached(loss), sfj.TrainStep(make_step(loss))
    for training in (plain, kept):
        training.optimizer.freeze(training.model, training.layers.names[:2])
    for indices, keeps, warns in (
        (np.arange(16), True, False),
        (np.arange(16, 24), False, True),
        (np.arange(16), False, False),
    ):
        batch = IMAGES[indices], LABELS[indices]
        with pytest.warns(sfj.SavingWarning, match="of 8 ") if warns else contextlib.nullcontext():
            got = step(*kept.args, indices, *batch)
        np.testing.assert_allclose(got, reference(*plain.args, *batch), rtol=2e-5)
        assert (step.cache is not None) == keeps


@pytest.mark.slow
def test_where_there_is_no_room_the_plain_step_goes_on():
    training, step = Training(), cached(storage=Storage(budget=EXAMPLES * 24 * 4 - 1))
    training.optimizer.freeze(training.model, training.layers.names[:2])
    indices = next(batches())
    with pytest.warns(sfj.SavingWarning, match="activations are not kept: examples: 64 .* the budget is 6,143"):
        step(*training.args, indices, IMAGES[indices], LABELS[indices])
    assert step.cache is None
    assert len(step.programs) == 1


@pytest.mark.slow
def test_what_would_not_pay_any_more_is_not_kept():
    training = Training()
    options = {"account": training.account(), "total_steps": STEPS}
    step = cached(**options)
    training.optimizer.freeze(training.model, training.layers.names[:2])
    indices = next(batches())
    batch = indices, IMAGES[indices], LABELS[indices]
    step(*training.args, *batch)
    assert step.cache is not None
    assert step.account is options["account"]
    training.optimizer.step[...] = STEPS - 2  # as after a restore
    late = cached(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        late(*training.args, *batch)
    assert late.cache is None


@pytest.mark.slow
def test_it_goes_on_when_layers_train_again():
    plain, kept = Training(), Training()
    step, reference = cached(), sfj.TrainStep(make_step(loss_fn))
    for names, part in ((4, batches(0, 5)), (1, batches(5, 10)), (0, batches(10, 12)), (2, batches(12, 18))):
        for training in (plain, kept):
            training.optimizer.freeze(
                training.model, sfj.Frozen(training.layers, frozenset(training.layers.names[:names]))
            )
        for indices in part:
            batch = IMAGES[indices], LABELS[indices]
            np.testing.assert_allclose(
                step(*kept.args, indices, *batch), reference(*plain.args, *batch), rtol=2e-5, err_msg=str(names)
            )


@pytest.mark.slow
def test_a_smaller_last_batch_and_stored_bfloat16():
    training, step = Training(), cached(storage=Storage(dtype="bfloat16"))
    training.optimizer.freeze(training.model, training.layers.names[:2])
    for indices in (np.arange(16), np.arange(16, 24), np.arange(24)):
        loss = step(*training.args, indices, IMAGES[indices], LABELS[indices])
        assert np.isfinite(loss)
    assert step.cache.store.filled.sum() == 24
    assert step.cache.store.values[0].dtype == jnp.bfloat16


@pytest.mark.slow
def test_batches_over_several_devices_give_the_same():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    everywhere, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    losses, flops = [], []
    for step, keeps in ((sfj.TrainStep(make_step(loss_fn)), False), (cached(), True)):
        training = Training()
        for module in training.args:
            nnx.update(module, jax.device_put(nnx.state(module), everywhere))
        freezer = sfj.nnx.Freezer(*training.args, stages(), train_step=step, lead=1)
        losses.append([])
        flops.append([])
        for indices in batches():
            batch = jax.device_put((IMAGES[indices], LABELS[indices]), split)
            losses[-1].append(float(step(*training.args, *([indices] if keeps else []), *batch)))
            flops[-1].append(step.flops if keeps else step.last.cost.flops * len(jax.devices()))
            freezer.step()
    np.testing.assert_allclose(*losses, rtol=1e-5)
    begin = freezer.events[0].step
    assert flops[0][:begin] == flops[1][:begin]  # of all devices
    assert flops[1][-1] == step.last.cost.flops * len(jax.devices()) < flops[0][-1]
    assert step.cache.store.is_complete
    assert [program.ahead for program in step.programs] == [False, True, True]
    (stored,) = step.cache.store.values
    assert [len(shard.data) for shard in stored.addressable_shards] == [EXAMPLES // len(jax.devices())] * 8


@pytest.mark.slow
def test_a_restored_run_goes_on_with_activations_computed_anew(tmp_path):
    def go_on(training, freezer, step, part):
        losses = []
        for indices in part:
            losses.append(float(step(*training.args, indices, IMAGES[indices], LABELS[indices])))
            freezer.step()
        return losses

    first, second = Training(), Training()
    step = cached()
    freezer = sfj.nnx.Freezer(*first.args, stages(), train_step=step)
    go_on(first, freezer, step, batches(0, 14))
    freezer.save(tmp_path / "checkpoint")
    straight = go_on(first, freezer, step, batches(14, 26))
    again = cached()
    freezer = sfj.nnx.Freezer(*second.args, stages(), train_step=again)
    freezer.restore(tmp_path / "checkpoint")
    assert go_on(second, freezer, again, batches(14, 26)) == straight
    assert again.cache.frozen == step.cache.frozen
    assert len(again.cache.frozen.names) == 4


def test_wrong_arguments():
    with pytest.raises(ValueError, match="examples: got 0, expected an integer of at least 1"):
        sfj.nnx.CachedStep(make_step, loss_fn, examples=0)
    with pytest.raises(ValueError, match="place: got 'somewhere', expected 'device' or 'host'; to keep files, use"):
        cached(storage=Storage("somewhere"))
    with pytest.raises(TypeError, match=r"storage: got str 'host', expected .*Storage\('host'\)"):
        cached(storage="host")
    with pytest.raises(ValueError, match="dtype: got int8, expected float32, bfloat16, float16"):
        cached(storage=Storage(dtype="int8"))
    with pytest.raises(TypeError, match=r"train_step: got train_step jitted by nnx\.jit, expected the plain function"):
        sfj.nnx.CachedStep(lambda loss: nnx.jit(make_step(loss)), loss_fn, examples=4)
    training, step = Training(), cached()
    with pytest.raises(ValueError, match="owner: the step was not called yet"):
        step.prepare(training.optimizer, training.optimizer)
    training.optimizer.freeze(training.model, training.layers.names[:2])
    with pytest.raises(ValueError, match="indices"):
        step(*training.args, np.full(BATCH, EXAMPLES), IMAGES[:BATCH], LABELS[:BATCH])


@pytest.mark.slow
def test_what_is_traced_ahead_is_waited_for_once_and_at_once(monkeypatch):
    class Slow(sfj.TrainStep):
        def compile_ahead(self, *args):
            self.wait_seconds += 1000
            return super().compile_ahead(*args)

    monkeypatch.setattr("smartfrz_jax.nnx.cached_step.TrainStep", Slow)
    training, step = Training(), cached()
    freezer = sfj.nnx.Freezer(*training.args, stages(), train_step=step, lead=2)
    after = [0.0]
    for indices in batches():
        step(*training.args, indices, IMAGES[indices], LABELS[indices])
        freezer.step()
        after.append(step.wait_seconds)
    ahead = [event.step - 2 for event in freezer.events]
    assert [at for at, seconds in enumerate(np.diff(after), 1) if seconds > 900] == ahead
    assert 2000 < step.wait_seconds < 2900
    step.restored([])
    assert step.wait_seconds == pytest.approx(after[-1])
