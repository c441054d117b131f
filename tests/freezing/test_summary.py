"""Summaries for people: what is frozen, since when, what that saves."""

import io

import jax
import jax.numpy as jnp
import optax
import pytest
from rich.console import Console

import smartfrz_jax as sfj
from tests.freezing.test_freezer import LAYERS, PARAMS, OfNnx, X, apply_fn, both, decided

pytestmark = pytest.mark.usefixtures("jax_defaults")

OTHERS = sfj.Layers((sfj.Layer("x", ("x",), ("x",)),))


def loss(params, x):
    return (apply_fn(params, x) ** 2).mean()


@pytest.fixture(scope="module")
def account():
    return sfj.account(PARAMS, LAYERS, loss, X, tx=optax.sgd(0.1, momentum=0.9))


def observed(freezer, steps):
    for _ in range(steps):
        freezer.observe(lambda: PARAMS)
    return freezer


def size(state, of=""):
    """Bytes of the leaves at whose path a text stands."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return sum(leaf.nbytes for path, leaf in leaves if of in jax.tree_util.keystr(path))


def columns(summary, *names):
    return [tuple(getattr(layer, name) for name in names) for layer in summary.layers]


def test_layer_by_layer(account):
    """Sizes are those of the state, shares those of the account; the moment is that of the last freezing."""
    policy = decided({2: ("b",), 4: (), 5: ("b",)})
    freezer = observed(sfj.Freezer(policy, LAYERS, PARAMS, frozen=sfj.Frozen(LAYERS, "a")), 6)
    summary = freezer.summary(tx=optax.adam(0.1), account=account)
    assert columns(summary, "name", "params", "optimizer_bytes", "since") == [
        ("a", 4, 0, 0),
        ("b", 4, 0, 5),
        ("c", 4, 32, None),
        ("", 0, 4, None),
    ]
    assert (summary.step, summary.params, summary.frozen_params) == (6, 12, 8)
    state = sfj.freeze(optax.adam(0.1), freezer.frozen).init(PARAMS)
    assert summary.optimizer_bytes == size(state)
    assert summary.optimizer_bytes_unfrozen == sum(
        leaf.nbytes for leaf in jax.tree.leaves(optax.adam(0.1).init(PARAMS))
    )
    assert summary.saved == pytest.approx(account.saving(freezer.frozen))
    whole = account.flops()
    for layer in summary.layers:
        assert layer.flops + layer.saved == pytest.approx(whole.by_layer[layer.name].total / whole.total)


@pytest.mark.parametrize(
    "tx",
    [
        optax.sgd(0.1),
        optax.adafactor(0.1, min_dim_size_to_factor=2),
        optax.MultiSteps(optax.adam(0.1), 2),
        optax.chain(optax.clip_by_global_norm(1.0), optax.inject_hyperparams(optax.adamw)(0.1)),
        optax.multi_transform({"x": optax.adam(0.1), "y": optax.lion(0.1)}, {"a": "x", "b": "y", "c": "y"}),
    ],
    ids=["sgd", "adafactor", "accumulated", "chained", "several"],
)
def test_no_byte_of_an_optimizer_is_lost(tx):
    frozen = sfj.Frozen(LAYERS, ["a"])
    summary = sfj.Freezer(decided(), LAYERS, PARAMS, frozen=frozen).summary(tx=tx)
    state = sfj.freeze(tx, frozen).init(PARAMS)
    assert summary.optimizer_bytes == size(state)
    assert summary.layers[0].optimizer_bytes == 0
    assert summary.layers[1].optimizer_bytes == size(state, "['b']")


def test_without_optimizer_and_account_their_columns_are_left_out():
    freezer = observed(sfj.Freezer(decided({1: ("a",)}), LAYERS, PARAMS, lead=2), 2)
    summary = freezer.summary()
    assert (summary.optimizer_bytes, summary.saved) == (None, None)
    assert str(summary).splitlines() == [
        "Frozen after step 2: 0 of 3 layers, 0 of 12 parameters.",
        "Decided for step 3: 1 of 3 layers.",
        "",
        "layer  parameters  frozen since",
        "a               4",
        "b               4",
        "c               4",
        "all            12",
    ]


@both
def test_both_doors_know_the_optimizer(door):
    run = door(decided({2: ("b",)}), before=["a"])
    for _ in range(2):
        run.step()
    summary = run.freezer.summary()
    assert columns(summary, "name", "params", "optimizer_bytes", "since")[:2] == [("a", 4, 0, 0), ("b", 4, 0, 2)]
    assert (summary.step, summary.optimizer_bytes_unfrozen) == (2, 0)  # plain SGD


def test_both_doors_take_the_account_of_the_step(account):
    def step(state, x):
        value, grads = state.value_and_grad(loss)(state.params, x)
        return state.apply_gradients(grads=grads), value

    state = sfj.linen.TrainState.create(apply_fn=apply_fn, params=PARAMS, tx=optax.adam(0.1), layers=LAYERS)
    freezer = sfj.linen.Freezer(state.freeze("a"), decided(), train_step=sfj.TrainStep(step, account=account))
    assert freezer.summary().saved == pytest.approx(account.saving(sfj.Frozen(LAYERS, "a")))


def test_nnx_counts_what_was_just_frozen_by_hand():
    run = OfNnx(decided())
    run.freeze(["c"])
    assert run.freezer.summary().frozen_params == 4


def test_what_fp8_keeps_among_the_parameters_is_no_optimizer_state():
    params = {"params": {"a": jnp.ones((2, 2))}, "_overwrite_with_gradient": {"scale": jnp.ones(3)}}
    layers = sfj.Layers((sfj.Layer("a", ("params/a", "_overwrite_with_gradient/scale"), ("params/a",)),))
    summary = sfj.Freezer(decided(), layers, params).summary(tx=optax.sgd(0.1, momentum=0.9))
    assert (summary.params, summary.optimizer_bytes) == (7, 16)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tx": "adam"}, TypeError, "tx: got str 'adam', expected an optax"),
        ({"account": "none"}, TypeError, "account: got str 'none', expected a smartfrz_jax.Account"),
        ({"account": len}, TypeError, "account: got .*len, expected a smartfrz_jax.Account"),
    ],
)
def test_refuses_what_is_none(options, error, message):
    with pytest.raises(error, match=message):
        sfj.Freezer(decided(), LAYERS, PARAMS).summary(**options)


def test_refuses_the_account_of_another_network(account):
    with pytest.raises(ValueError, match="frozen: got a set of a network of 1 layers"):
        sfj.Freezer(decided(), OTHERS, {"x": jnp.ones((2, 2))}).summary(account=account)


def test_frozen_set_prints_as_a_table_and_shows_as_one_line():
    frozen = sfj.Frozen(LAYERS, ["a", "b"])
    assert str(frozen).splitlines() == [
        "Frozen: 2 of 3 layers.",
        "",
        "layer  arrays  frozen",
        "a           1     yes",
        "b           1     yes",
        "c           1",
    ]
    assert repr(frozen) == "<Frozen: 2 of 3 layers: 'a', 'b'>"
    many = sfj.Layers(tuple(sfj.Layer(f"{i}", (f"{i}/w",), (f"{i}/w",)) for i in range(9)))
    assert repr(sfj.Frozen(many, ...)) == "<Frozen: 9 of 9 layers: '0', '1', '2', ...>"
    assert repr(sfj.Frozen(many)) == "<Frozen: 0 of 9 layers>"


def test_rich_prints_tables():
    freezer = sfj.Freezer(decided(), LAYERS, PARAMS, frozen=sfj.Frozen(LAYERS, "a"))
    console = Console(file=io.StringIO(), width=80)
    console.print(freezer.frozen)
    console.print(freezer.summary(tx=optax.adam(0.1)))
    shown = console.file.getvalue()
    assert "┃" in shown
    assert "the start" in shown
    assert "Frozen: 1 of 3 layers." in shown
    assert isinstance(freezer.frozen, sfj.Frozen)


def test_policies_are_told_what_freezing_saves(account):
    told = []

    def update(state, layers, *, saving, **signals):
        told.append(saving)
        return frozenset(), state

    policy = sfj.Policy(lambda layers, params: (), update)
    observed(sfj.Freezer(policy, LAYERS, PARAMS, saving=account.saving), 1)
    observed(sfj.Freezer(policy, LAYERS, PARAMS), 1)
    a, ab = (sfj.Frozen(LAYERS, frozenset(names)) for names in ("a", "ab"))
    assert told[0](ab.names, a.names) == account.saving(ab, a) > 0
    assert told[1] is None
