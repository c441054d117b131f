"""Checkpoints of NNX runs: they go on bit for bit, and what does not fit changes nothing."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj
from tests.nnx.network import TX, Net, X, Y, arrays, make, train_step

X4 = jnp.arange(8.0).reshape(2, 4)

pytestmark = pytest.mark.usefixtures("jax_defaults")


def run_for(steps, model, optimizer, freezer):
    for _ in range(steps):
        train_step(model, optimizer, X, Y)
        freezer.step()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["static_prefix", "random", "smartfrz", "autofreeze"])
@pytest.mark.parametrize("at", [2, 9])
def test_a_restored_run_goes_on_bit_identically_across_a_freeze(tmp_path, name, at):
    def start():
        policy = {
            "static_prefix": lambda: sfj.static_prefix([(0.4, 0.85)], total_steps=14),
            "random": lambda: sfj.policies.random(0.4, total_steps=14),
            "smartfrz": lambda: sfj.smartfrz(
                sfj.Predictor(sfj.predictor.PredictorConfig(size=8), rngs=nnx.Rngs(3)),
                schedule=sfj.policies.Schedule(record_every=1, evaluate_every=3, window=3),
                caution=0.4,
            ),
            "autofreeze": lambda: sfj.autofreeze(2, percentile=80),
        }[name]()
        model, optimizer = make()
        return model, optimizer, sfj.nnx.Freezer(model, optimizer, policy)

    straight = start()
    run_for(14, *straight)
    assert straight[2].events, "nothing froze, so nothing is tested"

    first = start()
    run_for(at, *first)
    first[2].save(tmp_path / "run")
    expected = [arrays(module) for module in straight[:2]]
    events = straight[2].events
    for model, optimizer, freezer in (start(), straight):  # the latter goes back to what it had dropped since
        freezer.restore(tmp_path / "run")
        run_for(14 - at, model, optimizer, freezer)
        assert freezer.events == events
        assert freezer.steps == 14 == int(optimizer.step[...])
        for module, leaves in zip((model, optimizer), expected, strict=True):
            now = arrays(module)
            assert now.keys() == leaves.keys()
            for key, leaf in leaves.items():
                np.testing.assert_array_equal(now[key], leaf, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("returning", ["fresh", "kept"])
def test_state_that_updates_have_made_more_precise_goes_on_bit_identically(tmp_path, returning):
    """``inject_hyperparams`` makes the moments of bfloat16 weights float32 where others are float32."""

    def start():
        model = nnx.Sequential(
            *(nnx.Linear(4, 4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(number)) for number in range(3)),
            nnx.Linear(4, 4, rngs=nnx.Rngs(3)),
        )
        tx = optax.inject_hyperparams(optax.adamw)(learning_rate=0.01)
        optimizer = sfj.nnx.Optimizer(model, tx, layers=sfj.nnx.find_layers(model, X4), returning=returning)
        policy = sfj.static_prefix([(0.2, 0.5), (0.4, 0.0), (0.7, 0.5)], total_steps=10)
        return model, optimizer, sfj.nnx.Freezer(model, optimizer, policy)

    def run(model, optimizer, freezer, steps):
        for _ in range(steps):
            _, grads = optimizer.value_and_grad(lambda model: (model(X4) ** 2).mean())(model)
            optimizer.update(model, grads)
            freezer.step()
        return arrays(model) | arrays(optimizer)

    straight, first, again = start(), start(), start()
    expected = run(*straight, 10)
    assert {leaf.dtype.name for name, leaf in expected.items() if "mu" in name and leaf.size} == {"float32"}
    run(*first, 3)
    first[2].save(tmp_path / "run")
    again[2].restore(tmp_path / "run")
    now = run(*again, 7)
    assert again[2].events == straight[2].events
    for name, leaf in expected.items():
        np.testing.assert_array_equal(now[name], leaf, err_msg=name)


@pytest.mark.slow
def test_a_checkpoint_of_another_network_is_refused_and_nothing_changes(tmp_path):
    model, optimizer = make()
    freezer = sfj.nnx.Freezer(model, optimizer, sfj.policies.never())
    other = Net(nnx.Rngs(0), blocks=1)
    other_optimizer = sfj.nnx.Optimizer(other, TX, layers=sfj.nnx.find_layers(other, X))
    sfj.nnx.Freezer(other, other_optimizer, sfj.policies.never()).save(tmp_path / "other")
    before = arrays(model)
    with pytest.raises(ValueError, match=r"4 layers.*6.*blocks/1"):
        freezer.restore(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        freezer.restore(tmp_path / "nowhere")

    wide = Net(nnx.Rngs(0), width=8)
    wide_optimizer = sfj.nnx.Optimizer(wide, TX, layers=sfj.nnx.find_layers(wide, X))
    wide_freezer = sfj.nnx.Freezer(wide, wide_optimizer, sfj.policies.never())
    run_for(1, wide, wide_optimizer, wide_freezer)
    wide_freezer.save(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"float32\[3, 3, 8, 8\] there, expected float32\[3, 3, 4, 4\]"):
        freezer.restore(tmp_path / "wide")
    assert not optimizer.frozen.names
    for key, leaf in arrays(model).items():
        np.testing.assert_array_equal(leaf, before[key])
    run_for(1, model, optimizer, freezer)


@pytest.mark.slow
def test_a_failed_restore_leaves_the_optimizer_as_it_was(tmp_path):
    """Also where the checkpoint has layers frozen that are active now: their moments must not be lost."""
    wide = Net(nnx.Rngs(0), width=8)
    wide_optimizer = sfj.nnx.Optimizer(wide, TX, layers=sfj.nnx.find_layers(wide, X))
    wide_optimizer.freeze(wide, ["stem"])
    sfj.nnx.Freezer(wide, wide_optimizer, sfj.policies.never()).save(tmp_path / "wide")
    model, optimizer = make()
    freezer = sfj.nnx.Freezer(model, optimizer, sfj.policies.never())
    run_for(2, model, optimizer, freezer)
    before = arrays(optimizer)
    with pytest.raises(ValueError, match="does not fit"):
        freezer.restore(tmp_path / "wide")
    after = arrays(optimizer)
    assert after.keys() == before.keys()
    for key, leaf in before.items():
        np.testing.assert_array_equal(after[key], leaf, err_msg=key)
