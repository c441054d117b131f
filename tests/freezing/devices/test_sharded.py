"""Fully sharded arrays stay where they are when layers freeze and return."""

import contextlib

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import smartfrz_jax as sfj
from smartfrz_jax import Frozen
from smartfrz_jax.pytrees import paths
from tests.freezing.devices.network import (
    ADAMW,
    NAMES,
    X,
    Y,
    arrays,
    batch,
    compiled_text,
    gradient_shapes,
    make,
    mesh_of,
    reduced,
    step,
    train_step,
)

pytestmark = [pytest.mark.usefixtures("jax_defaults"), pytest.mark.slow]


def shard(module, mesh):
    """Every array over all devices by its last side, as fully sharded training has it."""

    def spec(leaf):
        return PartitionSpec(*(None,) * (leaf.ndim - 1), "data") if leaf.ndim else PartitionSpec()

    state = nnx.state(module)
    nnx.update(module, jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec(leaf))), state))


def shardings(module):
    return {name: leaf.sharding for name, leaf in paths.flatten(nnx.as_pure(nnx.state(module))).items()}


@pytest.mark.parametrize("returning", ["fresh", "kept"])
def test_fully_sharded_arrays_stay_where_they_are_and_return_there(returning):
    mesh = mesh_of(AxisType.Auto)
    model, optimizer = make(ADAMW, returning=returning)
    shard(model, mesh)
    shard(optimizer, mesh)
    before, where = arrays(optimizer), shardings(optimizer)
    params, params_where = arrays(model), shardings(model)
    for names in (NAMES[:1], NAMES[:3], (), NAMES[1:2], ()):
        optimizer.freeze(model, Frozen(optimizer.frozen.layers, frozenset(names)))
        assert shardings(model) == params_where
        now = shardings(optimizer)
        assert now == {name: where[name] for name in now}
        assert len(now) == len(where) - 4 * len(names)
        assert all(name in now for name in where if not any(f"/{layer}/" in name for layer in names))
    for name, leaf in arrays(model).items():
        assert np.array_equal(leaf, params[name])
    for name, leaf in arrays(optimizer).items():
        assert np.array_equal(leaf, before[name]) or name == "kept_version"


@pytest.mark.slow
@pytest.mark.parametrize("tx", [ADAMW, optax.adafactor(0.01, min_dim_size_to_factor=8)], ids=["adamw", "adafactor"])
def test_a_fully_sharded_run_in_which_layers_freeze_and_return_is_that_of_one_device(tx):
    mesh = mesh_of(AxisType.Auto)

    def run(sharded):
        kernels = []
        model, optimizer = make(tx, returning="kept")
        if sharded:
            shard(model, mesh)
        x, y = batch(mesh) if sharded else (X, Y)
        for i, names in enumerate(((), NAMES[:2], ())):
            optimizer.freeze(model, Frozen(optimizer.frozen.layers, frozenset(names)))
            for _ in range(2):
                train_step(model, optimizer, x, y)
            if sharded and i < 2:
                shapes = reduced(compiled_text(train_step, model, optimizer, x, y))
                kernels.append(set(shapes) & {shape for shape in gradient_shapes(NAMES[:2]) if len(shape) == 2})
        assert not sharded or list(map(len, kernels)) == [2, 0]
        return arrays(model), shardings(model)

    (params, where), (expected, _) = run(True), run(False)
    for name, leaf in params.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=2e-4, atol=2e-6, err_msg=name)
    assert any(not sharding.is_fully_replicated for sharding in where.values())


@pytest.mark.slow
def test_programs_for_returning_layers_are_compiled_ahead_for_where_their_state_will_be():
    """Adafactor's factors have another shape than the parameter that they belong to."""
    mesh = mesh_of(AxisType.Auto)
    schedule = {0: (), 2: NAMES[:2], 4: NAMES[:1]}

    def decide(state, layers, *, step, **signals):
        return frozenset(schedule[max(at for at in schedule if at <= step)]), state

    def run(ahead):
        model, optimizer = make(optax.adafactor(0.01, min_dim_size_to_factor=8), returning="kept")
        shard(model, mesh)
        programs = sfj.TrainStep(step)
        policy = sfj.Policy(lambda layers, params: (), decide)
        freezer = sfj.nnx.Freezer(model, optimizer, policy, train_step=programs if ahead else None, lead=1)
        for _ in range(7):
            programs(model, optimizer, *batch(mesh))
            freezer.step()
        assert [program.ahead for program in programs.programs] == [False, ahead, ahead]
        return arrays(model)

    expected = run(ahead=False)
    for name, leaf in run(ahead=True).items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)


@pytest.mark.parametrize("is_outside", [False, True], ids=["in the mesh", "outside of it"])
def test_variables_that_say_how_they_are_split_freeze_and_return(is_outside):
    """As Flax has it for tensor parallelism: by metadata, from which it places every Variable that is made."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    split = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
    with jax.set_mesh(mesh):
        model = nnx.Sequential(*[nnx.Linear(8, 8, kernel_init=split, rngs=nnx.Rngs(seed)) for seed in range(3)])
        layers = sfj.nnx.find_layers(model, np.ones((1, 8), np.float32))
        optimizer = sfj.nnx.Optimizer(model, optax.adam(1e-3), layers=layers)
    before, graphdef = shardings(optimizer), nnx.graphdef(optimizer)
    assert any(sharding.spec == PartitionSpec(None, "model") for sharding in before.values())
    with contextlib.nullcontext() if is_outside else jax.set_mesh(mesh):
        optimizer.freeze(model, ["layers/0"])
        now = shardings(optimizer)
        assert len(now) == len(before) - 4
        assert now == {name: before[name] for name in now}
        optimizer.freeze(model, Frozen(layers))
    assert shardings(optimizer) == before
    assert nnx.graphdef(optimizer) == graphdef  # so it is the same program again
