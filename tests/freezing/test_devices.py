"""Freezing on many devices: what is frozen is not reduced, and every array stays where it is. Donated buffers."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import smartfrz_jax as sfj
from smartfrz_jax import Frozen
from smartfrz_jax.cost.measured import program_cost
from smartfrz_jax.pytrees import paths

pytestmark = [pytest.mark.usefixtures("jax_defaults"), pytest.mark.slow]

WIDTHS = (16, 24, 32, 40, 8)
NAMES = ("layers/0", "layers/1", "layers/2", "layers/3")
X = jax.random.normal(jax.random.key(0), (32, WIDTHS[0]))
Y = jax.random.normal(jax.random.key(1), (32, WIDTHS[-1]))
MOMENTUM = optax.chain(optax.clip_by_global_norm(1.0), optax.add_decayed_weights(0.01), optax.sgd(0.05, momentum=0.9))
ADAMW = optax.adamw(0.01)


class Net(nnx.Module):
    def __init__(self, norm, rngs):
        self.layers = nnx.List([nnx.Linear(n, m, rngs=rngs) for n, m in itertools.pairwise(WIDTHS)])
        self.norms = nnx.List([nnx.BatchNorm(width, rngs=rngs) for width in (WIDTHS[1:-1] if norm else ())])

    def __call__(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < len(self.norms):
                x = self.norms[i](x)
            if i + 1 < len(self.layers):
                x = nnx.relu(x)
        return x


def make(tx=MOMENTUM, *, norm=False, returning="fresh"):
    model = Net(norm, nnx.Rngs(0))
    layers = sfj.nnx.find_layers(model, X)
    return model, sfj.nnx.Optimizer(model, tx, layers=layers, returning=returning)


def step(model, optimizer, x, y):
    loss, grads = optimizer.value_and_grad(lambda model, x: jnp.square(model(x) - y).mean())(model, x)
    optimizer.update(model, grads)
    return loss


train_step = nnx.jit(step)


def mesh_of(kind):
    return jax.make_mesh((8,), ("data",), axis_types=(kind,))


KINDS = {"params": [AxisType.Auto, AxisType.Explicit], "ids": ["auto", "explicit"]}


@pytest.fixture(**KINDS)
def mesh(request):
    mesh = mesh_of(request.param)
    with jax.set_mesh(mesh):
        yield mesh


def replicate(module, mesh):
    nnx.update(module, jax.device_put(nnx.state(module), NamedSharding(mesh, PartitionSpec())))


def batch(mesh):
    return jax.device_put((X, Y), NamedSharding(mesh, PartitionSpec("data")))


def arrays(module):
    return {name: np.array(leaf) for name, leaf in paths.flatten(nnx.as_pure(nnx.state(module))).items()}


def compiled_text(jitted, *args) -> str:
    compiled = jitted.lower(*args).compile()
    return getattr(compiled, "compiled", compiled).as_text()


COLLECTIVE = r" = (.*?) (?:all-reduce|reduce-scatter)(?:-start)?\("


def reduced(text) -> list[tuple[int, ...]]:
    """Shapes that a program reduces over the devices, with sides in order: XLA may transpose them."""
    lines = re.findall(COLLECTIVE, text)
    shapes = [shape for line in lines for shape in re.findall(r"f32\[([\d,]*)\]", line)]
    assert all(re.sub(r"f32\[[\d,]*\](\{[\d,]*\})?|/\*index=\d+\*/|[(), ]", "", line) == "" for line in lines), lines
    return sorted(tuple(sorted(map(int, filter(None, shape.split(","))))) for shape in shapes)


def gradient_shapes(active) -> list[tuple[int, ...]]:
    """What must be reduced: the gradients of some layers, and the loss."""
    sides = [(WIDTHS[NAMES.index(name)], WIDTHS[NAMES.index(name) + 1]) for name in active]
    return sorted([(), *((m,) for _, m in sides), *(tuple(sorted(side)) for side in sides)])


FROZEN_SETS = ((), NAMES[:1], NAMES[:3], (NAMES[2],), (NAMES[0], NAMES[3]))


@pytest.mark.slow
def test_gradients_of_frozen_layers_are_not_reduced(mesh):
    model, optimizer = make(ADAMW)
    replicate(model, mesh)
    replicate(optimizer, mesh)
    sizes = {}
    for frozen in FROZEN_SETS:
        optimizer.freeze(model, Frozen(optimizer.frozen.layers, frozenset(frozen)))
        shapes = reduced(compiled_text(train_step, model, optimizer, *batch(mesh)))
        assert shapes == gradient_shapes([name for name in NAMES if name not in frozen])
        sizes[frozen] = sum(4 * math.prod(shape) for shape in shapes)
    for frozen in FROZEN_SETS:
        params = sum(4 * (WIDTHS[NAMES.index(name)] + 1) * WIDTHS[NAMES.index(name) + 1] for name in frozen)
        assert sizes[()] - sizes[frozen] == params


def test_a_clip_and_a_logged_norm_do_not_bring_the_reductions_back(mesh):
    @nnx.jit
    def with_norm(model, optimizer, x, y):
        _, grads = optimizer.value_and_grad(lambda model, x: jnp.square(model(x) - y).mean())(model, x)
        optimizer.update(model, grads)
        return optax.tree.norm(grads)

    model, optimizer = make()
    optimizer.freeze(model, NAMES[:2])
    replicate(model, mesh)
    replicate(optimizer, mesh)
    shapes = reduced(compiled_text(with_norm, model, optimizer, *batch(mesh)))
    assert [shape for shape in shapes if shape] == [shape for shape in gradient_shapes(NAMES[2:]) if shape]


def test_gradients_of_frozen_layers_of_a_bare_pytree_are_not_reduced(mesh):
    params = {name: {"kernel": jnp.ones((n, m))} for name, n, m in zip(NAMES, WIDTHS[:-1], WIDTHS[1:], strict=True)}

    def apply_fn(params, x):
        for name in NAMES:
            x = jnp.tanh(x @ params[name]["kernel"])
        return x

    layers = sfj.find_layers(params, apply_fn, X)
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    state = sfj.linen.TrainState.create(apply_fn=apply_fn, params=params, tx=ADAMW, layers=layers)

    @jax.jit
    def step(state, x, y):
        loss, grads = state.value_and_grad(lambda params: jnp.square(apply_fn(params, x) - y).mean())(state.params)
        return state.apply_gradients(grads=grads), loss

    for frozen in FROZEN_SETS:
        state = state.freeze(Frozen(layers, frozenset(frozen)))
        expected = [shape for shape in gradient_shapes([n for n in NAMES if n not in frozen]) if len(shape) != 1]
        assert reduced(compiled_text(step, state, *batch(mesh))) == expected


def test_batch_norm_of_frozen_layers_is_not_reduced_either(mesh):
    model, optimizer = make(norm=True)
    replicate(model, mesh)
    replicate(optimizer, mesh)
    optimizer.freeze(model, NAMES[:3])
    assert reduced(compiled_text(train_step, model, optimizer, *batch(mesh))) == gradient_shapes(NAMES[3:])


class Stillness(sfj.Predictor):
    """Confident if the records differ little from the newest."""

    def __init__(self):
        super().__init__(sfj.predictor.PredictorConfig(size=8, hidden=4, features=4, head_hidden=4), rngs=nnx.Rngs(0))

    def __call__(self, observation):
        records, mask = observation.records, observation.mask
        moved = jnp.max(jnp.where(mask[:, None], jnp.abs(records - records[-1:]), 0.0))
        return jnp.stack([moved, jnp.float32(0.012)])


def run(policy, mesh=None, steps=12):
    """Steps with a policy, on one device or many. Returns the freezer, the parameters, and those of each freeze."""
    model, optimizer = make(norm=True)
    if mesh is not None:
        replicate(model, mesh)
        replicate(optimizer, mesh)
    freezer = sfj.nnx.Freezer(model, optimizer, policy)
    x, y = (X, Y) if mesh is None else batch(mesh)
    held = {}
    for _ in range(steps):
        loss = train_step(model, optimizer, x, y)
        frozen = freezer.step(loss=loss)
        new = [name for layer in frozen.layers if layer.name in frozen.names for name in (*layer.params, *layer.state)]
        held = {name: leaf for name, leaf in arrays(model).items() if name in new} | held
    return freezer, arrays(model), held


POLICIES = {
    "smartfrz": lambda: sfj.smartfrz(
        Stillness(), record_every=1, evaluate_every=2, window=3, caution=0.5, order="any", patience=1
    ),
    "autofreeze": lambda: sfj.autofreeze(evaluate_every=3, percentile=60),
    "static prefix": lambda: sfj.static_prefix([(0.4, 0.85)], total_steps=12),
}


@functools.cache
def run_alone(policy):
    """The run on a single device."""
    freezer, params, _ = run(policy())
    return freezer.events, params


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS["params"], ids=KINDS["ids"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_a_run_on_many_devices_decides_and_computes_what_one_on_a_single_device_does(kind, policy):
    events, expected = run_alone(policy)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        freezer, params, held = run(policy(), mesh)
    assert freezer.events == events
    assert freezer.events
    assert not freezer.frozen.names.issuperset(NAMES)
    for name, leaf in params.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert held
    for name, leaf in held.items():
        np.testing.assert_array_equal(params[name], leaf, err_msg=name)


def test_batch_norm_of_a_sharded_batch_has_the_statistics_of_the_whole_batch(mesh):
    model, optimizer = make(norm=True)
    kernel = np.float64(model.layers[0].kernel[...])
    replicate(model, mesh)
    replicate(optimizer, mesh)
    train_step(model, optimizer, *batch(mesh))
    hidden = np.float64(X) @ kernel
    np.testing.assert_allclose(model.norms[0].mean[...], 0.01 * hidden.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(model.norms[0].var[...], 0.99 + 0.01 * hidden.var(0), rtol=1e-5)


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


def aliases(text) -> int:
    """How many results take the place of an argument."""
    (table,) = re.findall(r"input_output_alias=\{(.*?)\}, entry", text)
    return len(re.findall(r"(?:may|must)-alias", table))


def peak_bytes(jitted, *args) -> int:
    return program_cost(jitted, *args).peak_bytes


@pytest.mark.parametrize("frozen", [NAMES[:2], NAMES[:3], (NAMES[1],)], ids=["half", "most", "middle"])
def test_donated_buffers_in_nnx(frozen):
    donating = nnx.jit(step, donate_argnums=(0, 1))
    model, optimizer = make()
    optimizer.freeze(model, list(frozen))
    before = arrays(model)
    expected_model, expected_optimizer = make()
    expected_optimizer.freeze(expected_model, list(frozen))
    leaves = len(jax.tree.leaves(nnx.state((model, optimizer))))
    assert aliases(compiled_text(donating, model, optimizer, X, Y)) == leaves
    saved = peak_bytes(train_step, model, optimizer, X, Y) - peak_bytes(donating, model, optimizer, X, Y)
    # Of active parameters XLA may hold the new beside the old for a while, for the backward pass needs the old.
    assert saved >= sum(leaf.nbytes for name, leaf in before.items() if name.startswith(frozen))
    for _ in range(3):
        donating(model, optimizer, X, Y)
        train_step(expected_model, expected_optimizer, X, Y)
    expected = arrays(expected_model)
    for name, leaf in arrays(model).items():
        assert np.array_equal(leaf, before[name]) == name.startswith(frozen), name
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-5, atol=1e-7, err_msg=name)
    optimizer.freeze(model, Frozen(optimizer.frozen.layers))
    donating(model, optimizer, X, Y)


def test_donated_buffers_of_a_bare_pytree():
    params = {name: {"kernel": jnp.ones((n, m))} for name, n, m in zip(NAMES, WIDTHS[:-1], WIDTHS[1:], strict=True)}

    def apply_fn(params, x):
        for name in NAMES:
            x = jnp.tanh(x @ params[name]["kernel"])
        return x

    layers = sfj.find_layers(params, apply_fn, X)
    state = sfj.linen.TrainState.create(apply_fn=apply_fn, params=params, tx=ADAMW, layers=layers).freeze(NAMES[:2])

    def step(state, x, y):
        loss, grads = state.value_and_grad(lambda params: jnp.square(apply_fn(params, x) - y).mean())(state.params)
        return state.apply_gradients(grads=grads), loss

    donating = jax.jit(step, donate_argnames="state")
    before = jax.tree.map(np.array, state.params)
    assert aliases(compiled_text(donating, state, X, Y)) == len(jax.tree.leaves(state))
    saved = peak_bytes(jax.jit(step), state, X, Y) - peak_bytes(donating, state, X, Y)
    assert saved >= sum(state.params[name]["kernel"].nbytes for name in NAMES[:2])
    pointers = {name: state.params[name]["kernel"].unsafe_buffer_pointer() for name in NAMES[:2]}
    for _ in range(3):
        old = state
        state, _ = donating(state, X, Y)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    for name in NAMES:
        kernel = state.params[name]["kernel"]
        assert np.array_equal(kernel, before[name]["kernel"]) == (name in NAMES[:2])
        assert name not in pointers or kernel.unsafe_buffer_pointer() == pointers[name]
