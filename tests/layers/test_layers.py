"""The layers of networks: which parameters belong together, and in which order."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from smartfrz_jax import find_layers
from smartfrz_jax.nnx import features
from smartfrz_jax.nnx import find_layers as nnx_find_layers
from smartfrz_jax.policies.base import freezable
from smartfrz_jax.pytrees import paths
from tests.layers.networks import LINEAR, ROW, linear, transformer_layers
from tests.support.rounding import assert_close

IMAGE = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)


class Bottleneck(nn.Module):
    """Names sort against forward order, and the branches are interleaved in the code."""

    train: bool
    downsample: bool

    @nn.compact
    def __call__(self, x):
        def norm(name, x):
            return nn.BatchNorm(use_running_average=not self.train, name=name)(x)

        y = nn.relu(norm("z_bn1", nn.Conv(4, (1, 1), use_bias=False, name="z_conv1")(x)))
        y = nn.relu(norm("y_bn2", nn.Conv(4, (3, 3), use_bias=False, name="y_conv2")(y)))
        y = nn.Conv(8, (1, 1), use_bias=False, name="x_conv3")(y)
        if self.downsample:
            x = nn.Conv(8, (1, 1), use_bias=False, name="w_shortcut")(x)
        y = norm("a_bn3", y)
        if self.downsample:
            x = norm("b_bn_shortcut", x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    train: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), use_bias=False, name="zz_stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not self.train, name="aa_stem_bn")(x))
        for i in range(11):  # so that block10 sorts before block2
            x = Bottleneck(self.train, downsample=i % 5 == 0, name=f"block{i}")(x)
        return nn.Dense(3, name="a_head")(x.mean((1, 2)))


def resnet_layers() -> list[str]:
    names = ["zz_stem"]
    for i in range(11):
        names += [f"block{i}/{conv}" for conv in ("z_conv1", "y_conv2", "x_conv3")]
        names += [f"block{i}/w_shortcut"] if i % 5 == 0 else []
    return [*names, "a_head"]


@pytest.mark.parametrize(
    ("wrap", "train"),
    [(lambda f: f, False), (jax.jit, False), (lambda f: f, True), (jax.checkpoint, True)],
    ids=["bare-eval", "jit-eval", "bare-train", "remat-train"],
)
def test_resnet_in_linen(train, wrap):
    net = ResNet(train)
    variables = jax.eval_shape(net.init, jax.random.key(0), IMAGE)
    stats = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), variables["batch_stats"])

    @wrap
    def forward(params, x):
        return net.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])[0]

    layers = find_layers(variables["params"], forward, IMAGE)
    assert list(layers.names) == resnet_layers()
    owner = layers.owner
    assert owner["aa_stem_bn/scale"] == owner["aa_stem_bn/bias"] == "zz_stem"
    for i in range(11):
        for leaf in ("scale", "bias"):
            assert owner[f"block{i}/z_bn1/{leaf}"] == f"block{i}/z_conv1"
            assert owner[f"block{i}/y_bn2/{leaf}"] == f"block{i}/y_conv2"
            assert owner[f"block{i}/a_bn3/{leaf}"] == f"block{i}/x_conv3"
            if i % 5 == 0:
                assert owner[f"block{i}/b_bn_shortcut/{leaf}"] == f"block{i}/w_shortcut"
    assert layers.head == "a_head"
    assert layers[0].kernels == ("zz_stem/kernel",)


def test_running_statistics_may_be_an_input():
    net = ResNet()
    variables = jax.eval_shape(net.init, jax.random.key(0), IMAGE)

    def forward(params, x, stats):
        return net.apply({"params": params, "batch_stats": stats}, x)

    layers = find_layers(variables["params"], forward, IMAGE, variables["batch_stats"])
    assert list(layers.names) == resnet_layers()
    assert layers.owner["block5/a_bn3/scale"] == "block5/x_conv3"
    assert layers.owner["block5/b_bn_shortcut/scale"] == "block5/w_shortcut"


class NNXBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.zconv = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.adown = nnx.Conv(4, 4, (1, 1), rngs=rngs)
        self.bnz = nnx.BatchNorm(4, rngs=rngs)
        self.bna = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        y, x = self.zconv(x), self.adown(x)
        y = self.bnz(y)
        return nnx.relu(self.bna(x) + y)


class NNXNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.z_stem = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.blocks = nnx.List([NNXBlock(rngs) for _ in range(11)])
        self.a_head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        x = self.z_stem(x)
        for block in self.blocks:
            x = block(x)
        return self.a_head(x.mean((1, 2)))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("pure", [False, True], ids=["state", "pure"])
@pytest.mark.slow
def test_nnx_split_and_merge(train, pure):
    model = NNXNet(nnx.Rngs(0))
    model.train() if train else model.eval()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    if pure:
        params, rest = nnx.as_pure((params, rest))
    layers = find_layers(params, lambda params, x: nnx.merge(graphdef, params, rest, copy=True)(x), IMAGE)
    names = ["z_stem"]
    for i in range(11):
        names += [f"blocks/{i}/zconv", f"blocks/{i}/adown"]
    assert list(layers.names) == [*names, "a_head"]
    assert layers.owner["blocks/10/bnz/scale"] == "blocks/10/zconv"
    assert layers.owner["blocks/10/bna/scale"] == "blocks/10/adown"


@pytest.mark.slow
def test_pre_norm_transformer():
    layers = transformer_layers("layer")
    inner = [f"encoderblock_{i}/{name}" for i in range(12) for name in ("query", "key", "value", "out", "fc1", "fc2")]
    assert list(layers.names) == ["z_embed", "position", *inner, "a_head"]
    owner = layers.owner
    assert owner["z_embed/embedding"] == "z_embed"
    for i in range(1, 12):  # fed by the residual stream: the kernel in the same block
        assert owner[f"encoderblock_{i}/norm1/scale"] == f"encoderblock_{i}/query"
    for i in range(12):
        assert owner[f"encoderblock_{i}/norm2/bias"] == f"encoderblock_{i}/out"
    assert owner["encoder_norm/scale"] == owner["encoder_norm/bias"] == "encoderblock_11/fc2"


def test_a_function_that_uses_no_parameter_has_no_order():
    with pytest.raises(ValueError, match=r"forward: computes with none of the parameters, .* closes over"):
        find_layers(LINEAR, lambda params, x: linear(LINEAR, x), ROW)


def test_texts_and_booleans_among_the_inputs_are_no_data():
    def forward(params, x, order, more):
        first, second = {"given": "ab", "turned": "ba"}[order]
        x = x @ params[first]["kernel"] @ params[second]["kernel"]
        return x @ params["c"]["kernel"] if more else x

    assert find_layers(LINEAR, forward, ROW, "given", True).names == ("a", "b", "c")
    assert find_layers(LINEAR, forward, ROW, "turned", False).names == ("c", "b", "a")


def test_unused_parameters_come_first():
    assert find_layers(LINEAR, linear, ROW).names == ("c", "b", "a")


def test_what_only_the_loss_uses_has_its_place_in_a_forward_that_computes_the_loss():
    params = {"arcface": jnp.ones((8, 3)), "back": jnp.ones((4, 8)), "middle": jnp.ones((8, 8)), "scale": jnp.ones(())}

    def forward(params, x):
        return x @ params["back"] @ params["middle"]

    def loss(params, x):
        return (forward(params, x) @ params["arcface"] * params["scale"]).sum()

    without, layers = (find_layers(params, function, jnp.ones((2, 4))) for function in (forward, loss))
    assert without.names == ("arcface", "back", "middle")
    assert layers.names == ("back", "middle", "arcface")
    assert layers.owner["scale"] == "arcface"


class Tied(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed, self.norm = nnx.Embed(9, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])

    def __call__(self, tokens):
        x = self.norm(self.embed(tokens))
        for block in self.blocks:
            x = nnx.relu(block(x))
        return self.embed.attend(x)


@pytest.mark.slow
@pytest.mark.usefixtures("jax_defaults")
def test_an_embedding_that_is_the_classifier_too_is_the_head():
    model, tokens = Tied(nnx.Rngs(0)), jnp.arange(6)
    layers = nnx_find_layers(model, tokens)
    assert layers.names == ("blocks/0", "blocks/1", "embed")
    assert layers.owner["norm/scale"] == layers.head == "embed"
    assert freezable(layers, None).tolist() == [True, True, False]
    assert freezable(layers, ["blocks/0"]).tolist() == [False, True, True]
    outputs = features(model, layers, tokens)(model, tokens)
    assert_close(outputs["embed"], model.norm(model.embed(tokens)))


def test_layers_for_two_inputs_come_where_they_are_used_first():
    def siamese(p, x, y):  # the second input does not come from the first's head, c
        return x @ p["a"]["kernel"] @ p["b"]["kernel"] @ p["c"]["kernel"], y @ p["a"]["kernel"] @ p["b"]["kernel"]

    assert find_layers(LINEAR, siamese, ROW, ROW).names == ("a", "b", "c")


def test_order_follows_the_code_and_not_the_dict():
    first = find_layers(LINEAR, lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"] @ p["c"]["kernel"], ROW)
    second = find_layers(LINEAR, lambda p, x: x @ p["c"]["kernel"] @ p["b"]["kernel"] @ p["a"]["kernel"], ROW)
    assert first.names == second.names[::-1] == ("a", "b", "c")


def test_bfloat16_casts_and_control_flow_are_looked_through():
    def forward(p, x):
        p = jax.tree.map(lambda w: w.astype(jnp.bfloat16), p)
        x = jax.checkpoint(lambda p, x: jax.nn.relu(x @ p["c"]["kernel"]))(p, x.astype(jnp.bfloat16))
        x = jax.lax.scan(lambda x, _: (x @ p["a"]["kernel"], None), x, None, length=2)[0]
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ p["b"]["kernel"], lambda: x)

    assert find_layers(LINEAR, jax.jit(forward), ROW).names == ("c", "a", "b")


def test_norms_without_any_kernel_are_layers_themselves():
    params = {"n2": {"scale": jnp.ones(2), "bias": jnp.ones(2)}, "n1": {"scale": jnp.ones(2)}}
    layers = find_layers(params, lambda p, x: x * p["n1"]["scale"][None] * p["n2"]["scale"][None], ROW)
    assert layers.names == ("n1", "n2")  # though n2/bias is not used at all
    assert layers[1].kernels == layers[1].params == ("n2/bias", "n2/scale")


def test_norm_before_the_first_kernel_joins_it():
    params = {"norm": {"scale": jnp.ones(2)}, "fc": {"kernel": jnp.eye(2)}}
    layers = find_layers(params, lambda p, x: (x * p["norm"]["scale"][None]) @ p["fc"]["kernel"], ROW)
    assert layers.names == ("fc",)
    assert layers[0].kernels == ("fc/kernel",)


@pytest.mark.parametrize(("scale", "offset"), [("scale", "offset"), ("gamma", "beta")])
def test_norm_with_the_rank_of_its_input_is_no_kernel(scale, offset):
    norm = dict.fromkeys([scale, offset], jnp.ones((1, 2)))  # as Haiku's BatchNorm has them
    params = {"conv": {"w": jnp.eye(2)}, "norm": norm, "head": {"w": jnp.eye(2)}}

    def forward(p, x):
        return (x @ p["conv"]["w"] * p["norm"][scale] + p["norm"][offset]) @ p["head"]["w"]

    layers = find_layers(params, forward, ROW)
    assert layers.names == ("conv", "head")
    assert layers[0].kernels == ("conv/w",)


@st.composite
def networks(draw):
    """A nested parameter tree with unlike leaves, and the order in which its modules are used."""
    width = 3
    leaf = st.sampled_from(["kernel", "bias", "scale", "w", "embedding"])
    module = st.dictionaries(leaf, st.integers(1, 2), min_size=1, max_size=3)
    tree = draw(
        st.recursive(
            module,
            lambda inner: st.dictionaries(st.text("abz019", min_size=1, max_size=3), inner, min_size=1, max_size=4),
            max_leaves=8,
        )
    )
    params = jax.tree.map(lambda ndim: jnp.ones((width,) * ndim), tree)
    names = draw(st.permutations(list(paths.flatten(params))))
    used = names[: draw(st.integers(0, len(names)))]
    return params, used


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(networks(), st.sampled_from(["layer", "block", lambda name: name[:1]]))
def test_every_parameter_is_in_exactly_one_layer(network, granularity):
    params, used = network

    def forward(params, x):
        leaves = paths.flatten(params)
        for name in used:
            leaf = leaves[name]
            x = x @ leaf if leaf.ndim == 2 else x * leaf[None]
        return x

    layers = find_layers(params, forward, jnp.ones((2, 3)), granularity=granularity)
    leaves = paths.flatten(params)
    assert sorted(param for layer in layers for param in layer.params) == sorted(leaves)
    assert len(set(layers.names)) == len(layers)
    assert layers.owner == {param: layer.name for layer in layers for param in layer.params}
    rank = {name: position for position, name in enumerate(used)}
    positions = [min((rank[param] for param in layer.params if param in rank), default=-1) for layer in layers]
    assert positions == sorted(positions)
    for layer in layers:
        assert layer.kernels
        assert set(layer.kernels) <= set(layer.params)


@settings(max_examples=25, deadline=None)
@given(st.permutations([f"layer{i}" for i in range(12)]))
def test_mlp_layers_come_in_the_order_of_use(names):
    params = {name: {"kernel": jnp.eye(2), "bias": jnp.ones(2)} for name in names}

    def forward(p, x):
        for name in names:
            x = jax.nn.relu(x @ p[name]["kernel"] + p[name]["bias"][None])
        return x

    layers = find_layers(params, forward, ROW)
    assert layers.names == tuple(names)
    assert all(layer.params == (f"{layer.name}/bias", f"{layer.name}/kernel") for layer in layers)
