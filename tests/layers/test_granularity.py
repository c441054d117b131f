"""Layers as large as the user wants: blocks, or what a rule of names says."""

import functools

import jax.numpy as jnp
import pytest

from smartfrz_jax import find_layers
from smartfrz_jax.pytrees import paths
from tests.layers.networks import LINEAR, ROW, linear, transformer_layers


@pytest.mark.slow
def test_granularity_block():
    layers = transformer_layers("block")
    assert list(layers.names) == ["z_embed", "position", *[f"encoderblock_{i}" for i in range(12)], "a_head"]
    assert len(layers[-2].kernels) == 6
    assert all(kernel.endswith("/kernel") for kernel in layers[-2].kernels)


def test_granularity_of_nested_lists_is_the_inner_block():
    block = {"conv2": {"kernel": jnp.eye(2)}, "conv1": {"kernel": jnp.eye(2)}}
    params = {"stages": [[block] * 2] * 2, "head": {"kernel": jnp.eye(2)}}

    def forward(p, x):
        for stage in p["stages"]:
            for block in stage:
                x = x @ block["conv1"]["kernel"] @ block["conv2"]["kernel"]
        return x @ p["head"]["kernel"]

    layers = find_layers(params, forward, ROW, granularity="block")
    assert layers.names == ("stages/0/0", "stages/0/1", "stages/1/0", "stages/1/1", "head")


def of_names(*names):
    """Layers, as blocks, of products with one matrix for each name."""
    tree: dict = {}
    for name in names:
        *parents, last = name.split("/")
        functools.reduce(lambda inner, part: inner.setdefault(part, {}), parents, tree)[last] = {"kernel": jnp.eye(2)}

    def forward(params, x):
        return functools.reduce(lambda x, name: x @ paths.flatten(params)[f"{name}/kernel"], names, x)

    return find_layers(tree, forward, ROW, granularity="block").names


def test_a_number_in_a_name_makes_no_block_of_a_whole_network():
    assert of_names("resnet18/stem", "resnet18/a", "head") == ("resnet18/stem", "resnet18/a", "head")
    inner = [f"resnet18/block{i}/conv{j}" for i in (1, 2) for j in (1, 2)]
    assert of_names("resnet18/stem", *inner, "head") == ("resnet18/stem", "resnet18/block1", "resnet18/block2", "head")


def test_blocks_of_numbered_stages():
    inner = [f"stage{i}/block{j}/conv{k}" for i in (1, 2) for j in (1, 2) for k in (1, 2)]
    names = ("stage1/block1", "stage1/block2", "stage2/block1", "stage2/block2", "head")
    assert of_names(*inner, "head") == names
    # Parts of a block: one layer each, or beside others.
    assert of_names(*[f"Block_{i}/Conv_{j}/conv" for i in (0, 1) for j in (0, 1)]) == ("Block_0", "Block_1")
    parts = [
        f"Block_{i}/{part}" for i in (0, 1) for part in ("Attn_0/q", "Attn_0/k", "Attn_1/q", "Attn_1/k", "Mlp_0/a")
    ]
    assert of_names(*parts) == ("Block_0", "Block_1")


@pytest.mark.slow
def test_granularity_of_a_user():
    layers = transformer_layers(lambda name: "body" if name.startswith("encoder") else name.split("/")[0])
    assert layers.names == ("z_embed", "position", "body", "a_head")
    assert len(layers[2].kernels) == 12 * 6


@pytest.mark.parametrize("granularity", ["layers", "", None, 3])
def test_wrong_granularity(granularity):
    with pytest.raises(ValueError, match=r"granularity: got .*expected 'layer', 'block' or a function"):
        find_layers(LINEAR, linear, ROW, granularity=granularity)
