"""Freezing of NNX modules: layers, exact steps, features, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj
from tests.nnx.network import TX, Net, X, Y, arrays, loss_fn, make, train_step

pytestmark = pytest.mark.usefixtures("jax_defaults")
NAMES = ("stem", "blocks/0/b_first", "blocks/0/a_second", "blocks/1/b_first", "blocks/1/a_second", "head")


def belongs(layers, frozen):
    return {name for layer in layers if layer.name in frozen for name in (*layer.params, *layer.state)}


@pytest.mark.slow
def test_layers_are_in_forward_order_and_hold_their_statistics_and_streams():
    model, optimizer = make()
    layers = optimizer.frozen.layers
    assert layers.names == NAMES
    second = layers[2]
    assert set(second.params) == {"blocks/0/a_second/kernel", "blocks/0/norm/scale", "blocks/0/norm/bias"}
    assert {"blocks/0/norm/mean", "blocks/0/norm/var"} < set(second.state)
    assert any(name.startswith("blocks/0/dropout") for name in second.state)
    assert set(layers[1].state) == {"blocks/0/plain_norm/mean", "blocks/0/plain_norm/var"}
    every = [name for layer in layers for name in (*layer.params, *layer.state)]
    assert sorted(every) == sorted(arrays(model))


def test_layers_of_an_abstract_model():
    model = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    assert sfj.nnx.find_layers(model, jax.ShapeDtypeStruct(X.shape, X.dtype)).names == NAMES


def test_layers_need_a_batch():
    with pytest.raises(ValueError, match="example batch"):
        sfj.nnx.find_layers(Net(nnx.Rngs(0)))


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [NAMES[:1], NAMES[:3], ("blocks/0/a_second", "blocks/1/b_first"), NAMES[:-1], NAMES])
def test_frozen_variables_do_not_change_in_a_single_bit_and_others_do(frozen):
    model, optimizer = make()
    for _ in range(2):
        train_step(model, optimizer, X, Y)
    optimizer.freeze(model, list(frozen))
    before = arrays(model)
    for _ in range(3):
        train_step(model, optimizer, X, Y)
    after = arrays(model)
    held = belongs(optimizer.frozen.layers, frozen)
    for name, leaf in before.items():
        if "dropout" in name and name.endswith("key"):
            continue  # a stream's key never changes, only its count does
        assert np.array_equal(leaf, after[name]) == (name in held), name


@pytest.mark.slow
def test_active_layers_follow_a_hand_written_step_exactly():
    """The reference holds the frozen leaves and their modes by hand, with a plain optax loop over the active ones."""
    model, optimizer = make(optax.sgd(0.1, momentum=0.9))
    reference = nnx.clone(model)
    frozen = NAMES[:3]
    optimizer.freeze(model, list(frozen))
    names = belongs(optimizer.frozen.layers, frozen)
    for path, module in nnx.iter_modules(reference):
        if any(name.startswith("/".join(map(str, path)) + "/") for name in names) and path[:1] != ("blocks",):
            module.set_attributes(use_running_average=True, raise_if_not_found=False)
    for module in (reference.blocks[0].norm, reference.blocks[0].plain_norm):
        module.use_running_average = True
    reference.blocks[0].dropout.deterministic = True

    def active(path, value):
        return isinstance(value, nnx.Param) and "/".join(map(str, path)) not in names

    reference_tx = optax.sgd(0.1, momentum=0.9)
    reference_optimizer = nnx.Optimizer(reference, reference_tx, wrt=active)

    @nnx.jit
    def reference_step(model, optimizer, x, y):
        grads, _ = nnx.grad(loss_fn, argnums=nnx.DiffState(0, active), has_aux=True)(model, x, y)
        optimizer.update(model, grads)

    for _ in range(4):
        train_step(model, optimizer, X, Y)
        reference_step(reference, reference_optimizer, X, Y)
    expected = arrays(reference)
    for name, leaf in arrays(model).items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_one_program_per_frozen_set_and_cost_falls():
    model = Net(nnx.Rngs(0), width=16)
    optimizer = sfj.nnx.Optimizer(model, TX, layers=sfj.nnx.find_layers(model, X))
    counted = []

    def step(model, optimizer, x, y):
        counted.append(optimizer.frozen.names)
        (loss, _), grads = optimizer.value_and_grad(loss_fn, has_aux=True)(model, x, y)
        optimizer.update(model, grads)
        return loss, optax.tree.norm(grads)  # a norm over all gradients, which must not bring their cost back

    programs = sfj.TrainStep(step)
    x = jnp.tile(X, (4, 4, 4, 1))
    for frozen in (NAMES[:1], NAMES[:3], NAMES[:1], (), NAMES[:3]):
        optimizer.freeze(model, sfj.Frozen(optimizer.frozen.layers, frozenset(frozen)))
        for _ in range(2):
            programs(model, optimizer, x, jnp.tile(Y, (4, 1)))
    assert len(counted) == len(programs.programs) == 3
    flops = {len(program.frozen.names): program.cost.flops for program in programs.programs}
    memory = {len(program.frozen.names): program.cost.temp_bytes for program in programs.programs}
    assert flops[3] < flops[1] < flops[0]
    assert memory[3] < memory[1] < memory[0]
    # Convolutions, as multiples of a pixel's 9 multiply-adds: the stem 16, the four of the blocks 256 each. Forward,
    # two weight gradients in the live block, and one activation gradient between them; against everything.
    forward = 16 + 4 * 256
    assert flops[3] / flops[0] == pytest.approx((forward + 3 * 256) / (3 * forward - 16), rel=0.05)


@pytest.mark.slow
def test_a_norm_over_all_gradients_is_over_the_active_ones():
    model, optimizer = make()
    optimizer.freeze(model, list(NAMES[:-1]))
    _, norm = train_step(model, optimizer, X, Y)
    head = nnx.grad(lambda m: loss_fn(m, X, Y)[0], argnums=nnx.DiffState(0, nnx.PathContains("head")))
    graphdef, state = nnx.split(make()[0])
    assert norm > 0
    assert set(arrays(model)) == set(arrays(nnx.merge(graphdef, state)))
    held = nnx.view(make()[0], use_running_average=True, deterministic=True)
    assert norm == pytest.approx(float(optax.tree.norm(head(held))), rel=1e-5)


@pytest.mark.slow
def test_the_model_is_left_in_its_own_mode():
    model, optimizer = make()
    optimizer.freeze(model, list(NAMES[:3]))
    train_step(model, optimizer, X, Y)
    assert model.stem_norm.use_running_average is False
    assert model.blocks[0].dropout.deterministic is False
    assert model.blocks[0].dropout.rate == 0.5


@pytest.mark.slow
def test_a_batch_norm_that_is_told_to_train_in_its_call_is_refused():
    class Stubborn(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(2, 2, rngs=rngs)
            self.norm = nnx.BatchNorm(2, rngs=rngs)
            self.head = nnx.Linear(2, 1, rngs=rngs)

        def __call__(self, x):
            return self.head(self.norm(self.linear(x), use_running_average=False))

    model, x = Stubborn(nnx.Rngs(0)), jnp.ones((4, 2))
    optimizer = sfj.nnx.Optimizer(model, optax.sgd(0.1), layers=sfj.nnx.find_layers(model, x))
    optimizer.freeze(model, ["linear"])
    with pytest.raises(ValueError, match=r"norm/.*use_running_average=False.*model.train\(\)"):
        optimizer.value_and_grad(lambda model: model(x).sum())(model)


@pytest.mark.slow
def test_attention_dropout_is_off_when_all_of_it_is_frozen():
    class Attend(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(2, 4, dropout_rate=0.5, decode=False, rngs=rngs)
            self.head = nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, x):
            return self.head(self.attention(x))

    model, x = Attend(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (2, 5, 4))
    model.train()
    optimizer = sfj.nnx.Optimizer(model, optax.sgd(0.0), layers=sfj.nnx.find_layers(model, x))

    def losses():
        value_and_grad = optimizer.value_and_grad(lambda model: model(x).sum())
        return {float(value_and_grad(model)[0]) for _ in range(3)}

    assert len(losses()) == 3
    optimizer.freeze(model, list(optimizer.frozen.layers.names[:3]))
    assert len(losses()) == 3  # one of its layers still trains
    optimizer.freeze(model, [name for name in optimizer.frozen.layers.names if name != "head"])
    assert len(losses()) == 1


@pytest.mark.slow
def test_features_are_the_outputs_of_the_layers_in_evaluation_mode():
    model, optimizer = make()
    train_step(model, optimizer, X, Y)
    found = sfj.nnx.features(model, optimizer.frozen.layers, X)(model, X)
    held = nnx.view(model, use_running_average=True, deterministic=True)
    assert tuple(found) == NAMES
    stem = held.stem_norm(held.stem(X))
    np.testing.assert_allclose(found["stem"], stem, rtol=1e-5, atol=1e-6)
    block = held.blocks[0]
    first = block.b_first(nnx.relu(stem))  # the normalisation without parameters behind it is not part of the output
    np.testing.assert_allclose(found["blocks/0/b_first"], first, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["head"], held(X), rtol=1e-5, atol=1e-5)
    assert model.stem_norm.use_running_average is False


def test_features_of_variables_that_are_no_params():
    class Weight(nnx.Variable):
        pass

    class Linear(nnx.Module):
        def __init__(self, scale):
            self.kernel = Weight(scale * jnp.eye(2))

        def __call__(self, x):
            return x @ self.kernel[...]

    model, x = nnx.Sequential(Linear(2.0), Linear(3.0)), jnp.ones((4, 2))
    layers = sfj.nnx.find_layers(model, x, wrt=Weight)
    outputs = sfj.nnx.features(model, layers, x, wrt=Weight)(model, x)
    assert {name: float(out[0, 0]) for name, out in outputs.items()} == {"layers/0": 2.0, "layers/1": 6.0}
    with pytest.raises(ValueError, match=r"wrt: got .*Param.*leaves out 'layers/0/kernel'.*the same wrt"):
        sfj.nnx.features(model, layers, x)


@pytest.mark.slow
def test_with_stock_gradients_weights_hold_still_but_nothing_else():
    """As the docstring of the optimizer warns."""
    model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    optimizer = sfj.nnx.Optimizer(model, optax.sgd(0.1), layers=sfj.nnx.find_layers(model, x))
    optimizer.freeze(model, ["layers/0"])
    for value_and_grad, moves in ((optimizer.value_and_grad, ()), (nnx.value_and_grad, ("mean", "var"))):
        before = arrays(model)
        _, grads = value_and_grad(lambda model: (model(x) * x).sum())(model)
        optimizer.update(model, grads)
        for name, leaf in before.items():
            assert np.array_equal(arrays(model)[name], leaf) == (not name.endswith(moves or "nothing")), name


@pytest.mark.slow
def test_policies_that_look_at_gradients_and_features_run():
    model, optimizer = make()
    freezer = sfj.nnx.Freezer(model, optimizer, sfj.autofreeze(evaluate_every=3, percentile=80))
    for _ in range(20):
        train_step(model, optimizer, X, Y)
        freezer.step()
    assert freezer.events
    assert optimizer.frozen.names == set(NAMES[: len(optimizer.frozen.names)])
    assert set(optimizer.grads) == set(optimizer.frozen.active_leaves(nnx.as_pure(nnx.state(model, nnx.Param))))

    model, optimizer = make()
    extract = sfj.nnx.features(model, optimizer.frozen.layers, X)
    policy = sfj.policies.similarity_guided(extract(model, X), evaluate_every=2, window=2, tolerance=0.9)
    freezer = sfj.nnx.Freezer(model, optimizer, policy, features=lambda model: extract(model, X))
    for _ in range(4):
        train_step(model, optimizer, X, Y)
        freezer.step()
    assert optimizer.frozen.names == set(NAMES[:-1])


def test_wrong_arguments_are_named():
    model, optimizer = make()
    with pytest.raises(TypeError, match=r"optimizer: got .*Optimizer.*expected a smartfrz_jax.nnx.Optimizer"):
        sfj.nnx.Freezer(model, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param), sfj.policies.never())
    with pytest.raises(TypeError, match=r"policy: got function"):
        sfj.nnx.Freezer(model, optimizer, sfj.policies.never)
    with pytest.raises(ValueError, match=r"blocks/0/b_frist.*blocks/0/b_first"):
        optimizer.freeze(model, ["blocks/0/b_frist"])
    policy = sfj.policies.similarity_guided(dict.fromkeys(NAMES, X), evaluate_every=1)
    with pytest.raises(ValueError, match="features: got none, but the policy looks at them, expected a function"):
        sfj.nnx.Freezer(model, optimizer, policy)


def test_a_freezer_in_a_compiled_step_is_refused():
    model, optimizer = make()
    freezer = sfj.nnx.Freezer(model, optimizer, sfj.policies.never())

    def step(model, optimizer):
        freezer.step()

    with pytest.raises(TypeError, match=r"freezer: is asked in a compiled function.*outside of nnx.jit"):
        nnx.jit(step)(model, optimizer)
    assert freezer.steps == 0
    freezer.step()


@pytest.mark.slow
def test_layers_frozen_by_hand_stay_frozen_under_a_policy(tmp_path):
    def start(by_hand):
        model, optimizer = make()
        optimizer.freeze(model, list(by_hand))
        return model, optimizer, sfj.nnx.Freezer(model, optimizer, sfj.static_prefix([(0.0, 0.4)], total_steps=1))

    model, optimizer, freezer = start(["blocks/1/b_first"])
    train_step(model, optimizer, X, Y)
    freezer.step()
    assert optimizer.frozen.names == {"stem", "blocks/0/b_first", "blocks/1/b_first"}
    assert freezer.events == [(1, ("stem", "blocks/0/b_first"), ())]
    freezer.save(tmp_path / "run")
    model, optimizer, freezer = start([])
    freezer.restore(tmp_path / "run")
    freezer.step()
    assert optimizer.frozen.names == {"stem", "blocks/0/b_first", "blocks/1/b_first"}


def test_a_loss_is_called_with_the_model():
    model, optimizer = make()
    for loss, args in [(lambda x: model(x).sum(), (X,)), (lambda x, model: model(x).sum(), (X, model))]:
        with pytest.raises(TypeError, match=r"loss_fn: argument 0: got float32\[8, 6, 6, 1\], expected an nnx.Module"):
            optimizer.value_and_grad(loss)(*args)
    optimizer.value_and_grad(lambda x, model: model(x).sum(), argnums=1)(X, model)


def test_gradients_may_be_given_by_name():
    results = []
    for by_name in (False, True):
        model, optimizer = make()
        grads = nnx.grad(lambda model: model(X).sum())(model)
        optimizer.update(model=model, grads=grads) if by_name else optimizer.update(model, grads)
        results.append(arrays(model))
    for name, leaf in results[0].items():
        np.testing.assert_array_equal(leaf, results[1][name], err_msg=name)


def test_the_model_of_a_partial_loss_may_be_given_by_name():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    x = jnp.ones((1, 2))
    optimizer = sfj.nnx.Optimizer(model, TX, layers=sfj.nnx.find_layers(model, x))

    def loss_of(model, x, scale):
        return scale * model(x).sum()

    expected, _ = optimizer.value_and_grad(loss_of)(model, x, 3.0)
    named = optimizer.value_and_grad(functools.partial(loss_of, scale=3.0))
    for value, _ in (named(model, x), named(model, x=x), named(x=x, model=model)):
        assert value == expected
    with pytest.raises(ValueError, match=r"loss_fn: was called with 0 arguments by position, expected the model"):
        optimizer.value_and_grad(lambda **given: given["model"](x).sum())(model=model)
