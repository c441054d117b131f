"""Every program lowers for GPUs and TPUs, which are not at hand: train steps, predictor, records, kept activations.

Lowering tells whether JAX knows all that a program asks for on a platform.
"""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax._src.interpreters import mlir

import smartfrz_jax as sfj
from models.resnet import Bottleneck, ResNet
from models.vgg import VGG
from smartfrz_jax.policies import Schedule
from smartfrz_jax.predictor import PredictorConfig
from smartfrz_jax.predictor.encoding import PAPER
from smartfrz_jax.programs import flat_step
from smartfrz_jax.programs.arguments import Arguments
from tests.front_door import linen_freezing
from tests.models.convnets import TINY, random_model
from tests.models.transformers import IDS, IMAGES, MASK, lively, tiny_bert, tiny_deit, tiny_llama
from tests.support.train_steps import loss_fn, make_step

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("jax_defaults")]

PLATFORMS = ("cuda", "tpu")
LABELS = jnp.zeros(len(IMAGES), jnp.int32)
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def lower(traced: Any) -> dict[str, str]:
    """The text of a traced program for each platform."""
    return {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in PLATFORMS}


def products(text: str) -> int:
    """Number of convolutions and matrix products, inside of called functions too, but each function once."""
    return len(re.findall(r"stablehlo\.(?:convolution|dot_general|dot)\b", text))


class Lowered:
    """Lowers for the other platforms whatever is compiled for this one while it is there.

    Args:
        monkeypatch: Undoes it.

    Attributes:
        names: Of the programs.
    """

    def __init__(self, monkeypatch: Any):
        self.names: list[str] = []
        original = mlir.lower_jaxpr_to_module

        def lower_for_all(name: str, *args: Any, **kwargs: Any) -> Any:
            for platform in PLATFORMS:
                original(name, *args, **{**kwargs, "platforms": (platform,)})
            self.names.append(re.sub(r"^jit\((.*)\)$|^jit_", r"\1", name))
            return original(name, *args, **kwargs)

        monkeypatch.setattr(mlir, "lower_jaxpr_to_module", lower_for_all)
        jax.clear_caches()  # what is compiled already would not be lowered again


def convnet(make, **options):
    return random_model(make, num_classes=3, dtype=jnp.bfloat16, **options), IMAGES


def decoder(**options):
    return lively(lambda: tiny_llama(dtype=jnp.bfloat16, **options)), IDS


def transformer(make, *inputs, **options):
    return lively(lambda: make(dropout=0.1, attention_dropout=0.1, dtype=jnp.bfloat16, **options)), *inputs


# Each file of models/, in training mode with all its dropouts, as they would run on a GPU: in bfloat16.
NETWORKS = {
    "resnet": lambda: convnet(partial(ResNet, (1, 1), (4, 8), Bottleneck)),
    "vgg, no norms": lambda: convnet(partial(VGG, [[4], [4]], hidden=8)),
    **{name: partial(convnet, make) for name, make in TINY.items() if name != "resnet"},
    "deit": lambda: transformer(tiny_deit, IMAGES, drop_path=0.1),
    "deit, distilled, scanned": lambda: transformer(tiny_deit, IMAGES, drop_path=0.1, distilled=True, scan=True),
    "bert": lambda: transformer(tiny_bert, IDS, MASK),
    "bert, scanned, pooled": lambda: transformer(tiny_bert, IDS, MASK, scan=True, pool="mean"),
    "llama, tied": decoder,
    "llama, scanned": lambda: decoder(tied=False, scan=True),
}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """What is traced depends on the default backend: depthwise convolutions are written out on CPUs."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def fronts(layers):
    """Nothing frozen, the front half, and all but the head."""
    return (), layers.names[: len(layers) // 2], layers.names[:-1]


def assert_fewer_products(texts):
    for platform in PLATFORMS:
        first, *_, last = (products(text[platform]) for text in texts)
        assert 0 < last < first, platform


@pytest.mark.parametrize("name", NETWORKS)
def test_steps_of_networks_lower_and_freezing_takes_products_out(name, as_on_a_gpu):
    model, *inputs = NETWORKS[name]()
    model.train()
    layers = sfj.nnx.find_layers(model, *inputs)
    optimizer = sfj.nnx.Optimizer(model, TX, layers=layers)

    def loss(model, inputs, labels):
        return loss_fn(lambda inputs: jnp.asarray(model(*inputs)).reshape(-1, 3)[: len(labels)], inputs, labels)

    texts = []
    for frozen in fronts(layers):
        optimizer.freeze(model, list(frozen))
        traced, _ = flat_step.trace(make_step(loss), Arguments((model, optimizer, inputs, LABELS)), donate=True)
        texts.append(lower(traced))
    assert_fewer_products(texts)


def test_step_of_a_linen_train_state_lowers(as_on_a_gpu):
    state = linen_freezing.create_train_state(jax.random.key(0), 0.1, 0.9)
    texts = [
        lower(linen_freezing.train_step.trace(state.freeze(list(frozen)), jnp.ones((2, 28, 28, 1)), LABELS[:2]))
        for frozen in fronts(state.frozen.layers)
    ]
    assert_fewer_products(texts)


def chain(params, x):
    for name in "abcd":
        x = jnp.tanh(x @ params[name])
    return x.mean()


def scanned(params, x):
    x, _ = jax.lax.scan(lambda x, row: (jnp.tanh(x @ row), None), x @ params["stem"], params["blocks"])
    return (x @ params["head"]).mean()


BARE = {
    "each for itself": (chain, {name: jnp.ones((4, 4)) for name in "abcd"}),
    "rows of a scan": (scanned, {"stem": jnp.ones((4, 4)), "blocks": jnp.ones((3, 4, 4)), "head": jnp.ones((4, 4))}),
}


@pytest.mark.parametrize(("loss", "params"), BARE.values(), ids=BARE)
def test_step_of_bare_parameters_lowers(loss, params, as_on_a_gpu):
    layers = sfj.find_layers(params, loss, jnp.ones((2, 4)), rows=True)
    texts = []
    for names in fronts(layers):
        frozen = sfj.Frozen(layers, frozenset(names))
        tx = sfj.freeze(TX, frozen)

        @jax.jit
        def step(params, opt_state, x, frozen=frozen, tx=tx):
            value, grads = sfj.value_and_grad(loss, frozen)(params, x)
            updates, opt_state = tx.update(grads, opt_state, params)
            return sfj.apply_updates(params, updates, frozen), opt_state, value

        texts.append(lower(step.trace(params, tx.init(params), jnp.ones((2, 4)))))
    assert_fewer_products(texts)


def small_deit():
    model = lively(partial(tiny_deit, dropout=0.0))
    return model, sfj.nnx.find_layers(model, IMAGES)


@pytest.mark.parametrize("encoding", ["default", "paper"])
def test_what_smartfrz_runs_lowers(encoding, monkeypatch):
    """Sampling, records, sums of losses, the predictor, and the losses that a probe compares."""
    model, layers = small_deit()
    predictor = (
        sfj.Predictor.pretrained()
        if encoding == "default"
        else sfj.Predictor(
            PredictorConfig(size=16, hidden=8, features=4, head_hidden=4, encoding=PAPER), rngs=nnx.Rngs(0)
        )
    )
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    lowered = Lowered(monkeypatch)
    policy = sfj.smartfrz(
        predictor,
        total_steps=40,
        schedule=Schedule(record_every=1, evaluate_every=2, min_records=2, window=4),
        probe=sfj.nnx.probe(model, loss_fn, IMAGES, LABELS),
    )
    state = policy.init(layers, params)
    for step in range(1, 5):
        loss = jnp.float32(1.0) / step
        _, state = policy.update(state, layers, step=step, params=lambda: params, loss=loss)
    programs = {"_record", "_chronological", "_add", "_rows_finite", "_probability"}
    programs |= {"_loss"} if encoding == "default" else {"_sample"}
    assert programs <= set(lowered.names)


def test_what_a_cached_step_runs_lowers(monkeypatch):
    """The front of a batch, from the inputs and from what was kept; the store; the rest of the step."""
    model, layers = small_deit()
    optimizer = sfj.nnx.Optimizer(model, TX, layers=layers)
    lowered = Lowered(monkeypatch)
    step = sfj.nnx.CachedStep(make_step, loss_fn, examples=8)
    for frozen in (len(layers) // 2, len(layers) - 1):
        optimizer.freeze(model, list(layers.names[:frozen]))
        for examples in (np.arange(4), np.arange(4, 8), np.arange(4)):
            step(model, optimizer, examples, IMAGES, LABELS)
    programs = {"_activations", "grown", "_scattered", "_gathered", "train_step"}
    assert programs <= set(lowered.names)


def test_what_only_cpus_have_does_not_lower(monkeypatch):
    """So the tests above can fail."""
    with pytest.raises(NotImplementedError, match="schur"):
        lower(jax.jit(jax.lax.linalg.schur).trace(jnp.eye(2)))
    Lowered(monkeypatch)
    with pytest.raises(NotImplementedError, match="schur"):
        jax.lax.linalg.schur(jnp.eye(2))
