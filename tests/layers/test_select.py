"""Selectors: which layers are meant, at every door that takes some."""

import operator
import re

import optax
import pytest
from flax import linen as nn
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax.layers.select import as_selectors, described, select
from tests.bad_input import scenes

NAMES = ("stem", "encoder/0", "encoder/1", "encoder/10/conv", "decoder", "odd[ab]", "odda", "head")


def layer(name):
    return sfj.Layer(name, (f"{name}/kernel", f"{name}/norm/scale"), (f"{name}/kernel",))


LAYERS = sfj.Layers(tuple(map(layer, NAMES)))
ENCODER = ("encoder/0", "encoder/1", "encoder/10/conv")


class Network(nnx.Module):
    def __init__(self):
        self.encoder = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(i)) for i in range(2)])
        self.head = nnx.Linear(2, 2, rngs=nnx.Rngs(2))

    def __call__(self, x):
        for layer in self.encoder:
            x = layer(x)
        return self.head(x)


def later(layer, suffix="r"):
    """A predicate, although it takes two arguments."""
    return layer.name.endswith(suffix)


@pytest.mark.parametrize(
    ("selectors", "expected"),
    [
        ("stem", ("stem",)),
        (["head", "stem"], ("stem", "head")),
        ((), ()),
        ("encoder/*", ENCODER),
        ("encoder/?", ENCODER[:2]),
        ("encoder/[!1]*", ENCODER[:1]),
        ("odd[ab]", ("odd[ab]",)),  # a name comes before the glob that it is too
        ("odd[a]", ("odda",)),
        (re.compile(r"encoder/\d"), ENCODER[:2]),  # the whole name
        (re.compile(r"ENC.*", re.IGNORECASE), ENCODER),
        (lambda layer: "encoder/1/kernel" in layer.params, ("encoder/1",)),
        (later, ("decoder",)),
        (operator.methodcaller("__eq__", LAYERS[0]), ("stem",)),
        (..., NAMES),
        (nnx.PathContains("encoder"), ENCODER),
        (nnx.PathContains(0), ("encoder/0",)),
        (nnx.PathContains("conv", exact=False), ("encoder/10/conv",)),
        (nnx.All(nnx.PathContains("encoder"), nnx.Not(nnx.PathContains("conv"))), ENCODER[:2]),
        (nnx.filterlib.PathIn(("head", "kernel"), ("head", "norm", "scale")), ("head",)),
        (lambda path, value: path[0] == "decoder", ("decoder",)),
        (["head", "encoder/*", re.compile("st.*"), later], ("stem", *ENCODER, "decoder", "head")),
    ],
)
def test_selects(selectors, expected):
    assert select(LAYERS, selectors) == expected
    assert sfj.Frozen(LAYERS, selectors).names == frozenset(expected)
    assert sfj.Frozen(LAYERS, "stem").add(selectors).names == {"stem", *expected}


@pytest.mark.parametrize(
    ("selectors", "message"),
    [
        ("encodr/0", r"no layer is called 'encodr/0'; did you mean 'encoder/0' or"),
        ("encoder", r"no layer is called 'encoder'; did you mean 'encoder/\*' or"),
        ("encoders/*", r"no layer is called 'encoders/\*'; did you mean 'encoder/"),
        (re.compile("encoder"), r"no layer's whole name matches 'encoder'; did you mean 'encoder/\*' or"),
        (["stem", lambda layer: False], r"<lambda>> selects no layer; did you mean 'stem' or .* 8 layers"),
        (nnx.PathContains("body"), r"PathContains\('body', exact=True\) selects no layer"),
        (nnx.PathContains("norm"), r"takes 'stem/norm/scale' and leaves 'stem/kernel', expected all parameters of"),
    ],
)
def test_what_means_no_layer_is_refused(selectors, message):
    with pytest.raises(ValueError, match=rf"keep: .*{message}"):
        select(LAYERS, selectors, "keep")


@pytest.mark.parametrize(
    ("selectors", "message"),
    [
        (None, "got NoneType None"),
        (3, "got int 3"),
        ({"stem": True, "head": False}, r"got dict of 2, .* of a mask pass the names"),
        (["stem", None], "got NoneType None among them"),
        (re.compile(b"stem"), "re.Pattern among them"),
        (nnx.BatchNorm, "got the type BatchNorm"),
        ([nnx.Linear(2, 2, rngs=nnx.Rngs(0))], r"got flax\S*Linear, .* the name of its path"),
        (nn.Dense(2), r"got flax\S*Dense, .* the name of its path"),
        ([nnx.Param], "got the type Param"),
        (nnx.OfType(nnx.Param), r"OfType\(.*Param'>\), which looks at variables"),
        (nnx.All("lora", nnx.PathContains("stem")), r"WithTag\('lora'\).*, which looks at variables"),
        (lambda path, value: value.ndim == 2, "which looks at variables"),
        (lambda: True, "<lambda> among them"),
        (lambda layer: layer.name, "got str 'stem', expected True or False from"),
        (lambda path, value: path, "got tuple .*, expected True or False from"),
    ],
)
def test_what_is_no_selector_is_refused(selectors, message):
    with pytest.raises(TypeError, match=rf"keep: .*{message}"):
        select(LAYERS, selectors, "keep")


def test_selectors_are_described_alike_in_every_process():
    several = ["stem", "encoder/*", re.compile("a.", re.IGNORECASE), later, nnx.PathContains("x"), ...]
    assert described(as_selectors(several, "keep")) == (
        "stem",
        "encoder/*",
        "re.compile('a.', re.IGNORECASE)",
        "<function later>",
        "PathContains('x', exact=True)",
        "...",
    )
    assert described(None) is None


def test_a_frozen_set_of_selectors_is_the_same_compile_key():
    frozen = sfj.Frozen(LAYERS, "encoder/*")
    assert (frozen, hash(frozen)) == (sfj.Frozen(LAYERS, ENCODER), hash(sfj.Frozen(LAYERS, frozenset(ENCODER))))


def test_both_doors_take_selectors():
    model = Network()
    layers = sfj.nnx.find_layers(model, scenes.X)
    optimizer = sfj.nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param, layers=layers)
    optimizer.freeze(model, nnx.PathContains(0))
    optimizer.freeze(model, re.compile(".*/1"))
    assert optimizer.frozen.names == {"encoder/0", "encoder/1"}
    state = scenes.train_state().freeze("[ab]")
    assert state.frozen.names == {"a", "b"}
    for freeze in (lambda names: optimizer.freeze(model, names), state.freeze):
        with pytest.raises(ValueError, match=r"frozen: no layer is called 'hea'; did you mean"):
            freeze("hea")
        with pytest.raises(TypeError, match=r"frozen: got the type BatchNorm"):
            freeze(nnx.BatchNorm)
