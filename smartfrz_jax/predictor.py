"""The attention predictor of SmartFRZ (paper, section 3.3 and appendix C), and its checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from smartfrz_jax import checkpoint

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

_KIND = "predictor"


@dataclasses.dataclass(frozen=True)
class PredictorConfig:
    """Sizes of a predictor; the defaults are the paper's (appendix C).

    Attributes:
        size: Tailored weights per record.
        hidden: Width of the two hidden layers of the key, query and value MLPs.
        features: Width of keys, queries and values.
        head_hidden: Width of the two hidden layers of the classifier.
    """

    size: int = 1024
    hidden: int = 256
    features: int = 64
    head_hidden: int = 32

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name}: got {getattr(self, field.name)}, expected at least 1")


class MLP(nnx.Module):
    """Three linear layers with ReLU between them (the paper does not name the activation)."""

    def __init__(self, sizes: tuple[int, int, int, int], *, rngs: nnx.Rngs):
        init = nnx.initializers.he_normal()
        self.layers = nnx.List([nnx.Linear(a, b, kernel_init=init, rngs=rngs) for a, b in itertools.pairwise(sizes)])

    def __call__(self, x: Float[Array, "... d_in"]) -> Float[Array, "... d_out"]:
        """Applies the layers to the last axis."""
        *hidden, last = self.layers
        for layer in hidden:
            x = nnx.relu(layer(x))
        return last(x)


class Predictor(nnx.Module):
    """Attention over a layer's recent weights: is it ready to be frozen?

    Each record W_j gives a key, a query and a value (Eq. 1); the newest record's query scores the keys, softmax over
    the window (Eq. 2); the values' weighted mean (Eq. 3) goes through a classifier (Eq. 4).

    Example:
        >>> predictor = Predictor(PredictorConfig(size=8), rngs=nnx.Rngs(0))
        >>> predictor(jnp.ones((30, 8)), jnp.ones(30, bool)).shape
        (2,)
    """

    def __init__(self, config: PredictorConfig | None = None, *, rngs: nnx.Rngs):
        config = config or PredictorConfig()
        encoder = (config.size, config.hidden, config.hidden, config.features)
        self.config = config
        self.key = MLP(encoder, rngs=rngs)
        self.query = MLP(encoder, rngs=rngs)
        self.value = MLP(encoder, rngs=rngs)
        self.classifier = MLP((config.features, config.head_hidden, config.head_hidden, 2), rngs=rngs)

    def __call__(self, records: Float[Array, "window size"], mask: Bool[Array, " window"]) -> Float[Array, "2"]:
        """Logits of (keep training, freeze) for one layer.

        Args:
            records: Tailored weights, oldest first, the newest last.
            mask: False where there is no record; whatever stands there has no influence. The newest must exist.
        """
        records = jnp.where(mask[:, None], records, 0.0)  # else a NaN there would pass through attention of zero
        keys, values = self.key(records), self.value(records)
        query = self.query(records[-1])
        scores = jnp.where(mask, keys @ query, -jnp.inf)
        # With no record at all the softmax would be NaN; such a layer's answer is not used, but it must not raise.
        attention = jax.nn.softmax(jnp.where(mask.any(), scores, 0.0))
        return self.classifier(attention @ values)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Writes the weights and the configuration as an Orbax checkpoint.

        Args:
            path: Directory to make.
            overwrite: Whether to replace what is there.

        Raises:
            FileExistsError: If ``path`` exists and ``overwrite`` is false.
        """
        checkpoint.write(
            path,
            nnx.to_pure_dict(nnx.state(self)),
            _KIND,
            {"config": dataclasses.asdict(self.config)},
            overwrite=overwrite,
        )

    @classmethod
    def restore(cls, path: str | Path, *, config: PredictorConfig | None = None) -> Predictor:
        """Reads a predictor that :meth:`save` wrote.

        Args:
            path: Directory of the checkpoint.
            config: The sizes that the caller needs; ``None`` takes those of the checkpoint.

        Raises:
            FileNotFoundError: If there is no such directory.
            ValueError: If it is not a complete predictor checkpoint, or its shapes are not those of ``config``.
        """
        metadata = checkpoint.read_metadata(path, _KIND)
        try:
            sizes = PredictorConfig(**metadata["config"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"path: the predictor in {path} has no usable config ({type(error).__name__}: {error} in {metadata}); "
                "restore one that Predictor.save wrote"
            ) from error
        graphdef, state = nnx.split(nnx.eval_shape(lambda: cls(config or sizes, rngs=nnx.Rngs(0))))
        nnx.replace_by_pure_dict(state, checkpoint.read(path, nnx.to_pure_dict(state), _KIND))
        return nnx.merge(graphdef, state)


def freeze_probability(
    predictor: Predictor, records: Float[Array, "layers window size"], mask: Bool[Array, "layers window"]
) -> Float[Array, " layers"]:
    """Confidence that each layer can be frozen (softmax of Eq. 4), all layers in one compiled call.

    Args:
        predictor: The predictor.
        records: Tailored weights of every layer, oldest first, shape ``(layers, window, size)``.
        mask: Which records exist, shape ``(layers, window)``.

    Returns:
        Probabilities, shape ``(layers,)``; meaningless for a layer without records.
    """
    return _probability(*nnx.split(predictor), records, mask)


# Not nnx.jit, which writes the arrays back: under a mesh they would then belong to it, and the predictor to no other.
@functools.partial(jax.jit, static_argnums=0)
def _probability(graphdef: nnx.GraphDef[Predictor], state: nnx.State, records: jax.Array, mask: jax.Array) -> jax.Array:
    return jax.nn.softmax(jax.vmap(nnx.merge(graphdef, state))(records, mask), axis=-1)[:, 1]
