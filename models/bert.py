"""BERT (Devlin et al. 2018, arXiv 1810.04805) with a head that classifies sentences.

BERT-base is :func:`bert_base`, the 6-layer MiniLM :func:`minilm`; module names follow those of Hugging Face's
``BertForSequenceClassification``, and :meth:`Bert.tensor_name` gives those of its files.
"""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.layers.checks import check_rate
from models.layers.post_norm import Layer, Linear, bert_norm
from models.layers.torch_names import torch_name
from models.layers.transformer import at_least_float32, make_dropout
from smartfrz_jax.nnx.scan import is_live, scan_blocks

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

_Embed = partial(nnx.Embed, embedding_init=nnx.initializers.normal(0.02))


class Embeddings(nnx.Module):
    """Sum of the embeddings of words, positions and token types.

    Attributes:
        frozen_params: Names of its frozen parameters; see :func:`smartfrz_jax.nnx.scan_blocks`.
    """

    def __init__(
        self,
        vocab_size: int,
        max_positions: int,
        type_vocab_size: int,
        dim: int,
        *,
        dropout: float,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        self.frozen_params: frozenset[str] = frozenset()
        self.word_embeddings = _Embed(vocab_size, dim, rngs=rngs, **dtypes)
        self.position_embeddings = _Embed(max_positions, dim, rngs=rngs, **dtypes)
        self.token_type_embeddings = _Embed(type_vocab_size, dim, rngs=rngs, **dtypes)
        self.LayerNorm = bert_norm(dim, rngs=rngs, **dtypes)
        self.dropout = make_dropout(dropout, rngs)

    def __call__(
        self, input_ids: Int[Array, "n tokens"], token_type_ids: Int[Array, "n tokens"]
    ) -> Float[Array, "n tokens dim"]:
        """Embeds the tokens."""
        positions = self.position_embeddings(jnp.arange(input_ids.shape[1], dtype=jnp.int32))
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids) + positions[None]
        return self.dropout(self.LayerNorm(x).astype(x.dtype))


class Encoder(nnx.Module):
    """The blocks; ``scan`` runs them as a scan."""

    def __init__(self, layers: list[Layer], *, scan: bool):
        self.layer = nnx.List(layers)
        self.scan = scan

    def __call__(
        self, x: Float[Array, "n tokens dim"], mask: Int[Array, "n tokens"] | None, *, live: bool = True
    ) -> Float[Array, "n tokens dim"]:
        """Applies one block after another.

        Args:
            x: Embedded tokens.
            mask: Tokens are attended to where it is not 0.
            live: Whether the gradient of ``x`` is wanted; see :func:`smartfrz_jax.nnx.scan_blocks`.
        """
        if self.scan:
            return scan_blocks(self.layer, x, mask, live=live)
        for layer in self.layer:
            x = layer(x, mask)
        return x


class Pooler(nnx.Module):
    """Linear layer and tanh on the first token."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs, **dtypes: Any):
        self.dense = Linear(dim, dim, rngs=rngs, **dtypes)

    def __call__(self, x: Float[Array, "n tokens dim"]) -> Float[Array, "n dim"]:
        """Pools the tokens."""
        return jnp.tanh(self.dense(x[:, 0]))


class Bert(nnx.Module):
    """BERT for the classification of sentences, or of pairs of sentences.

    As all NNX modules it is made in training mode; ``model.eval()`` turns dropout off.

    Args:
        vocab_size: Number of words.
        max_positions: Number of tokens of the longest input.
        type_vocab_size: Number of token types; 2 tells a second sentence from the first.
        dim: Width of the residual stream.
        depth: Number of blocks.
        heads: Attention heads per block.
        hidden: Hidden width of the MLPs.
        num_classes: Width of the head.
        pool: What is classified: ``"cls"``, the first token through the pooler; or ``"mean"``, the mean of the tokens,
            and no pooler, as in sentence transformers.
        dropout: Rate of dropout behind the embeddings, the attention and the MLPs, and before the head.
        attention_dropout: Rate of dropout on the attention weights.
        scan: Whether to run the blocks as a scan over their stacked weights, which compiles faster; see
            :func:`smartfrz_jax.nnx.scan_blocks`. It changes neither parameters nor results.
        dtype: Type to compute in, such as ``jnp.bfloat16``; ``param_dtype`` by default. Norms, softmax and head are
            in at least float32.
        param_dtype: Type of the parameters.
        rngs: Random streams for initialisation and dropout.

    Raises:
        ValueError: If the heads do not divide ``dim``, ``pool`` is unknown, or a rate is not one.

    Example:
        >>> def logits(ids, mask):
        ...     model = Bert(vocab_size=100, dim=16, depth=2, heads=2, hidden=32, rngs=nnx.Rngs(0))
        ...     return model(ids, mask)
        >>> nnx.eval_shape(logits, jnp.array([[2, 17, 3], [2, 3, 0]]), jnp.array([[1, 1, 1], [1, 1, 0]])).shape
        (2, 2)
    """

    def __init__(
        self,
        *,
        vocab_size: int = 30522,
        max_positions: int = 512,
        type_vocab_size: int = 2,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        hidden: int = 3072,
        num_classes: int = 2,
        pool: Literal["cls", "mean"] = "cls",
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        scan: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if dim % heads:
            raise ValueError(f"heads: got {heads}, expected a divisor of dim ({dim})")
        if pool not in ("cls", "mean"):
            raise ValueError(f"pool: got {pool!r}, expected 'cls' (the first token) or 'mean' (of all tokens)")
        check_rate(dropout, "dropout")
        check_rate(attention_dropout, "attention_dropout")
        dtype = param_dtype if dtype is None else dtype
        self.max_positions = max_positions
        self.pool = pool
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}  # of every layer
        self.embeddings = Embeddings(
            vocab_size, max_positions, type_vocab_size, dim, dropout=dropout, rngs=rngs, **dtypes
        )
        layers = [
            Layer(dim, heads, hidden, dropout=dropout, attention_dropout=attention_dropout, rngs=rngs, **dtypes)
            for _ in range(depth)
        ]
        self.encoder = Encoder(layers, scan=scan)
        if pool == "cls":
            self.pooler = Pooler(dim, rngs=rngs, **dtypes)
        self.dropout = make_dropout(dropout, rngs)
        self.classifier = Linear(dim, num_classes, dtype=at_least_float32(dtype), param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "n tokens"],
        attention_mask: Int[Array, "n tokens"] | None = None,
        token_type_ids: Int[Array, "n tokens"] | None = None,
    ) -> Float[Array, "n classes"]:
        """Logits of a batch of token sequences.

        Args:
            input_ids: Numbers of the words.
            attention_mask: 1 for tokens, 0 for padding, which then does not influence the result; all 1 by default.
            token_type_ids: 0 for the first sentence, 1 for the second; all 0 by default.

        Raises:
            ValueError: If there are more tokens than positions.
        """
        x = self.encode(input_ids, attention_mask, token_type_ids)
        if self.pool == "cls":
            pooled = self.pooler(x)
        elif attention_mask is None:
            pooled = x.mean(axis=1)
        else:
            weights = (attention_mask != 0).astype(x.dtype)[:, :, None]
            pooled = (x * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1)
        return self.classifier(self.dropout(pooled))

    def encode(
        self,
        input_ids: Int[Array, "n tokens"],
        attention_mask: Int[Array, "n tokens"] | None = None,
        token_type_ids: Int[Array, "n tokens"] | None = None,
    ) -> Float[Array, "n tokens dim"]:
        """Output of the last block, with arguments and errors as in a call of the network."""
        if input_ids.shape[1] > self.max_positions:
            raise ValueError(
                f"input_ids: got {input_ids.shape[1]} tokens, expected at most max_positions ({self.max_positions}); "
                "truncate them in the tokenizer"
            )
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        x = self.embeddings(input_ids, token_type_ids)
        return self.encoder(x, attention_mask, live=is_live(self.embeddings))

    @staticmethod
    def tensor_name(name: str) -> str:
        """Name in Hugging Face's files of a parameter, given its name here.

        Files of the bare encoder (``BertModel``) have the same names without ``bert.`` in front.

        Example:
            >>> Bert.tensor_name("encoder/layer/0/attention/self/query/kernel")
            'bert.encoder.layer.0.attention.self.query.weight'
            >>> Bert.tensor_name("embeddings/word_embeddings/embedding"), Bert.tensor_name("classifier/bias")
            ('bert.embeddings.word_embeddings.weight', 'classifier.bias')
        """
        tensor = re.sub(r"\bembedding$", "weight", torch_name(name))
        return tensor if tensor.startswith("classifier.") else f"bert.{tensor}"


def bert_base(**kwargs: Any) -> Bert:
    """BERT-base: 12 blocks, 768 wide, with 12 heads.

    Args:
        **kwargs: Arguments of :class:`Bert`, ``rngs`` among them; they go before those of BERT-base.

    Example:
        >>> model = nnx.eval_shape(lambda: bert_base(num_classes=3, rngs=nnx.Rngs(0)))
        >>> model.classifier.kernel.shape
        (768, 3)
    """
    return Bert(**dict[str, Any](dim=768, depth=12, heads=12, hidden=3072) | kwargs)


def minilm(**kwargs: Any) -> Bert:
    """MiniLM (Wang et al. 2020, arXiv 2002.10957): 6 blocks, 384 wide, with 12 heads.

    Args:
        **kwargs: Arguments of :class:`Bert`, ``rngs`` among them; they go before those of MiniLM.

    Example:
        >>> model = nnx.eval_shape(lambda: minilm(pool="mean", rngs=nnx.Rngs(0)))
        >>> model.classifier.kernel.shape
        (384, 2)
    """
    return Bert(**dict[str, Any](dim=384, depth=6, heads=12, hidden=1536) | kwargs)
