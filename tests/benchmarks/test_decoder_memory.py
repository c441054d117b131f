"""Memory of decoders on paper: its parts are those of the compiled step, and the guide's figures are made from it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import smartfrz_jax as sfj
from benchmarks.decoder import memory

ROOT = Path(__file__).parents[2]
TINY = {"vocab_size": 256, "dim": 64, "heads": 4, "kv_heads": 2, "hidden": 192}
TX = optax.adamw(1e-3)


@pytest.fixture(scope="module")
def tiny():
    jax.config.update("jax_numpy_rank_promotion", "allow")
    return memory.decoder(8, 4, 64, dtype=jnp.float32, **TINY)


def compiled(tiny, frozen):
    opt = sfj.freeze(TX, frozen)
    value_and_grad = sfj.value_and_grad(tiny.loss, frozen)

    def step(params, opt_state, *batch):
        loss, grads = value_and_grad(params, *batch)
        updates, opt_state = opt.update(grads, opt_state, params)
        return sfj.apply_updates(params, updates, frozen), opt_state, loss

    opt_state = jax.eval_shape(opt.init, tiny.params)
    return sfj.program_cost(jax.jit(step, donate_argnums=(0, 1)), tiny.params, opt_state, *tiny.batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nothing", "embedding and the first 50% of the blocks", "all but the head"])
def test_parts_are_those_of_the_compiled_step(name, tiny, jax_defaults):
    """Arguments to the byte; temporary memory within a tenth; copies of rows depend on XLA's version."""
    frozen = memory.sets(tiny.layers)[name][0]
    expected = memory.predict(tiny, frozen, TX)
    cost = compiled(tiny, frozen)
    assert cost.argument_bytes == expected.parameters + expected.moments + 3 * 4 * 4 * 64
    least = expected.gradients + expected.activations
    assert 0.9 * least < cost.temp_bytes < 1.1 * (least + expected.copies)


@pytest.mark.slow
def test_figures_of_the_guide(jax_defaults):
    """The table in the guide is made from shapes, and so is its headline."""
    guide = (ROOT / "docs/guides/language-models.md").read_text()
    lines = guide.partition("## With a third of the memory")[2].partition("\n## ")[0].splitlines()
    shown = [line for line in lines if line.startswith("| ") and not line.startswith("| frozen")]
    made = memory.table([row for row in memory.rows({"70B": memory.LLAMA2["Llama-2 70B"]}) if row.chips == 8])
    assert len(shown) == 5
    assert not set(shown) - set(made.splitlines())


def test_rest_and_keep_say_what_trains_beside_the_blocks(tiny):
    """Embeddings, norm and head with ``rest="train"``, as in LISA's implementation; the head alone; nothing."""
    trains = {
        name: max(memory.predict(tiny, frozen, TX).gradients for frozen in found)
        for name, found in memory.sets(tiny.layers).items()
    }
    block, tables = 49280 * 4, 2 * 256 * 64 * 4
    by_rest = [trains[name] for name in trains if "lisa" in name]
    assert by_rest == [2 * block + tables + 256, 2 * block + tables / 2 + 256, 2 * block]
