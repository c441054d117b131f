"""Decoders in the form of Llama (Touvron et al. 2023, arXiv 2302.13971), of which SmolLM2 is a small one.

SmolLM2-135M is :func:`smollm2_135m`; module names follow those of Hugging Face's ``LlamaForCausalLM``, and
:meth:`Llama.tensor_name` gives those of its files.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.layers.decoder import DecoderLayer, causal_mask, linear, rms_norm, rotary_angles
from models.layers.torch_names import torch_name
from models.layers.transformer import at_least_float32
from smartfrz_jax.nnx.scan import is_live, scan_blocks

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


class Embedding(nnx.Module):
    """Embeddings of tokens, which a tied network reads a second time, as its head.

    Attributes:
        frozen_params: Names of its frozen parameters; see :func:`smartfrz_jax.nnx.scan_blocks`.
    """

    def __init__(
        self, vocab_size: int, dim: int, *, init_std: float, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.frozen_params: frozenset[str] = frozenset()
        self.dtype = dtype
        init = nnx.initializers.normal(init_std)
        self.embedding = nnx.Param(init(rngs.params(), (vocab_size, dim), param_dtype))

    def __call__(self, input_ids: Int[Array, "n tokens"]) -> Float[Array, "n tokens dim"]:
        """Embeds the tokens."""
        return jnp.take(self.embedding[...], input_ids, axis=0).astype(self.dtype)

    def logits(self, x: Float[Array, "n tokens dim"]) -> Float[Array, "n tokens vocab"]:
        """Product with every embedding, in at least float32."""
        table = self.embedding[...].astype(self.dtype)
        out = at_least_float32(self.dtype)
        return jnp.einsum("ntd,vd->ntv", x.astype(self.dtype), table, preferred_element_type=out)


class Llama(nnx.Module):
    """A decoder that gives the logits of the next token at every position.

    It has no dropout and no statistics, so that training and evaluation mode are the same.

    Attributes:
        same_tensors: Tensors that files of tied networks do not have, with those that they equal there.

    Args:
        vocab_size: Number of tokens.
        dim: Width of the residual stream.
        depth: Number of blocks.
        heads: Heads of queries per block.
        kv_heads: Heads of keys and values per block, each shared by a group of queries; ``heads`` by default.
        hidden: Hidden width of the MLPs.
        rope_theta: Base of the wavelengths of the rotary positions.
        epsilon: Of the norms.
        tied: Whether the head is the embedding. The lookup of tokens freezes apart from the head then if the layers are
            found with ``lookups=True``. The head of an untied network starts as the embedding where a file of a tied
            one is loaded.
        init_std: Standard deviation of the weights at the start.
        scan: Whether to run the blocks as a scan over their stacked weights, which compiles faster; see
            :func:`smartfrz_jax.nnx.scan_blocks`. It changes neither parameters nor results.
        dtype: Type to compute in, such as ``jnp.bfloat16``; ``param_dtype`` by default. Norms, rotations, softmax and
            the sums of the logits are in at least float32.
        param_dtype: Type of the parameters.
        rngs: Random streams for initialisation.

    Raises:
        ValueError: If the heads do not divide ``dim`` into even widths, or ``kv_heads`` does not divide ``heads``.

    Example:
        >>> def logits(ids):
        ...     model = Llama(vocab_size=100, dim=16, depth=2, heads=4, kv_heads=2, hidden=32, rngs=nnx.Rngs(0))
        ...     return model(ids)
        >>> nnx.eval_shape(logits, jnp.array([[2, 17, 3], [2, 3, 0]])).shape
        (2, 3, 100)
    """

    same_tensors: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(
        self,
        *,
        vocab_size: int = 32000,
        dim: int = 4096,
        depth: int = 32,
        heads: int = 32,
        kv_heads: int | None = None,
        hidden: int = 11008,
        rope_theta: float = 10000.0,
        epsilon: float = 1e-5,
        tied: bool = False,
        init_std: float = 0.02,
        scan: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kv_heads = heads if kv_heads is None else kv_heads
        if dim % heads or dim // heads % 2:
            raise ValueError(f"heads: got {heads}, expected a divisor of dim ({dim}) into heads of even width")
        if heads % kv_heads:
            raise ValueError(f"kv_heads: got {kv_heads}, expected a divisor of heads ({heads})")
        dtype = param_dtype if dtype is None else dtype
        self.head_width = dim // heads
        self.rope_theta = rope_theta
        self.scan = scan
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}  # of every layer
        drawn: dict[str, Any] = {"init_std": init_std, "rngs": rngs, **dtypes}
        self.embed_tokens = Embedding(vocab_size, dim, **drawn)
        self.layers = nnx.List(
            [DecoderLayer(dim, heads, kv_heads, hidden, epsilon=epsilon, **drawn) for _ in range(depth)]
        )
        self.norm = rms_norm(dim, epsilon=epsilon, rngs=rngs, **dtypes)
        self.tied = tied
        if not tied:
            out = at_least_float32(dtype)
            self.lm_head = linear(**drawn, preferred_element_type=out)(dim, vocab_size)

    def __call__(
        self, input_ids: Int[Array, "n tokens"], segment_ids: Int[Array, "n tokens"] | None = None
    ) -> Float[Array, "n tokens vocab"]:
        """Logits of the token that comes next, at every position.

        Args:
            input_ids: Numbers of the tokens.
            segment_ids: Equal for the tokens of one text, where several are packed into a sequence; a token attends to
                none of another text. Positions go on from one text to the next, as rotations tell distances only.
        """
        x = self.encode(input_ids, segment_ids)
        return self.embed_tokens.logits(x) if self.tied else self.lm_head(x)

    def encode(
        self, input_ids: Int[Array, "n tokens"], segment_ids: Int[Array, "n tokens"] | None = None
    ) -> Float[Array, "n tokens dim"]:
        """Output of the last norm, with arguments as in a call of the network."""
        tokens = input_ids.shape[1]
        x = self.embed_tokens(input_ids)
        shared = causal_mask(tokens, segment_ids), rotary_angles(tokens, self.head_width, self.rope_theta, x.dtype)
        if self.scan:
            x = scan_blocks(self.layers, x, *shared, live=is_live(self.embed_tokens))
        else:
            for layer in self.layers:
                x = layer(x, *shared)
        return self.norm(x)

    @staticmethod
    def tensor_name(name: str) -> str:
        """Name in Hugging Face's files of a parameter, given its name here.

        Example:
            >>> Llama.tensor_name("layers/3/self_attn/q_proj/kernel"), Llama.tensor_name("norm/scale")
            ('model.layers.3.self_attn.q_proj.weight', 'model.norm.weight')
            >>> Llama.tensor_name("embed_tokens/embedding"), Llama.tensor_name("lm_head/kernel")
            ('model.embed_tokens.weight', 'lm_head.weight')
        """
        tensor = re.sub(r"\bembedding$", "weight", torch_name(name))
        return tensor if tensor.startswith("lm_head.") else f"model.{tensor}"


def smollm2_135m(**kwargs: Any) -> Llama:
    """SmolLM2-135M (Ben Allal et al. 2025, arXiv 2502.02737): 30 blocks, 576 wide, with 9 heads on 3, tied.

    Args:
        **kwargs: Arguments of :class:`Llama`, ``rngs`` among them; they go before those of SmolLM2-135M.

    Example:
        >>> model = nnx.eval_shape(lambda: smollm2_135m(rngs=nnx.Rngs(0)))
        >>> len(model.layers), model.embed_tokens.embedding.shape
        (30, (49152, 576))
    """
    sizes = {"vocab_size": 49152, "dim": 576, "depth": 30, "heads": 9, "kv_heads": 3, "hidden": 1536}
    others = {"rope_theta": 100000.0, "epsilon": 1e-5, "tied": True, "init_std": 576**-0.5}
    return Llama(**dict[str, Any](**sizes, **others) | kwargs)
