"""``nnx.CachedStep``: what is stored is of the values that the frozen front has, whoever sets them."""

import gc
import weakref

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj
from tests.support.train_steps import loss_fn, make_step

EXAMPLES, BATCH = 32, 16
IMAGES = np.random.default_rng(0).standard_normal((EXAMPLES, 8), np.float32)
LABELS = np.random.default_rng(1).integers(0, 3, EXAMPLES).astype(np.int32)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("jax_defaults")]


class Net(nnx.Module):
    """Two layers and a head; the second one's input is scaled by a variable that the loss only reads."""

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.first, self.second = (nnx.Linear(8, 8, rngs=rngs) for _ in range(2))
        self.head = nnx.Linear(8, 3, rngs=rngs)
        self.strength = nnx.Variable(jnp.float32(1.0))

    def __call__(self, x):
        x = jnp.tanh(self.first(x)) * self.strength[...]
        return self.head(jnp.tanh(self.second(x)))


def make_growing_step(loss_fn):
    train_step = make_step(loss_fn)

    def growing(model, optimizer, *inputs):
        model.strength[...] = model.strength[...] + 0.5
        return train_step(model, optimizer, *inputs)

    return growing


def training(seed=0, frozen=("first", "second")):
    model = Net(seed)
    layers = sfj.nnx.find_layers(model, IMAGES[:BATCH])
    optimizer = sfj.nnx.Optimizer(model, optax.sgd(0.1), layers=layers)
    optimizer.freeze(model, frozen)
    return model, optimizer


def cached(make_step=make_step, **options):
    return sfj.nnx.CachedStep(make_step, loss_fn, examples=EXAMPLES, **options)


def losses(step, pair, epochs=2):
    keeps = isinstance(step, sfj.nnx.CachedStep)
    batches = np.tile(np.arange(EXAMPLES).reshape(-1, BATCH), (epochs, 1))
    return [float(step(*pair, *[rows] * keeps, IMAGES[rows], LABELS[rows])) for rows in batches]


def compare(step, pairs, epochs=2):
    """A step from activations and the plain step give the same; which of its calls computed activations."""
    computed = []

    def counted(model, optimizer, rows, *inputs):
        loss = step(model, optimizer, rows, *inputs)
        computed.append(step.cache is not None and step.flops > step.last.cost.flops)
        return loss

    batches = np.tile(np.arange(EXAMPLES).reshape(-1, BATCH), (epochs, 1))
    got = [float(counted(*pairs[0], rows, IMAGES[rows], LABELS[rows])) for rows in batches]
    np.testing.assert_allclose(got, losses(sfj.TrainStep(make_step(loss_fn)), pairs[1], epochs), rtol=1e-5)
    return computed


@pytest.mark.parametrize("donate", [False, True])
def test_a_second_model_has_activations_of_its_own(donate):
    step = cached(donate=donate)
    assert compare(step, [training(0), training(0)]) == [True, True, False, False]
    assert compare(step, [training(1), training(1)]) == [True, True, False, False]


def test_a_second_model_that_has_the_same_frozen_arrays_goes_on_with_what_is_stored():
    step, (model, optimizer) = cached(), training()
    compare(step, [(model, optimizer), training()])
    again = nnx.clone((model, optimizer))
    assert compare(step, [again, nnx.clone((model, optimizer))], epochs=1) == [False, False]


@pytest.mark.parametrize("donate", [False, True])
def test_an_evaluation_that_hands_the_same_values_back_changes_nothing(donate):
    """``nnx.jit`` puts what it was given into the model anew, as other arrays."""
    evaluate = nnx.jit(lambda model: model(IMAGES).sum())
    step, pairs = cached(donate=donate), [training(), training()]
    assert compare(step, pairs) == [True, True, False, False]
    for _ in range(2):
        before = pairs[0][0].first.kernel.get_raw_value()
        evaluate(pairs[0][0])
        assert pairs[0][0].first.kernel.get_raw_value() is not before
        assert compare(step, pairs, epochs=1) == [False, False]


def test_weights_that_are_restored_in_the_midst_of_a_run(tmp_path):
    other = training(5)
    sfj.nnx.Freezer(*other, sfj.policies.never()).save(tmp_path / "run")
    step, pairs = cached(), [training(), training()]
    assert compare(step, pairs) == [True, True, False, False]
    for model, _ in pairs:
        sfj.nnx.restore_params(tmp_path / "run", model)
    assert compare(step, pairs) == [True, True, False, False]


def test_weights_that_are_restored_before_more_freezes():
    step, pairs = cached(), [training(frozen=["first"]), training(frozen=["first"])]
    compare(step, pairs)
    for model, optimizer in pairs:
        nnx.update(model.first, nnx.state(Net(7).first))
        optimizer.freeze(model, ["second"])
    assert compare(step, pairs)[2:] == [False, False]


def test_a_module_that_is_replaced_and_a_variable_that_is_set():
    step, pairs = cached(), [training(), training()]
    compare(step, pairs)
    for model, _ in pairs:
        model.second = nnx.clone(Net(3).second)
    assert compare(step, pairs) == [True, True, False, False]
    for model, _ in pairs:
        model.strength[...] = jnp.float32(3.0)
    assert compare(step, pairs) == [True, True, False, False]
    for model, _ in pairs:
        model.head.kernel[...] = jnp.ones((8, 3))  # which trains
    assert compare(step, pairs, epochs=1) == [False, False]


def test_what_the_step_itself_changes_outside_of_the_loss():
    step, plain = cached(make_growing_step), sfj.TrainStep(make_growing_step(loss_fn))
    kept, pair = training(), training()
    with pytest.warns(sfj.SavingWarning, match="the step changes 'strength' outside of the loss") as said:
        got = losses(step, kept)
    assert len(said) == 1
    assert step.cache is None
    np.testing.assert_array_equal(got, losses(plain, pair))
    program = step.program(*kept, np.arange(BATCH), IMAGES[:BATCH], LABELS[:BATCH])
    assert program is step.last


def test_what_the_step_changes_is_seen_while_compiling_ahead():
    step, plain = cached(make_growing_step), sfj.TrainStep(make_growing_step(loss_fn))
    kept, pair = training(frozen=()), training(frozen=())
    policy = sfj.static_prefix(total_steps=8, stages=((0.25, 0.6),))
    freezers = [sfj.nnx.Freezer(*args, policy, train_step=one, lead=1) for args, one in ((kept, step), (pair, plain))]

    def run():
        for rows in np.tile(np.arange(EXAMPLES).reshape(-1, BATCH), (4, 1)):
            batch = IMAGES[rows], LABELS[rows]
            yield float(step(*kept, rows, *batch)), float(plain(*pair, *batch))
            for freezer in freezers:
                freezer.step()

    with pytest.warns(sfj.SavingWarning, match="the step changes 'strength'"):
        got, expected = zip(*run(), strict=True)
    assert [event.step for event in freezers[0].events] == [event.step for event in freezers[1].events] != []
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_whether_it_pays_is_counted_anew():
    model, optimizer = training()
    layers = optimizer.frozen.layers
    account = sfj.nnx.account(model, layers, loss_fn, IMAGES[:BATCH], LABELS[:BATCH], tx=optax.sgd(0.1))
    step = cached(account=account, total_steps=6)
    losses(step, (model, optimizer))
    assert step.cache is not None
    nnx.update(model.first, nnx.state(Net(7).first))
    losses(step, (model, optimizer), epochs=1)  # two steps are left, which fill what would be kept
    assert step.cache is None


def test_a_model_is_released_with_its_last_reference():
    step, pair = cached(), training()
    losses(step, pair)
    gone = weakref.ref(pair[0].first.kernel.get_raw_value())
    del pair
    gc.collect()
    assert gone() is None
