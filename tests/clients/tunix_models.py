"""Tunix's models at toy size, and its loss."""

import importlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

with warnings.catch_warnings():  # of what they import
    warnings.simplefilter("ignore")
    gemma, gemma3, gemma4, llama3, qwen2, qwen3 = (
        importlib.import_module(f"tunix.models.{name}.model")
        for name in ("gemma", "gemma3", "gemma4", "llama3", "qwen2", "qwen3")
    )
    from tunix.sft import peft_trainer

SIZES = {"num_layers": 2, "embed_dim": 8, "hidden_dim": 16, "num_heads": 2, "head_dim": 4, "num_kv_heads": 1}
TOKENS = jax.random.randint(jax.random.key(0), (2, 6), 1, 13)
BATCH = {
    "input_tokens": TOKENS,
    "input_mask": jnp.ones(TOKENS.shape, bool),
    "positions": jnp.broadcast_to(jnp.arange(6), TOKENS.shape),
    "attention_mask": jnp.broadcast_to(jnp.tril(jnp.ones((6, 6), bool)), (2, 6, 6)),
}
loss_fn = peft_trainer._default_loss_fn


def drawn(model):
    """The model with weights that are drawn: Tunix makes those of the MLPs zero, from which nothing trains."""
    generator = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(0.3 * generator.standard_normal(leaf.shape), leaf.dtype)

    nnx.update(model, jax.tree.map(draw, nnx.state(model)))
    return model


def make_llama3():
    config = llama3.ModelConfig(**SIZES, vocab_size=13, rope_theta=10_000, norm_eps=1e-5)
    return drawn(llama3.Llama3(config, rngs=nnx.Rngs(0)))


def make_qwen2():
    config = qwen2.ModelConfig(**SIZES, vocab_size=13, rope_theta=10_000, norm_eps=1e-5, use_tied_embedding=True)
    return drawn(qwen2.Qwen2(config, rngs=nnx.Rngs(0)))


def make_qwen3():
    config = qwen3.ModelConfig(
        **SIZES, vocab_size=13, rope_theta=10_000, norm_eps=1e-5, remat_config=qwen3.RematConfig.BLOCK
    )
    return drawn(qwen3.Qwen3(config, rngs=nnx.Rngs(0)))


def make_gemma():
    config = gemma.ModelConfig(
        **SIZES,
        num_embed=13,
        final_logit_softcap=30.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=[gemma.AttentionType.LOCAL_SLIDING, gemma.AttentionType.GLOBAL],
        attn_logits_soft_cap=50.0,
        sliding_window_size=3,
    )
    return drawn(gemma.Gemma(config, rngs=nnx.Rngs(0)))


def make_gemma3():
    config = gemma3.ModelConfig(
        **SIZES, num_embed=13, sliding_window_size=3, remat_config=gemma3.RematConfig.DECODER, param_dtype=jnp.float32
    )
    return drawn(gemma3.Gemma3(config, rngs=nnx.Rngs(0)))


def make_gemma4():
    config = gemma4.ModelConfig(**SIZES, num_embed=13, sliding_window_size=3, global_key_size=4)
    return drawn(gemma4.Gemma4(config, rngs=nnx.Rngs(0)))


MODELS = (make_llama3, make_qwen2, make_qwen3, make_gemma, make_gemma3, make_gemma4)
