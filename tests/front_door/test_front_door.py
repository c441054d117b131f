"""The lines that a stock training loop changes, and that it then trains and freezes."""

import difflib
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import smartfrz_jax as sfj
from tests.front_door import linen_freezing, linen_stock, nnx_freezing, nnx_stock

pytestmark = pytest.mark.usefixtures("jax_defaults")

EPOCHS, BATCH = 3, 64
STEPS = EPOCHS * 512 // BATCH


def changed_lines(stock, freezing):
    def code(module):
        text = Path(module.__file__).read_text().split('"""', 2)[2]
        # The policy comes in from outside here, where a script would write smartfrz(...) in its place.
        text = re.sub(r"^def train\(.*$", "def train", text, flags=re.M)
        return [line for line in text.splitlines() if line.strip()]

    diff = difflib.ndiff(code(stock), code(freezing))
    return [line[2:] for line in diff if line.startswith("+ ")]


@pytest.mark.parametrize(("stock", "freezing"), [(nnx_stock, nnx_freezing), (linen_stock, linen_freezing)])
def test_at_most_five_lines_change(stock, freezing):
    lines = changed_lines(stock, freezing)
    assert 0 < len(lines) <= 5, lines


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nnx_leaves(model):
    return leaves(nnx.to_pure_dict(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))))


@pytest.mark.slow
def test_nnx_without_freezing_is_the_stock_loop(fashion):
    stock, _, history = nnx_stock.train(*fashion, 1, BATCH)
    ours, _, ours_history = nnx_freezing.train(*fashion, 1, BATCH, sfj.policies.never())
    assert ours_history[0] == pytest.approx(history[0], rel=1e-5)
    for name, leaf in nnx_leaves(stock).items():
        np.testing.assert_allclose(nnx_leaves(ours)[name], leaf, rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.mark.slow
def test_linen_without_freezing_is_the_stock_loop(fashion):
    stock, history = linen_stock.train(*fashion, 1, BATCH)
    ours, ours_history = linen_freezing.train(*fashion, 1, BATCH, sfj.policies.never())
    assert ours_history[0]["loss"] == pytest.approx(history[0]["loss"], rel=1e-6)
    for name, leaf in leaves(stock.params).items():
        np.testing.assert_array_equal(leaves(ours.params)[name], leaf, err_msg=name)


@pytest.mark.slow
def test_nnx_trains_and_freezes(fashion):
    policy = sfj.static_prefix([(0.5, 0.5)], total_steps=STEPS)
    _, optimizer, history = nnx_freezing.train(*fashion, EPOCHS, BATCH, policy)
    assert optimizer.frozen.names == {"conv1", "conv2"}
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert history[-1]["accuracy"] > 0.6


@pytest.mark.slow
def test_linen_trains_and_freezes(fashion):
    policy = sfj.static_prefix([(0.5, 0.5)], total_steps=STEPS)
    state, history = linen_freezing.train(*fashion, EPOCHS, BATCH, policy)
    assert state.frozen.names == {"Conv_0", "Conv_1"}
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("door", ["nnx", "linen"])
def test_frozen_layers_hold_still_in_the_stock_loop(fashion, door):
    """The same loop, once ending at the freeze and once going on: what is frozen is the same, bit for bit."""
    policy = sfj.static_prefix([(1 / EPOCHS, 0.6)], total_steps=STEPS)
    if door == "nnx":
        short, long = (nnx_leaves(nnx_freezing.train(*fashion, epochs, BATCH, policy)[0]) for epochs in (1, EPOCHS))
        frozen = ("conv1", "batch_norm1", "conv2", "batch_norm2")
    else:
        short, long = (
            leaves(linen_freezing.train(*fashion, epochs, BATCH, policy)[0].params) for epochs in (1, EPOCHS)
        )
        frozen = ("Conv_0", "Conv_1")
    for name, leaf in short.items():
        held = any(f"'{layer}'" in name for layer in frozen)
        assert np.array_equal(leaf, long[name]) == held, name
