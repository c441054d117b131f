"""Losses and updates that are not finite: left out, or the end."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj
from train import finetune, log
from train.data import metrics
from train.loop import Loop, make_step
from train.recovery.not_finite import skip_not_finite

pytestmark = pytest.mark.usefixtures("jax_defaults")
GOOD = np.random.default_rng(0).standard_normal((4, 8), np.float32)
BAD = np.where(np.arange(8) == 3, np.float32(np.nan), GOOD)
HUGE = GOOD * np.float32(1e25)  # of which the loss overflows
TX = optax.adam(optax.cosine_decay_schedule(0.1, 20))


class Network(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.norm = nnx.Linear(8, 8, use_bias=False, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.last = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.last(self.norm(self.first(x)))


def loss_fn(model, x):
    return (model(x) ** 2).mean() + 1e-9 * (x**2).mean()


def made():
    model = Network()
    optimizer = sfj.nnx.Optimizer(model, TX, layers=sfj.nnx.find_layers(model, GOOD))
    optimizer.freeze(model, ["first"])
    return model, optimizer


STEP = sfj.TrainStep(skip_not_finite(make_step(loss_fn)))
PLAIN = sfj.TrainStep(make_step(loss_fn))


def arrays(model, optimizer):
    state = nnx.as_pure((nnx.state(model), nnx.state(optimizer.opt_state)))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize("bad", [BAD, HUGE])
@pytest.mark.parametrize("is_frozen", [True, False])
def test_such_a_step_changes_nothing_and_others_are_as_without(bad, is_frozen):
    run, plain = made(), made()
    if not is_frozen:
        for model, optimizer in (run, plain):
            optimizer.freeze(model, sfj.Frozen(optimizer.frozen.layers))
    for model, _ in (run, plain):
        model.train()
    losses = [float(STEP(*run, x)) for x in (GOOD, bad, GOOD, bad)]
    plain_losses = [float(PLAIN(*plain, GOOD)) for _ in range(2)]
    assert np.isnan(losses).tolist() == [False, True, False, True]
    np.testing.assert_allclose([losses[0], losses[2]], plain_losses, rtol=1e-5)
    for one, other in zip(arrays(*run), arrays(*plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    assert (int(run[1].step[...]), int(plain[1].step[...])) == (4, 2)


def losses_of(tmp_path, batches, **options):
    model, optimizer = made()
    freezer = sfj.nnx.Freezer(model, optimizer, sfj.policies.never())
    with log.Log(tmp_path / "log.jsonl", log.Run("never", freezer.layers.names)) as written:
        list(Loop(written, freezer, STEP, log_every=2, **options).run([(x,) for x in batches]))
    run = log.read(tmp_path / "log.jsonl")
    assert all(np.isfinite(leaf).all() for leaf in arrays(model, optimizer))
    return [step.loss for step in run.steps], run.skipped


def test_steps_that_are_left_out_are_counted(tmp_path):
    losses, skipped = losses_of(tmp_path, [GOOD, BAD, BAD, GOOD, BAD, BAD, GOOD], may_skip=2)
    assert [loss is None for loss in losses] == [False, True, True, False, True, True, False]
    assert skipped == 4


@pytest.mark.parametrize(("may_skip", "step", "says"), [(0, 2, "step 2 .*'never'; lower"), (1, 3, "as after the 1 ")])
def test_too_many_in_a_row_are_the_end(tmp_path, may_skip, step, says):
    with pytest.raises(FloatingPointError, match=rf"the loss is nan after .*{says}"):
        losses_of(tmp_path, [GOOD, BAD, BAD, GOOD], may_skip=may_skip)
    assert [one.step for one in log.read(tmp_path / "log.jsonl").steps] == list(range(1, step + 1))


def test_an_evaluation_whose_loss_is_not_finite_ends_the_run():
    batch = (jnp.ones((2, 4)),), jnp.array([0, 2], jnp.int32), jnp.ones(2)
    data = SimpleNamespace(prepare=lambda inputs: inputs, evaluation_batches=lambda: [batch])
    evaluate = finetune.make_evaluation(data, metrics.metrics_of("any"))
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    assert list(evaluate(model)) == ["accuracy", "loss"]
    model.kernel[...] = jnp.full((4, 3), jnp.nan)
    with pytest.raises(FloatingPointError, match="the loss on the evaluation split is nan; lower the learning rate"):
        evaluate(model)
