"""Training the predictor offline, on examples from recordings (paper, section 3.4).

What to hold out of the examples, :mod:`smartfrz_jax.learning.splits` says.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from smartfrz_jax.learning.evaluation import Evaluation, evaluate
from smartfrz_jax.learning.examples import Examples, Hiding, check_examples
from smartfrz_jax.learning.inputs import EncodedExamples, standardized
from smartfrz_jax.learning.splits import moments
from smartfrz_jax.predictor.encoded import Encoded
from smartfrz_jax.predictor.observation import Observation
from smartfrz_jax.predictor.predictor import Predictor, check_predictor, freeze_probability
from smartfrz_jax.pytrees import checks
from smartfrz_jax.pytrees.types import PyTree

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

ClassWeights = Literal["balanced"] | tuple[float, float] | np.ndarray | None


class Fit(NamedTuple):
    """A trained predictor and how it got there.

    Attributes:
        predictor: The predictor after the last epoch.
        losses: Mean weighted loss over the training examples in each epoch, as training went on, shape ``(epochs,)``.
        evaluations: Figures on the held-out examples after each epoch; empty if none are held out.
    """

    predictor: Predictor
    losses: Float[np.ndarray, " epochs"]
    evaluations: tuple[Evaluation, ...]


@dataclasses.dataclass(frozen=True)
class SGD:
    """How a predictor is trained: SGD with momentum, its learning rate annealed by a cosine (paper, section 4.1).

    Attributes:
        epochs: Times that every training example is seen.
        learning_rate: Learning rate at the start.
        batch_size: Examples of a step; 32 in the paper.
        momentum: Momentum.
        weight_decay: The loss has half of it times the squared norm of the kernels; biases are left alone.

    Raises:
        TypeError: If one of them is no number.
        ValueError: If one is out of range.

    Example:
        >>> SGD(epochs=3, learning_rate=0.01)
        SGD(epochs=3, learning_rate=0.01, batch_size=32, momentum=0.9, weight_decay=0.0)
    """

    epochs: int
    learning_rate: float
    batch_size: int = 32
    momentum: float = 0.9
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        checks.count(self.epochs, "epochs")
        checks.count(self.batch_size, "batch_size")
        checks.positive(self.learning_rate, "learning_rate")
        expected = "a number from 0 up to, but not, 1"
        if not 0 <= checks.number(self.momentum, "momentum", expected) < 1:
            raise ValueError(f"momentum: got {self.momentum}, expected {expected}")
        expected = "a number from 0 up"
        if not 0 <= checks.number(self.weight_decay, "weight_decay", expected) < math.inf:
            raise ValueError(f"weight_decay: got {self.weight_decay}, expected {expected}")

    def rates(self, examples: int) -> Float[np.ndarray, " steps"]:
        """The learning rate of every step.

        Args:
            examples: Number of training examples.
        """
        steps = self.epochs * math.ceil(examples / self.batch_size)
        schedule = optax.cosine_decay_schedule(self.learning_rate, steps)
        return np.asarray(schedule(np.arange(steps, dtype=np.float32)))


def fit(
    predictor: Predictor,
    examples: Examples,
    sgd: SGD,
    *,
    held_out: Bool[np.ndarray, " n"] | None,
    class_weights: ClassWeights = "balanced",
    hiding: Hiding | None = None,
    seed: int = 0,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> Fit:
    """Trains a predictor on softmax cross entropy.

    Before, the inputs are brought to a common scale over the training examples, unless they are the paper's; the
    predictor keeps that scale. Every epoch goes once over all training examples in a new order. The same seed gives the
    same bits.

    Args:
        predictor: The predictor to start from; it is not changed.
        examples: The examples; faster if they are encoded already (:func:`~smartfrz_jax.learning.encode_examples`).
        sgd: How long, and with which learning rate.
        held_out: True for examples to evaluate on and not to train on, shape ``(n,)``; see :func:`by_run`,
            :func:`by_metadata` and :func:`by_layer`. ``None`` trains on all.
        class_weights: Factors of the loss of examples to keep and to freeze. ``"balanced"`` gives both classes the same
            total weight, ``None`` is ``(1, 1)``.
        hiding: What is hidden from the predictor at random as it learns, so that it works without; never when it is
            evaluated. Default nothing.
        seed: Seed of the order of examples and of what is hidden.
        progress: Wraps the iterable of epochs, such as ``tqdm.tqdm``.

    Returns:
        The trained predictor, the losses and the evaluations.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If the examples' encoding is not the predictor's, it reads weights that have another size or that
            their recordings do not hold, something is to be hidden from encoded examples, all training examples have
            the same target, ``held_out`` does not fit or divides the histories of one layer in one run, a number is out
            of range, or the loss becomes NaN or infinite.

    Example:
        >>> from smartfrz_jax.predictor import PredictorConfig
        >>> from smartfrz_jax.learning import Recording, by_run, make_examples
        >>> run = Recording(
        ...     layers=("a",), steps=np.arange(8), record_every=1, total_steps=8, weights=np.ones((8, 1, 4)),
        ...     start=np.zeros((1, 4)), losses=np.ones(8), first_loss=1.0, cka=np.ones((8, 1)),
        ... )  # fmt: skip
        >>> examples = make_examples([run, run], window=3, min_records=1)
        >>> predictor = Predictor(PredictorConfig(size=4), rngs=nnx.Rngs(0))
        >>> result = fit(predictor, examples, SGD(epochs=3, learning_rate=0.01), held_out=by_run(examples, [1]))
        >>> [evaluation.n for evaluation in result.evaluations]
        [8, 8, 8]
    """
    _check_fits(predictor, examples)
    checks.instance(sgd, SGD, "sgd", "a smartfrz_jax.learning.SGD, such as SGD(epochs=3, learning_rate=0.01)")
    checks.seed(seed)
    _check_options(hiding, progress, examples)
    training, testing = _split(examples, held_out)
    weights = class_factors(training.target, class_weights)
    rates = iter(sgd.rates(len(training)))
    rng, hiding_rng = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    graphdef, params, statistics = nnx.split(standardized(predictor, training), nnx.Param, ...)
    opt_state = optax.sgd(sgd.learning_rate, sgd.momentum).init(params)
    losses, evaluations, decay = [], [], np.float32(sgd.weight_decay)
    for epoch in (progress or iter)(range(sgd.epochs)):
        batch_losses, order = [], rng.permutation(len(training))
        for batch, share in _batches(training, order, sgd.batch_size, weights, hiding, hiding_rng):
            state = params, statistics, opt_state
            params, opt_state, loss = _step(graphdef, *state, batch, next(rates), decay, momentum=sgd.momentum)
            batch_losses.append(loss * share)
        losses.append(float(np.sum(jax.device_get(batch_losses))))
        if not np.isfinite(losses[-1]):
            raise ValueError(
                f"learning_rate: the loss became {losses[-1]} in epoch {epoch} with {sgd.learning_rate}; "
                "choose a lower one"
            )
        if len(testing):
            probability = predict(nnx.merge(graphdef, params, statistics), testing)
            evaluations.append(evaluate(probability, testing.target, groups=moments(testing)))
    return Fit(nnx.merge(graphdef, params, statistics), np.array(losses), tuple(evaluations))


def _check_options(hiding: Any, progress: Any, examples: Examples) -> None:
    if hiding is not None:
        checks.instance(hiding, Hiding, "hiding", "a smartfrz_jax.learning.Hiding, or None to hide nothing")
    if progress is not None:
        checks.function(progress, "progress", "a function of an iterable to an iterable, such as tqdm.tqdm")
    if hiding is not None and isinstance(examples, EncodedExamples):
        raise ValueError("hiding: the examples are encoded; hide as they are, encode_examples(..., hiding=hiding)")


def _batches(
    training: Examples,
    order: np.ndarray,
    batch_size: int,
    weights: np.ndarray,
    hiding: Hiding | None,
    rng: np.random.Generator,
) -> Iterator[tuple[tuple[Observation | Encoded, np.ndarray, np.ndarray], float]]:
    """Batches of an epoch, the last one filled up, each with its share of the examples."""
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        padded = np.pad(chosen, (0, batch_size - len(chosen)), mode="edge")
        observation, target = training.batch(padded)
        if hiding is not None and not isinstance(observation, Encoded):
            observation = hiding(observation, rng)
        factor = np.where(np.arange(batch_size) < len(chosen), weights[target.astype(int)], 0) / len(chosen)
        yield (observation, target, factor.astype(np.float32)), len(chosen) / len(order)


def predict(predictor: Predictor, examples: Examples, *, batch_size: int = 256) -> Float[np.ndarray, " n"]:
    """Freeze probabilities of all examples.

    Args:
        predictor: The predictor.
        examples: The examples.
        batch_size: Examples per compiled call.

    Returns:
        float32 of shape ``(n,)``.

    Raises:
        ValueError: If the examples' encoding is not the predictor's, it reads weights that have another size or that
            their recordings do not hold, or ``batch_size`` is below 1.
    """
    _check_fits(predictor, examples)
    checks.count(batch_size, "batch_size")
    probability = np.zeros(len(examples), np.float32)
    for start in range(0, len(examples), batch_size):
        chosen = np.arange(start, min(start + batch_size, len(examples)))
        observation, _ = examples.batch(np.pad(chosen, (0, batch_size - len(chosen)), mode="edge"))
        probability[chosen] = freeze_probability(predictor, observation)[: len(chosen)]
    return probability


@functools.partial(jax.jit, static_argnames=("graphdef", "momentum"))
def _step(
    graphdef: nnx.GraphDef[Predictor],
    params: PyTree,
    statistics: PyTree,
    opt_state: PyTree,
    batch: tuple[Observation | Encoded, np.ndarray, np.ndarray],
    learning_rate: jax.Array,
    weight_decay: jax.Array,
    *,
    momentum: float,
) -> tuple[PyTree, PyTree, jax.Array]:
    observation, target, factor = batch

    def loss_fn(params: PyTree) -> jax.Array:
        logits = jax.vmap(nnx.merge(graphdef, params, statistics))(observation)
        return jnp.sum(factor * optax.softmax_cross_entropy_with_integer_labels(logits, target.astype(jnp.int32)))

    loss, grads = jax.value_and_grad(loss_fn)(params)
    grads = jax.tree.map(lambda grad, param: grad + weight_decay * param if param.ndim > 1 else grad, grads, params)
    updates, opt_state = optax.sgd(learning_rate, momentum).update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


def _split(examples: Examples, held_out: np.ndarray | None) -> tuple[Examples, Examples]:
    if held_out is None:
        return examples, examples.select(np.zeros(len(examples), bool))
    held_out = np.asarray(held_out)
    if held_out.shape != (len(examples),) or held_out.dtype != bool:
        raise ValueError(
            f"held_out: got {held_out.dtype} of shape {held_out.shape}, expected bool of shape ({len(examples)},); "
            "make it with by_run(examples, runs) or by_layer(examples, layers)"
        )
    if held_out.all() or not held_out.any():
        raise ValueError(
            f"held_out: selects {int(held_out.sum())} of {len(examples)} examples, expected some but not all; "
            "pass None to train on all"
        )
    histories = np.stack([examples.run, examples.layer], axis=1)
    for run, layer in set(map(tuple, histories[held_out].tolist())) & set(map(tuple, histories[~held_out].tolist())):
        raise ValueError(
            f"held_out: divides the examples of layer {examples.layers[run][layer]!r} in recording {run}, whose "
            "histories overlap, so the evaluation would be on training data; make it with by_run(examples, runs) or "
            "by_layer(examples, layers)"
        )
    return examples.select(~held_out), examples.select(held_out)


def class_factors(target: np.ndarray, class_weights: ClassWeights) -> np.ndarray:
    """Factors of the loss, shape ``(2,)``: of keep, of freeze; see :func:`fit`."""
    counts = np.bincount(target, minlength=2)
    if not counts.all():
        raise ValueError(
            f"examples: the targets of all {len(target)} training examples are {'freeze' if counts[1] else 'keep'}; "
            "record runs to their end and from their start, or change the criterion, for example "
            "make_examples(recordings, criterion=Settled('cka', tolerance=0.05))"
        )
    is_text = isinstance(class_weights, str)
    if is_text and class_weights == "balanced":
        return len(target) / (2 * counts)
    expected = "'balanced', None or two numbers above 0, for keep and for freeze"
    weights = (1.0, 1.0) if class_weights is None else class_weights
    checks.instance(weights, Sequence | np.ndarray, "class_weights", expected)
    if (
        is_text
        or len(weights) != 2
        or not all(0 < checks.number(w, "class_weights", expected) < math.inf for w in weights)
    ):
        raise ValueError(f"class_weights: got {class_weights!r}, expected {expected}")
    return np.array(weights, np.float64)


def _check_fits(predictor: Predictor, examples: Examples) -> None:
    check_predictor(predictor)
    check_examples(examples)
    if isinstance(examples, EncodedExamples):
        examples.check(predictor.config.encoding)
    examples.check_reads(predictor.config.encoding)
    if predictor.config.encoding.reads_weights and predictor.config.size != examples.size:
        raise ValueError(
            f"examples: have {examples.size} tailored weights per record, but the predictor takes "
            f"{predictor.config.size}; use PredictorConfig(size={examples.size}) or tailor to {predictor.config.size}"
        )
