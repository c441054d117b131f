"""Was saved what was predicted? Every mistake is made for real, in a small step, and told by its cause."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import smartfrz_jax as sfj
from models.deit import DeiT
from models.resnet import BasicBlock, ResNet
from smartfrz_jax.cost.check import Measured, SavingCheck, SavingWarning, check_saving, jaxpr_of

pytestmark = [pytest.mark.usefixtures("jax_defaults"), pytest.mark.slow]

WIDTHS = dict(zip("abcd", [(24, 32), (32, 32), (32, 40), (40, 10)], strict=True))
PARAMS = {name: {"kernel": jnp.ones(sizes) / sizes[0], "bias": jnp.zeros(sizes[1])} for name, sizes in WIDTHS.items()}
X, Y = jnp.ones((64, 24)), jnp.zeros(64, jnp.int32)
ADAM = optax.adam(1e-3)
QUICKLY = {"xla_backend_optimization_level": "0"}


def loss_fn(params, x, y):
    for name in "abc":
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"][None])
    logits = x @ params["d"]["kernel"] + params["d"]["bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


LAYERS = sfj.find_layers(PARAMS, loss_fn, X, Y)


@functools.cache
def account(tx=ADAM):
    return sfj.account(PARAMS, LAYERS, loss_fn, X, Y, tx=tx)


def frozen_set(names):
    return sfj.Frozen(LAYERS, frozenset(names))


def measured(frozen, step, *args):
    """The compiled step, its jaxpr beside it."""
    jitted = jax.jit(step, compiler_options=QUICKLY)
    return Measured(frozen, sfj.program_cost(jitted, *args), jaxpr_of(jitted.trace(*args)))


def trained(frozen, grads_of=None, tx=None, log=None, returned=None):
    """A step of the bare pytree with its gradients, its optimizer and its further results as they are given."""
    grads_of = grads_of or sfj.value_and_grad(loss_fn, frozen)
    tx = tx or sfj.freeze(ADAM, frozen)

    def step(params, opt_state, x, y, *args):
        loss, grads = grads_of(params, x, y, *args)
        if returned:
            return loss, returned(grads)
        updates, new_state = tx.update(grads, opt_state, params)
        return sfj.apply_updates(params, updates, frozen), new_state, loss, log(grads) if log else None

    return step, jax.eval_shape(tx.init, PARAMS)


def program(names, make=trained, extra=(), **kwargs):
    frozen = frozen_set(names)
    step, opt_state = make(frozen, **kwargs)
    return measured(frozen, step, PARAMS, opt_state, X, Y, *extra)


every_grad = jax.value_and_grad(loss_fn)


def whole_tree(_, tx, grads_of=every_grad):
    """The usual loop, without a frozen set."""

    def step(params, opt_state, x, y, *args):
        loss, grads = grads_of(params, x, y, *args)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return step, jax.eval_shape(tx.init, PARAMS)


# For programs that several tests compare.
shared_program = functools.cache(program)


def unfrozen():
    return shared_program("")


@pytest.mark.parametrize("names", ["a", "ab", "abc", "abcd", "c", "ac"])
def test_the_right_way_is_not_reported(names):
    assert check_saving(account(), unfrozen(), shared_program(names), notable=0.5) is None


def check(after):
    """What is found, and that the message says what was predicted and measured."""
    finding = check_saving(account(), unfrozen(), after, notable=0.5)
    assert finding is not None
    assert finding.layers == tuple(sorted(after.frozen.names))
    for word in ("Predicted: ", "measured: ", "Cause: ", "Cure: "):
        assert word in finding.message
    return finding


def more_work(frozen):
    """A step that does as much again beside the account's."""
    step, opt_state = trained(frozen)

    def doing_more(params, opt_state, x, y):
        return step(params, opt_state, x, y), jnp.sin(x) @ jnp.ones((24, 1000)) @ jnp.ones((1000, 1))

    return doing_more, opt_state


def test_work_that_the_account_does_not_know_is_left_out():
    before, after = (program(names, make=more_work) for names in ("", "ab"))
    assert after.cost.flops > 2 * unfrozen().cost.flops
    assert check_saving(account(), before, after, notable=0.5) is None


def test_an_account_of_another_batch():
    costs = sfj.account(PARAMS, LAYERS, loss_fn, jnp.ones((256, 24)), jnp.zeros(256, jnp.int32), tx=ADAM)
    assert check_saving(costs, unfrozen(), shared_program("ab"), notable=0.5) is None
    assert (
        check_saving(costs, unfrozen(), shared_program("ab", grads_of=every_grad, log=optax.tree.norm)).cause == "norm"
    )


# Norms and clips.


def test_a_norm_of_all_gradients():
    finding = check(shared_program("ab", grads_of=every_grad, log=optax.tree.norm))
    assert finding.cause == "norm"
    assert "logged" in finding.message
    assert check_saving(account(), unfrozen(), program("ab", log=optax.tree.norm)) is None


def test_norms_of_each_layer():
    def norms(grads):
        return {name: jnp.abs(leaf["kernel"]).sum() for name, leaf in grads.items()}

    assert check(program("ab", grads_of=every_grad, log=norms)).cause == "norm"
    assert check_saving(account(), unfrozen(), program("ab", log=norms)) is None


@pytest.mark.parametrize(
    "outside",
    [
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
        lambda tx: optax.apply_if_finite(tx, 5),
    ],
    ids=["clip", "finite"],
)
def test_a_clip_before_the_partition(outside):
    frozen = frozen_set("ab")
    finding = check(program("ab", grads_of=every_grad, tx=outside(sfj.freeze(ADAM, frozen))))
    assert finding.cause == "norm"
    assert "clip" in finding.message
    inside = program("ab", tx=sfj.freeze(outside(ADAM), frozen))
    assert check_saving(account(), unfrozen(), inside) is None


def test_gradients_that_nothing_reads_are_not_reported():
    """``multi_transform`` alone saves, by dead-code elimination."""
    assert check_saving(account(), unfrozen(), program("ab", grads_of=every_grad)) is None


# Masks.

BOOLS = {name: name in "ab" for name in "abcd"}


def masked_by_bools(params, x, y, mask):
    loss, grads = every_grad(params, x, y)
    return loss, {n: jax.tree.map(lambda g, n=n: jnp.where(mask[n], 0, g), grads[n]) for n in grads}


def masked_by_numbers(params, x, y, mask):
    loss, grads = every_grad(params, x, y)
    return loss, {n: jax.tree.map(lambda g, n=n: g * mask[n], grads[n]) for n in grads}


def masked_by_vector(params, x, y, mask):
    loss, grads = every_grad(params, x, y)
    return loss, {n: jax.tree.map(lambda g, i=i: g * mask[i], grads[n]) for i, n in enumerate(grads)}


def masked_by_stage(params, x, y, stage):
    loss, grads = every_grad(params, x, y)
    return loss, {n: jax.tree.map(lambda g, i=i: jnp.where(i < stage, 0, g), grads[n]) for i, n in enumerate(grads)}


def masked_before(params, x, y, mask):
    def loss(params):
        stopped = {
            n: jax.tree.map(lambda p, n=n: jnp.where(mask[n], jax.lax.stop_gradient(p), p), params[n]) for n in params
        }
        return loss_fn(stopped, x, y)

    return jax.value_and_grad(loss)(params)


def masked_by_cond(params, x, y, mask):
    loss, grads = every_grad(params, x, y)
    return loss, {
        n: jax.lax.cond(mask[n], lambda g: jax.tree.map(jnp.zeros_like, g), lambda g: g, grads[n]) for n in grads
    }


@pytest.mark.parametrize("tx", [optax.sgd(0.1), ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize(
    ("grads_of", "mask"),
    [
        (masked_by_bools, BOOLS),
        (masked_by_vector, jnp.array([0.0, 0.0, 1.0, 1.0])),
        (masked_by_stage, 2),
        (masked_before, BOOLS),
        (masked_by_cond, BOOLS),
        (masked_by_numbers, {name: float(name not in "ab") for name in "abcd"}),
    ],
)
def test_a_mask_that_is_known_only_when_the_step_runs(grads_of, mask, tx):
    finding = check(program("ab", make=whole_tree, tx=tx, grads_of=grads_of, extra=(mask,)))
    assert finding.cause == "mask"
    assert "static" in finding.message


def test_a_mask_of_whole_arrays():
    def grads_of(params, x, y, mask):
        loss, grads = every_grad(params, x, y)
        return loss, jax.tree.map(jnp.multiply, grads, mask)

    mask = jax.tree.map(jnp.ones_like, PARAMS)
    assert check(program("ab", make=whole_tree, tx=ADAM, grads_of=grads_of, extra=(mask,))).cause == "mask"


def test_gradients_times_zero():
    partition = optax.multi_transform({"train": ADAM, "frozen": optax.scale(0.0)}, frozen_set("ab").labels)
    assert check(program("ab", make=whole_tree, tx=partition)).cause == "mask"


# Gradients and update apart.


def test_gradients_jitted_apart():
    after = program("ab", grads_of=every_grad, returned=lambda grads: grads)
    finding = check(after)
    assert finding.cause == "apart"
    assert "returns the gradients" in finding.message
    right = program("ab", returned=frozen_set("ab").active_leaves)
    assert check_saving(account(), unfrozen(), right) is None


def test_the_update_jitted_apart():
    def update(frozen):
        tx = sfj.freeze(ADAM, frozen)
        state = jax.eval_shape(tx.init, PARAMS)
        return lambda grads, state, x, y: tx.update(grads, state), state

    before, after = (program(names, make=update) for names in ("", "ab"))
    finding = check_saving(account(), before, after)
    assert finding.cause == "apart"
    assert "Predicted: " in finding.message
    assert "the update alone" in finding.message


# The optimizer.


def test_an_optimizer_that_reads_frozen_gradients():
    mask = {name: name in "ab" for name in "abcd"}
    finding = check(program("ab", make=whole_tree, tx=optax.chain(ADAM, optax.freeze(mask))))
    assert finding.cause == "optimizer"
    assert "smartfrz_jax.freeze(tx, frozen)" in finding.message


@pytest.mark.parametrize(
    "tx",
    [
        optax.inject_hyperparams(optax.adamw)(1e-3),
        optax.sgd(optax.cosine_decay_schedule(0.1, 100), momentum=0.9),
        optax.MultiSteps(ADAM, 2),
        optax.adafactor(1e-3),
    ],
    ids=["inject_hyperparams", "schedule", "MultiSteps", "adafactor"],
)
def test_rates_and_counters_are_not_taken_for_masks(tx):
    """What freezes here is nothing at all."""
    assert check(program("ab", make=whole_tree, tx=tx)).cause == "optimizer"


def test_optimizer_state_of_frozen_layers():
    finding = check(program("ab", tx=ADAM))
    assert finding.cause == "optimizer"
    assert f"Predicted: {4 * 2 * (24 * 32 + 32 + 32 * 32 + 32):,} bytes less" in finding.message
    assert "measured: 0 bytes" in finding.message


# Scanned stacks.

DEPTH = 4
STACK = {f"block{i}": jnp.eye(32) for i in range(DEPTH)}


def scanned(params, x, groups=((0, 4),)):
    for start, end in groups:
        stacked = jnp.stack([params[f"block{i}"] for i in range(start, end)])
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stacked)
    return jnp.square(x).mean()


def scanned_program(layers, n, groups=((0, 4),), tx=ADAM):
    frozen = sfj.Frozen(layers, frozenset(layers.names[:n]))
    partition = sfj.freeze(tx, frozen)

    def step(params, opt_state, x):
        loss, grads = sfj.value_and_grad(functools.partial(scanned, groups=groups), frozen)(params, x)
        updates, opt_state = partition.update(grads, opt_state, params)
        return sfj.apply_updates(params, updates, frozen), opt_state, loss

    return measured(frozen, step, STACK, jax.eval_shape(partition.init, STACK), X32)


X32 = jnp.ones((64, 32))


def test_a_scan_over_frozen_and_active_blocks():
    layers = sfj.find_layers(STACK, scanned, X32)
    costs = sfj.account(STACK, layers, scanned, X32, tx=ADAM)
    before = scanned_program(layers, 0)
    finding = check_saving(costs, before, scanned_program(layers, 2))
    assert finding.cause == "scan"
    assert finding.layers == ("block0", "block1")
    assert check_saving(costs, before, scanned_program(layers, 2, groups=((0, 2), (2, 4)))) is None
    assert check_saving(costs, before, scanned_program(layers, 4)) is None
    assert check_saving(costs, before._replace(jaxpr=None), scanned_program(layers, 2)) is None, "cannot be compared"


# Layers behind active ones.


def test_frozen_layers_behind_active_ones():
    finding = check_saving(account(), unfrozen(), shared_program("bc"), notable=0.1)
    assert finding.cause == "behind"
    assert finding.layers == ("b", "c")
    assert "'a' before them train" in finding.message
    costs = account()
    saved, added = costs.saving(frozen_set("abc"), frozen_set("bc")), -costs.saving(frozen_set(""), frozen_set("bc"))
    assert f"{saved:.1%} cheaper" in finding.message
    assert f"{added:.1%} more expensive" in finding.message
    assert check_saving(account(), unfrozen(), shared_program("bc"), notable=0.5) is None
    assert check_saving(account(), unfrozen(), shared_program("ab"), notable=0.01) is None


# No cause.


def test_a_cause_that_is_not_known():
    def largest(grads):
        return jax.lax.top_k(jnp.concatenate([leaf["kernel"].ravel() for leaf in grads.values()]), 5)

    finding = check(program("ab", grads_of=every_grad, log=largest))
    assert finding.cause == "unknown"
    assert "could not be told" in finding.message


def test_without_a_jaxpr():
    after = shared_program("ab", grads_of=every_grad, log=optax.tree.norm)._replace(jaxpr=None)
    finding = check(after)
    assert finding.cause == "unknown"
    assert "pass the jaxpr" in finding.message


def test_without_a_jaxpr_what_the_account_may_be_off_by_is_not_reported():
    after = shared_program("d", grads_of=every_grad, log=optax.tree.norm)
    assert 0.01 < account().saving(frozen_set("d")) < 0.05
    assert check(after).cause == "norm"
    assert check_saving(account(), unfrozen(), after._replace(jaxpr=None), notable=0.5) is None


def test_nothing_is_asked_of_layers_that_return():
    assert check_saving(account(), shared_program("ab"), shared_program("a")) is None


def test_a_frozen_set_of_another_network():
    other = sfj.Frozen(sfj.find_layers(STACK, scanned, X32))
    with pytest.raises(ValueError, match="frozen: got a frozen set of a network of 4 layers"):
        check_saving(account(), unfrozen()._replace(frozen=other), unfrozen())


# Warnings.


def test_each_cause_is_warned_of_once():
    check_next = SavingCheck(account(), notable=0.1)
    assert check_next(unfrozen()) is None
    wrong = program("a", grads_of=every_grad, log=optax.tree.norm)
    with pytest.warns(SavingWarning, match="Cure") as caught:
        assert check_next(wrong).cause == "norm"
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_next(shared_program("ab", grads_of=every_grad, log=optax.tree.norm)).cause == "norm"
        assert check_next(shared_program("a")) is None
    with pytest.warns(SavingWarning, match="'b', 'c' save less than they could"):
        check_next(shared_program("bc"))
    assert [finding.cause for finding in check_next.findings] == ["norm", "behind"]


# Several devices.


def sharded_program(names, **kwargs):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    replicated, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    frozen = frozen_set(names)
    step, opt_state = trained(frozen, **kwargs)

    def placed(tree, sharding):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    return measured(frozen, step, placed(PARAMS, replicated), placed(opt_state, replicated), *placed((X, Y), split))


def test_sums_over_devices_fall_by_the_frozen_parameters():
    before, after = sharded_program(""), sharded_program("ab")
    every, some = (sum(4 * (n * m + m) for n, m in map(WIDTHS.get, names)) for names in ("abcd", "ab"))
    assert before.cost.devices == after.cost.devices == 8
    assert 0 <= before.cost.collectives.reduced_bytes - every < 64  # the loss
    assert before.cost.collectives.reduced_bytes - after.cost.collectives.reduced_bytes == some
    assert check_saving(account(), before, after) is None


def test_sums_over_devices_that_stay():
    before, after = sharded_program(""), sharded_program("ab", grads_of=every_grad, log=optax.tree.norm)
    assert before.cost.collectives.reduced_bytes == after.cost.collectives.reduced_bytes
    finding = check_saving(account(), before, after)
    assert finding.cause == "norm"
    assert f"Predicted: {4 * (24 * 32 + 32 + 32 * 32 + 32):,} bytes less in sums over the 8 devices" in finding.message


# NNX.


def small_resnet(rngs, stages=2, **kwargs):
    return ResNet((1,) * stages, (8, 16)[:stages], BasicBlock, num_classes=10, stem="cifar", rngs=rngs, **kwargs)


def small_vit(rngs, **kwargs):
    sizes = {"image_size": 16, "patch_size": 4, "dim": 16, "depth": 2, "heads": 2, "num_classes": 10}
    return DeiT(**{**sizes, "dropout": 0.1, "drop_path": 0.1, "rngs": rngs, **kwargs})


def model_loss(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x).astype(jnp.float32), y).mean()


IMAGES = jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32)


def nnx_program(model, layers, names, tx, stock=False):
    graphdef, state = nnx.split(model)
    frozen = sfj.Frozen(layers, frozenset(names))

    def make(state):
        model = nnx.merge(graphdef, state)
        optimizer = sfj.nnx.Optimizer(model, tx, wrt=nnx.Param, layers=layers)
        optimizer.freeze(model, frozen)
        return optimizer

    optimizer_def, optimizer_state = nnx.split(nnx.eval_shape(make, state))

    def step(state, optimizer_state, x, y):
        model, optimizer = nnx.merge(graphdef, state), nnx.merge(optimizer_def, optimizer_state)
        value_and_grad = nnx.value_and_grad if stock else optimizer.value_and_grad
        loss, grads = value_and_grad(model_loss)(model, x, y)
        optimizer.update(model, grads)
        return loss, optax.tree.norm(nnx.as_pure(grads)), nnx.state(model), nnx.state(optimizer)

    return measured(frozen, step, state, optimizer_state, *IMAGES)


CLIPPED = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
SGD = optax.sgd(0.1, momentum=0.9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "tx", "parts"),
    [
        (small_resnet, SGD, ("first", "middle", "all but the head")),
        (functools.partial(small_resnet, stages=1, dtype=jnp.bfloat16), CLIPPED, ("half", "middle")),
        (small_vit, CLIPPED, ("half", "middle", "all")),
        (functools.partial(small_vit, depth=3, dropout=0.0, scan=True), optax.MultiSteps(SGD, 4), ("half", "middle")),
    ],
    ids=["resnet", "resnet-bfloat16", "vit", "vit-scan-accumulated"],
)
def test_networks_are_not_reported(make, tx, parts):
    model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    layers = sfj.nnx.find_layers(model, IMAGES[0])
    costs = sfj.nnx.account(model, layers, model_loss, *IMAGES, tx=tx)
    names, third = layers.names, len(layers) // 3
    sets = {"first": names[:1], "half": names[: len(names) // 2], "middle": names[third : 2 * third]}
    sets |= {"all but the head": names[:-1], "all": names}
    before = nnx_program(model, layers, (), tx)
    for part in parts:
        assert check_saving(costs, before, nnx_program(model, layers, sets[part], tx), notable=0.5) is None, part


@pytest.mark.slow
def test_the_stock_gradients_of_nnx():
    model = nnx.eval_shape(lambda: small_vit(dropout=0.0, drop_path=0.0, rngs=nnx.Rngs(0)))
    layers = sfj.nnx.find_layers(model, IMAGES[0])
    costs = sfj.nnx.account(model, layers, model_loss, *IMAGES, tx=SGD)
    half = layers.names[: len(layers) // 2]
    before = nnx_program(model, layers, (), SGD)
    finding = check_saving(costs, before, nnx_program(model, layers, half, SGD, stock=True))
    assert finding.cause == "norm"
    assert finding.layers == half
