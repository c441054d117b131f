"""70 B parameters on paper: the page has what the command computes, from sizes of a real network and the defaults."""

import inspect
import math
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

import smartfrz_jax as sfj
from benchmarks import seventy_billion as paper
from models.llama import Llama
from smartfrz_jax.predictor.sampling import Tailoring

PAGE = Path(__file__).parents[2] / "docs/guides/launching.md"


def test_the_page_has_what_is_computed():
    assert paper.table() in PAGE.read_text()


def test_counts_are_those_of_a_network(jax_defaults):
    heads = paper.WIDTH // 128
    sizes = {"vocab_size": paper.VOCABULARY, "dim": paper.WIDTH, "heads": heads, "kv_heads": paper.KEYS // 128}

    def make(depth):
        return Llama(**sizes, depth=depth, hidden=paper.HIDDEN, tied=False, rngs=nnx.Rngs(0))

    def counts(depth):
        model = nnx.eval_shape(lambda: make(depth))
        leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
        layers = sfj.nnx.find_layers(model, jnp.zeros((1, 4), jnp.int32))
        return sum(math.prod(leaf.shape) for leaf in leaves if leaf.ndim > 1), len(layers)

    (one, layers), (two, more) = counts(1), counts(2)
    all_blocks = paper.BLOCKS - 1
    assert paper.counts() == (one + all_blocks * (two - one), layers + all_blocks * (more - layers))


def test_defaults_are_those_of_the_library():
    assert inspect.signature(Tailoring.create).parameters["size"].default == paper.SAMPLE
    assert sfj.policies.Schedule().window == paper.WINDOW
