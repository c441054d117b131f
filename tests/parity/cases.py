"""The networks that are compared, and what is computed with them here."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import weights
from models.bert import bert_base, minilm
from models.deit import deit_tiny
from models.efficientnet_lite import efficientnet_lite0
from models.llama import smollm2_135m
from models.mobilenetv2 import mobilenetv2
from models.resnet import resnet50
from models.vgg import vgg11
from tests.parity import drawing

CLASSES = 10
VOCABULARY = 512  # of the decoder


class Case(NamedTuple):
    """A network without dropout and stochastic depth, and its inputs in the order of its arguments.

    Each example has a label, or, where ``vocabulary`` is given, each token the one that comes next.
    """

    network: Callable[..., nnx.Module]
    inputs: tuple[np.ndarray, ...]
    vocabulary: int = 0

    @property
    def labels(self):
        shape = self.inputs[0].shape if self.vocabulary else (len(self.inputs[0]),)
        return drawing.integers("labels", shape, self.vocabulary or CLASSES)


def _images(examples, size, seed=0):
    """Images; the seed is one with which no activation comes so close to a kink that float32 could miss its side."""
    return (1.7 * drawing.uniform(f"images {seed}", (examples, size, size, 3)),)


def _tokens(examples, length):
    """Numbers of the words, mask (every example a little shorter than the one before) and types of the tokens."""
    mask = np.arange(length) < (length - np.arange(examples) % length)[:, None]
    types = np.arange(length) >= (length // 2 + np.arange(examples) % 3)[:, None]
    return (
        drawing.integers("input_ids", (examples, length), 30522),
        mask.astype(np.int32),
        (types & mask).astype(np.int32),
    )


CASES = {
    "resnet50": Case(lambda **k: resnet50(**k), _images(8, 64, seed=7)),
    "vgg11": Case(lambda **k: vgg11(dropout=0.0, **k), _images(2, 64, seed=3)),
    "vgg11_bn": Case(lambda **k: vgg11(batch_norm=True, dropout=0.0, **k), _images(3, 64, seed=2)),
    "mobilenetv2": Case(lambda **k: mobilenetv2(dropout=0.0, **k), _images(8, 64)),
    "deit_tiny": Case(lambda **k: deit_tiny(image_size=64, drop_path=0.0, **k), _images(4, 64)),
    "deit_tiny_distilled": Case(
        lambda **k: deit_tiny(distilled=True, image_size=64, drop_path=0.0, scan=True, **k), _images(4, 64)
    ),
    "bert_base": Case(lambda **k: bert_base(dropout=0.0, attention_dropout=0.0, scan=True, **k), _tokens(4, 16)),
    "minilm": Case(lambda **k: minilm(dropout=0.0, attention_dropout=0.0, **k), _tokens(4, 16)),
    # With SmolLM2's widths and heads.
    "llama": Case(
        lambda num_classes, **k: smollm2_135m(depth=3, vocab_size=VOCABULARY, scan=True, **k),
        (drawing.integers("input_ids", (4, 16), VOCABULARY),),
        VOCABULARY,
    ),
    "efficientnet_lite0": Case(lambda **k: efficientnet_lite0(dropout=0.0, drop_connect=0.0, **k), _images(8, 64)),
}


def abstract(name):
    """The network with shapes in place of weights."""
    return nnx.eval_shape(lambda: CASES[name].network(num_classes=CLASSES, rngs=nnx.Rngs(0)))


def model(name):
    """The network with the weights drawn for it."""
    network = abstract(name)
    weights.set_tensors(network, {name: drawing.tensor(name, shape) for name, shape in _shapes(network).items()})
    return network


def outputs(name):
    """What is compared: by kind, then by tensor, float32 arrays in torch's layout.

    Returns:
        ``eval``: logits in evaluation mode. ``train``: logits and mean cross-entropy in training mode.
        ``statistics``: BatchNorm's new running statistics after it. ``gradients``: of that loss, for every parameter.
    """
    case = CASES[name]
    return outputs_of(model(name), case.inputs, case.labels)


def outputs_of(network, inputs, labels):
    """As :func:`outputs`, of any network."""
    graphdef, params, rest = nnx.split(network, nnx.Param, ...)

    def run(params, rest, labels, inputs):
        def loss(params):
            module = nnx.merge(graphdef, params, rest, copy=True)
            module.train()
            logits = module(*inputs)
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
            return -jnp.mean(picked), (logits, nnx.state(module, nnx.BatchStat))

        evaluated = nnx.merge(graphdef, params, rest, copy=True)
        evaluated.eval()
        (value, (logits, statistics)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return evaluated(*inputs), logits, value, nnx.as_pure(statistics), nnx.as_pure(grads)

    with jax.default_matmul_precision("highest"):
        evaluated, logits, loss, statistics, grads = jax.jit(run)(params, rest, labels, inputs)
    return {
        "eval": {"logits": np.asarray(evaluated)},
        "train": {"logits": np.asarray(logits), "loss": np.asarray(loss)},
        "statistics": weights.get_tensors(network, statistics),
        "gradients": weights.get_tensors(network, grads),
    }


def parameters(network):
    """Number of parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))


def _shapes(network):
    """Shapes of the tensors in torch's layout."""
    abstract = nnx.as_pure(nnx.state(network, (nnx.Param, nnx.BatchStat)))
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.int8(0), leaf.shape), abstract)
    return {name: array.shape for name, array in weights.get_tensors(network, zeros).items()}
