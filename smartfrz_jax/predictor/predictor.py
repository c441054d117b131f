"""The attention predictor of SmartFRZ (paper, section 3.3 and appendix C), and its checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from smartfrz_jax.predictor.context import FLAGGED, context_names
from smartfrz_jax.predictor.encoded import Encoded, encode
from smartfrz_jax.predictor.encoding import PAPER, Encoding
from smartfrz_jax.predictor.observation import Observation
from smartfrz_jax.pytrees import checkpoint, checks, hosts, paths
from smartfrz_jax.pytrees.file_paths import PathLike

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_KIND = "predictor"
_VERSION = 2  # of the checkpoint and of what the encodings mean
_BOUND = 5.0  # of numbers of the context, in standard deviations of the training examples

Pretrained = Literal["default", "paper"]

# Fields of configs that older checkpoints have, and what there is still of them.
_FORMER = (("pooling", "attention"), ("quantiles", None))
_PRETRAINED = Path(__file__).parent / "pretrained"


@dataclasses.dataclass(frozen=True)
class PredictorConfig:
    """Shape of a predictor, and what it reads; the sizes are the paper's (appendix C).

    Attributes:
        size: Tailored weights per record.
        hidden: Width of the two hidden layers of the key, query and value MLPs.
        features: Width of keys, queries and values.
        head_hidden: Width of the two hidden layers of the classifier.
        encoding: What it reads of an observation; :data:`~smartfrz_jax.predictor.encoding.PAPER` is the paper's.
    """

    size: int = 1024
    hidden: int = 256
    features: int = 64
    head_hidden: int = 32
    encoding: Encoding = dataclasses.field(default_factory=Encoding)

    def __post_init__(self) -> None:
        for name in ("size", "hidden", "features", "head_hidden"):
            checks.count(getattr(self, name), name)
        checks.instance(self.encoding, Encoding, "encoding", "a smartfrz_jax.predictor.Encoding")
        self.encoding.width(self.size)


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


class Statistic(nnx.Variable):
    """What ``fit`` measures of its examples, to bring inputs to a common scale; not trained."""


class Predictor(nnx.Module):
    """Attention over a layer's recent weights: is it ready to be frozen?

    Each record W_j gives a key, a query and a value (Eq. 1); the newest record's query scores the keys, softmax over
    the window (Eq. 2); the values' weighted mean (Eq. 3) goes through a classifier (Eq. 4).

    In the paper a record is its weights. Here ``config.encoding`` says in which form they are read, and with which
    context; ``Predictor(paper=True, rngs=...)`` is the paper's.

    Example:
        >>> predictor = Predictor(PredictorConfig(size=8), rngs=nnx.Rngs(0))
        >>> unknown = jnp.float32(jnp.nan)
        >>> seen = Observation(
        ...     records=jnp.ones((30, 8)), mask=jnp.ones(30, bool), start=jnp.zeros(8), elapsed=jnp.float32(30),
        ...     losses=jnp.full(30, unknown), first_loss=unknown, progress=unknown, depth=jnp.float32(0.5),
        ...     contribution=unknown,
        ... )  # fmt: skip
        >>> predictor(seen).shape
        (2,)
    """

    def __init__(self, config: PredictorConfig | None = None, *, paper: bool = False, rngs: nnx.Rngs):
        """Draws the weights.

        Args:
            config: Shape and inputs; ``None`` is the default.
            paper: Whether to make the paper's predictor: raw weights, no context, the sizes of appendix C.
            rngs: Random keys.

        Raises:
            TypeError: If one of them is of another type.
            ValueError: If both ``config`` and ``paper`` are given.
        """
        _check_config(config)
        checks.flag(paper, "paper")
        checks.instance(rngs, nnx.Rngs, "rngs", "an nnx.Rngs, such as nnx.Rngs(0)")
        if paper and config is not None:
            raise ValueError(
                "config: got one and paper=True; pass PredictorConfig(encoding=PAPER, ...) for other sizes"
            )
        config = config or PredictorConfig(encoding=PAPER if paper else Encoding())
        encoding, width = config.encoding, config.encoding.width(config.size)
        names = context_names(encoding)
        context = len(names) + sum(name in FLAGGED for name in names)
        self.config = config
        inner = (config.hidden, config.hidden, config.features)
        if width:
            encoder = (width + (context if encoding.context_in != "classifier" else 0), *inner)
            self.key = MLP(encoder, rngs=rngs)
            self.query = MLP(encoder, rngs=rngs)
            self.value = MLP(encoder, rngs=rngs)
        pooled = (config.features if width else 0) + (context if encoding.context_in != "records" or not width else 0)
        self.classifier = MLP((pooled, config.head_hidden, config.head_hidden, 2), rngs=rngs)
        if names:
            self.context_mean, self.context_std = Statistic(jnp.zeros(len(names))), Statistic(jnp.ones(len(names)))

    def __call__(self, observation: Observation | Encoded) -> Float[Array, "2"]:
        """Logits of (keep training, freeze) for one layer.

        Args:
            observation: What is known of the layer; it may be in the form already that ``config.encoding`` says. Where
                its mask is false, whatever stands there has no influence.
        """
        checks.instance(observation, Observation | Encoded, "observation", "a smartfrz_jax.predictor.Observation")
        encoding = self.config.encoding
        encoded = observation if isinstance(observation, Encoded) else encode(encoding, observation)
        context = self._context(encoded)
        if encoding.weights == "none":
            return self.classifier(context)
        records = encoded.records
        if encoding.context_in != "classifier":
            beside = jnp.broadcast_to(context[None], (len(records), len(context)))
            records = jnp.concatenate([records, beside], axis=1)
        pooled = self._pool(records, encoded.mask)
        return self.classifier(jnp.concatenate([pooled, context]) if encoding.context_in != "records" else pooled)

    def _pool(self, records: jax.Array, mask: jax.Array) -> jax.Array:
        keys, values, query = self.key(records), self.value(records), self.query(records[-1])
        scores = jnp.where(mask, keys @ query, -jnp.inf)
        # With no record at all the softmax would be NaN; such a layer's answer is not used, but it must not raise.
        attention = jax.nn.softmax(jnp.where(mask.any(), scores, 0.0))
        return attention @ values

    def _context(self, encoded: Encoded) -> jax.Array:
        """Standardised, bounded, zero (the mean) where unknown; then which of :data:`FLAGGED` are unknown."""
        names = context_names(self.config.encoding)
        if not names:
            return jnp.zeros(0)
        known = encoded.known
        standard = jnp.clip((encoded.context - self.context_mean[...]) / self.context_std[...], -_BOUND, _BOUND)
        flags = [~known[index] for index, name in enumerate(names) if name in FLAGGED]
        return jnp.concatenate([jnp.where(known, standard, 0.0), jnp.array(flags, jnp.float32)])

    def save(self, path: PathLike, *, overwrite: bool = False) -> None:
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
            {
                "version": _VERSION,
                "config": dataclasses.asdict(self.config),
                "context": list(context_names(self.config.encoding)),
            },
            overwrite=overwrite,
        )

    @classmethod
    def restore(cls, path: PathLike, *, config: PredictorConfig | None = None) -> Predictor:
        """Reads a predictor that :meth:`save` wrote. Of several processes all must call it.

        Args:
            path: Directory of the checkpoint.
            config: What the caller needs; ``None`` takes what the checkpoint has.

        Raises:
            FileNotFoundError: If there is no such directory.
            ValueError: If it is not a complete predictor checkpoint of this version, or not of ``config``.
        """
        _check_config(config)
        saved = _saved_config(path)
        if config is not None and saved.encoding != config.encoding:
            raise ValueError(
                f"config: has {config.encoding} for encoding, but the predictor in {path} was trained with "
                f"{saved.encoding}; leave config out to take the checkpoint's"
            )
        graphdef, state = nnx.split(nnx.eval_shape(lambda: cls(config or saved, rngs=nnx.Rngs(0))))
        arrays = checkpoint.read(path, nnx.to_pure_dict(state), _KIND)
        nnx.replace_by_pure_dict(state, arrays)
        return nnx.merge(graphdef, state)

    @classmethod
    def pretrained(cls, name: Pretrained = "default") -> Predictor:
        """A predictor that comes with the library; ``smartfrz_jax/predictor/pretrained/README.md`` is its model card.

        Of several processes all must call it.

        Args:
            name: ``"default"``, the one to use, or ``"paper"``, on raw weights and trained as the paper says.

        Raises:
            ValueError: If there is no predictor of that name.

        Example:
            >>> Predictor.pretrained("paper").config == PredictorConfig(encoding=PAPER)
            True
        """
        checks.choice(name, "name", get_args(Pretrained))
        return cls.restore(_PRETRAINED / name)


def _saved_config(path: PathLike) -> PredictorConfig:
    metadata = checkpoint.read_metadata(path, _KIND)
    if metadata.get("version") != _VERSION:
        raise ValueError(
            f"path: the predictor in {path} has version {metadata.get('version', 1)}, expected {_VERSION}, since what "
            "predictors read has changed; fit it again, or read it with the smartfrz_jax that saved it"
        )
    try:
        fields = _known(metadata["config"])
        fields["encoding"] = Encoding(**_known(fields["encoding"]))
        config = PredictorConfig(**fields)
        context = tuple(metadata["context"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"path: the predictor in {path} has no usable config ({type(error).__name__}: {error} in {metadata}); "
            "restore one that Predictor.save wrote"
        ) from error
    if context != context_names(config.encoding):
        raise ValueError(
            f"path: the predictor in {path} was trained on the context {context}, expected "
            f"{context_names(config.encoding)}; fit it again, or read it with the smartfrz_jax that saved it"
        )
    return config


def _known(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a saved config without those that older versions wrote, at the only value that there still is."""
    return {name: value for name, value in fields.items() if (name, value) not in _FORMER}


def check_predictor(predictor: Any) -> None:
    """Raises ``TypeError`` unless it is a :class:`Predictor`."""
    checks.instance(predictor, Predictor, "predictor", "a smartfrz_jax.Predictor, such as Predictor.pretrained()")


def check_trained(predictor: Any) -> None:
    """Raises ``TypeError`` unless it is a :class:`Predictor`, ``ValueError`` unless its weights are finite."""
    check_predictor(predictor)
    weights = paths.flatten(hosts.fetch(nnx.as_pure(nnx.state(predictor))))
    checks.finite(weights, "predictor", "fit it again, or restore another one")


def _check_config(config: Any) -> None:
    if config is not None:
        checks.instance(config, PredictorConfig, "config", "a smartfrz_jax.predictor.PredictorConfig")


def _check_observation(observation: Any, config: PredictorConfig) -> None:
    """Raises unless it is what is known of some layers, with as many weights as a predictor reads."""
    checks.instance(observation, Observation | Encoded, "observation", "a smartfrz_jax.predictor.Observation")
    shape = np.shape(observation.mask)
    if len(shape) != 2:
        raise ValueError(
            f"observation: got a mask of shape {shape}, expected (layers, window): a leading axis of layers, in each "
            "of its arrays"
        )
    size = np.shape(observation.records)[-1]
    if isinstance(observation, Observation) and config.encoding.reads_weights and size != config.size:
        raise ValueError(
            f"observation: got records of {size} weights, expected {config.size}, for which the predictor was made"
        )


def freeze_probability(predictor: Predictor, observation: Observation | Encoded) -> Float[Array, " layers"]:
    """Confidence that each layer can be frozen (softmax of Eq. 4), all layers in one compiled call.

    Args:
        predictor: The predictor.
        observation: What is known of every layer; each of its arrays has a leading axis of layers.

    Returns:
        Probabilities, shape ``(layers,)``; meaningless for a layer without records.

    Raises:
        TypeError: If one of them is something else.
        ValueError: If the arrays lack the axis of layers, or the records have another number of weights.
    """
    check_predictor(predictor)
    _check_observation(observation, predictor.config)
    return _probability(*nnx.split(predictor), observation)


# Not nnx.jit, which writes the arrays back: under a mesh they would then belong to it, and the predictor to no other.
@functools.partial(jax.jit, static_argnums=0)
def _probability(graphdef: nnx.GraphDef[Predictor], state: nnx.State, observation: Observation | Encoded) -> jax.Array:
    return jax.nn.softmax(jax.vmap(nnx.merge(graphdef, state))(observation), axis=-1)[:, 1]
