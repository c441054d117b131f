"""Steps in parts, with blocks that are computed again, with parameters that are split: the results of plain ones."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax.pytrees import paths
from tests.train.devices.blocks import EXAMPLES, TX, WIDTH, Made, X, Y, loss_fn
from train.devices import mesh as meshes
from train.devices.recompute import recomputed
from train.loop import make_step

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("jax_defaults")]
FRONT = ("blocks/0", "blocks/1/wide")
KERNEL = 4 * 2 * WIDTH**2  # bytes


@functools.cache
def plain(frozen=(), norm=False):
    return Made(frozen=frozen, norm=norm).run()


@pytest.mark.parametrize("frozen", [(), FRONT], ids=["active", "frozen front"])
@pytest.mark.parametrize(
    "made",
    [
        {"accumulate": 4},
        {"remat": True},
        {"mesh": "data=4,fsdp=2"},
        {"mesh": "data=4,fsdp=2", "accumulate": 2, "remat": True},
        {"remat": True, "scan": True},
    ],
    ids=lambda made: " ".join(f"{name}={value}" for name, value in made.items()),
)
def test_results_are_those_of_a_plain_step(made, frozen):
    (losses, arrays), (expected_losses, expected) = Made(frozen=frozen, **made).run(), plain(frozen)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for name, leaf in arrays.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("mesh", ["data=4,fsdp=2"])
def test_statistics_of_batch_norms_go_on_where_their_block_is_computed_again_and_stay_where_it_is_frozen(mesh):
    (losses, arrays), (expected_losses, expected) = (
        Made(mesh, remat=True, norm=True, frozen=FRONT).run(),
        plain(FRONT, True),
    )
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for name, leaf in arrays.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert np.all(arrays["blocks/0/norm/mean"] == 0)
    assert np.any(arrays["blocks/2/norm/mean"] != 0)


def test_a_loss_with_nothing_to_do_is_left_as_it_is():
    assert recomputed(loss_fn, remat=False) is loss_fn
    assert recomputed(loss_fn, remat=False, mesh=meshes.make_mesh("data=8", batch_size=8)) is loss_fn


def test_blocks_that_are_computed_again_take_less_memory():
    """In a scan: of blocks one after the other XLA keeps what it likes on CPU, where it takes the barriers out."""
    whole, again = (Made(remat=remat, depth=8, scan=True).cost for remat in (False, True))
    assert again.temp_bytes < 0.5 * whole.temp_bytes


def test_only_blocks_with_a_backward_pass_are_computed_again():
    active, front = (Made(remat=True, frozen=frozen) for frozen in ((), ("blocks/0", "blocks/1")))
    assert barriers(active) == 3
    assert barriers(front) == 1
    assert barriers(Made()) == 0


def barriers(made):
    """Those of ``jax.checkpoint`` around what is computed again."""
    lowered = jax.jit(functools.partial(_stepped, made)).lower(nnx.state((made.model, made.optimizer)))
    return lowered.as_text().count("optimization_barrier")


def test_parts_take_less_memory_and_gradients_of_frozen_layers_are_not_added_up():
    whole, parts = (Made(accumulate=accumulate).cost for accumulate in (1, 8))
    assert parts.temp_bytes < whole.temp_bytes
    made = Made(accumulate=8, frozen=FRONT)
    traced = jax.make_jaxpr(lambda state: _stepped(made, state))(nnx.state((made.model, made.optimizer)))
    (scan,) = [eqn for eqn in traced.jaxpr.eqns if eqn.primitive.name == "scan" and eqn.params["length"] == 8]
    carried = [var.aval.shape for var in scan.outvars]
    assert carried.count((WIDTH, 2 * WIDTH)) == 1  # of three
    assert carried.count((2 * WIDTH, WIDTH)) == 2


def _stepped(made, state):
    model, optimizer = nnx.merge(nnx.graphdef((made.model, made.optimizer)), state, copy=True)
    loss = made.step._step(model, optimizer, *made.batch)
    return loss, nnx.state((model, optimizer))


def test_the_account_is_that_of_the_whole_batch_and_the_saving_of_a_freeze_is_found():
    model = Made().model
    layers = sfj.nnx.find_layers(model, X)
    account = sfj.nnx.account(model, layers, loss_fn, (X,), Y, tx=TX)
    for options in ({"accumulate": 4}, {"remat": True}, {"mesh": "data=8", "scan": True}):
        made = Made(**options)
        step = sfj.TrainStep(made.step._step, account=account)  # a saving that does not come is a warning: an error
        step(made.model, made.optimizer, *made.batch)
        made.optimizer.freeze(made.model, [name for name in layers.names if name.startswith(FRONT)])
        step(made.model, made.optimizer, *made.batch)
        assert [len(program.frozen.names) for program in step.programs] == [0, 3]


class TestSplitParameters:
    @pytest.mark.parametrize("place", ["device", "host"])
    def test_activations_are_kept_and_results_are_those_of_a_plain_step(self, place):
        made = Made("data=4,fsdp=2", frozen=FRONT)
        before = where(made)
        step = sfj.nnx.CachedStep(
            lambda loss: meshes.pinned(make_step(loss), made.mesh),
            loss_fn,
            examples=EXAMPLES,
            storage=sfj.caching.Storage(place),
        )
        losses = [float(step(made.model, made.optimizer, np.arange(EXAMPLES), *made.batch)) for _ in range(3)]
        arrays = paths.flatten(nnx.as_pure(nnx.state(made.model)))
        expected_losses, expected = plain(FRONT)
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
        for name, leaf in arrays.items():
            np.testing.assert_allclose(np.array(leaf), expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
        assert step.cache.store.filled.all()
        assert where(made) == before

    def test_arrays_stay_where_they_are_and_one_program_is_enough(self):
        made = Made("data=4,fsdp=2")
        before = where(made)
        made.run()
        assert where(made) == before
        assert len(made.step.programs) == 1
        kernel = made.model.blocks[0].wide.kernel[...]
        assert {shard.data.shape for shard in kernel.addressable_shards} == {(WIDTH, WIDTH)}

    def test_kernels_are_gathered_for_both_passes_and_those_of_frozen_blocks_for_one(self):
        active, frozen = (
            Made("data=4,fsdp=2", frozen=names).cost.collectives for names in ((), ("blocks/0", "blocks/1"))
        )
        assert active.all_gather.bytes > 1.5 * 6 * KERNEL  # XLA finds that it has one of them still
        assert frozen.all_gather.bytes <= (6 + 2) * KERNEL
        assert active.reduced_bytes - frozen.reduced_bytes >= 4 * KERNEL / 2

    def test_each_device_has_its_part_of_parameters_and_of_the_state(self):
        whole, split = Made("data=8").cost, Made("data=4,fsdp=2").cost
        assert whole.argument_bytes - split.argument_bytes == 6 * 2 * KERNEL / 2  # kernels and their momentum


def where(made):
    return [leaf.sharding for leaf in jax.tree.leaves(nnx.state((made.model, made.optimizer)))]


def test_examples_of_a_part_stay_on_their_device():
    cost = Made("data=8", accumulate=4, frozen=FRONT).cost
    assert cost.collectives.all_gather.bytes == 0
    assert EXAMPLES % (8 * 4) == 0
