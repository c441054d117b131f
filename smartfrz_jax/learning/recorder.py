"""Records a network while it trains, to be an example for the predictor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from smartfrz_jax.layers.layers import Layers, check_layers, check_leaves
from smartfrz_jax.learning.recording import Recording, check_finite, check_steps
from smartfrz_jax.predictor.cka import layer_gram, layer_similarity
from smartfrz_jax.predictor.sampling import Tailoring
from smartfrz_jax.pytrees import checks, hosts
from smartfrz_jax.pytrees.types import PyTree

if TYPE_CHECKING:
    import jax


class Recorder:
    """Records tailored weights, losses and what the layers compute, every so many train steps.

    Two measures of when a layer could have been frozen come from the layers' outputs on a probe batch: CKA with a
    well-trained reference network, and CKA with the network's own end. The second needs no reference, but keeps
    ``examples * (examples + 1) / 2`` numbers a layer and record until :meth:`finish`: 8 KB for a probe of 64 examples.

    Example:
        >>> import jax.numpy as jnp
        >>> from smartfrz_jax.predictor import Tailoring
        >>> from smartfrz_jax import find_layers
        >>> params = {"a": {"kernel": jnp.eye(2)}}
        >>> layers = find_layers(params, lambda p, x: x @ p["a"]["kernel"], jnp.eye(2))
        >>> tailoring = Tailoring.create(layers, params, size=8)
        >>> recorder = Recorder(layers, tailoring, params, record_every=10, track_own=True)
        >>> recorder.record(10, params, {"a": jnp.eye(2)}, loss=0.7)
        >>> recorder.finish(20, seed=0).own_cka.tolist()
        [[1.0]]
    """

    def __init__(
        self,
        layers: Layers,
        tailoring: Tailoring,
        params: PyTree,
        *,
        record_every: int,
        reference_features: Mapping[str, jax.Array] | None = None,
        track_own: bool = False,
    ):
        """Starts with no records.

        Args:
            layers: The network's layers.
            tailoring: Their tailoring.
            params: The network's parameters before the first train step.
            record_every: Train steps between records.
            reference_features: Output of each layer of a well-trained network on the probe batch, by layer name;
                ``None`` measures no CKA with a reference.
            track_own: Whether to measure CKA with the network's own end.

        Raises:
            ValueError: If ``tailoring`` is for other layers, ``record_every`` is below 1, a weight is NaN or infinite,
                or a layer's reference output is missing.
        """
        check_layers(layers)
        checks.instance(
            tailoring, Tailoring, "tailoring", "a smartfrz_jax.predictor.Tailoring, from Tailoring.create(layers, ...)"
        )
        checks.count(record_every, "record_every")
        checks.flag(track_own, "track_own")
        check_leaves(params, "params")
        if tailoring.layers != layers:
            raise ValueError(
                f"tailoring: made for other layers ({len(tailoring.layers)} from {tailoring.layers.names[0]!r} on) "
                f"than layers ({len(layers)} from {layers.names[0]!r} on); make it with Tailoring.create(layers, ...)"
            )
        check_steps(np.array([0]), record_every)
        self.layers = layers
        self.tailoring = tailoring
        self.record_every = record_every
        self.track_own = track_own
        self.reference_features = (
            None if reference_features is None else _of_layers(layers, reference_features, "reference_features")
        )
        self._start = hosts.fetch(tailoring(params))
        check_finite(layers.names, [0], params=self._start[None])
        self._steps: list[int] = []
        self._weights: list[np.ndarray] = []
        self._losses: list[float] = []
        self._cka: list[np.ndarray] = []
        self._grams: list[np.ndarray] = []

    def record(
        self,
        step: int,
        params: PyTree,
        features: Mapping[str, jax.Array] | None = None,
        loss: float | jax.Array | None = None,
    ) -> None:
        """Adds a record.

        Args:
            step: Train steps done: a multiple of ``record_every``, and that many more than at the last record.
            params: The network's parameters after that step.
            features: Output of each of its layers on the probe batch, by layer name; others are ignored. May be left
                out if there is no reference and ``track_own`` is false.
            loss: Mean training loss over the last ``record_every`` steps; ``None`` if it is not known.

        Raises:
            ValueError: If ``step`` is another, a layer's output is missing or of another number of examples than
                before, or a loss, weight or CKA is NaN or infinite. Nothing is recorded then.
        """
        checks.scalar(step, "step", "an integer, the number of train steps done")
        check_steps(np.array([*self._steps[-1:], step]), self.record_every)
        check_leaves(params, "params")
        if loss is not None and not np.isfinite(checks.number(loss, "loss", "a number, or None if it is not known")):
            raise ValueError(
                f"loss: got {float(loss)} at step {step}, expected a finite number, or None if it is not known; if the "
                "training diverged, lower its learning rate"
            )
        weights = hosts.fetch(self.tailoring(params))
        cka, gram = self._measured(features)
        check_finite(
            self.layers.names,
            [step],
            weights=weights[None],
            cka=None if cka is None else cka[None],
            features=None if gram is None else gram[None],
        )
        if cka is not None:
            self._cka.append(cka)
        if gram is not None:
            self._grams.append(gram)
        self._steps.append(int(step))
        self._weights.append(weights)
        self._losses.append(np.nan if loss is None else float(loss))

    def _measured(self, features: Mapping[str, jax.Array] | None) -> tuple[np.ndarray | None, np.ndarray | None]:
        """CKA with the reference and the layers' Gram matrices, each if it is asked for."""
        if self.reference_features is None and not self.track_own:
            return None, None
        if features is None:
            raise ValueError(
                "features: got none, expected the output of each layer on the probe batch; or make the Recorder "
                "without reference_features and track_own"
            )
        outputs = _of_layers(self.layers, features, "features")
        cka = (
            None if self.reference_features is None else hosts.fetch(layer_similarity(outputs, self.reference_features))
        )
        gram = hosts.fetch(layer_gram(outputs)) if self.track_own else None
        if gram is not None and self._grams and gram.shape != self._grams[0].shape:
            raise ValueError("features: got another number of examples than before, expected the same probe batch")
        return cka, gram

    def finish(
        self,
        total_steps: int,
        *,
        swap_harm: np.ndarray | None = None,
        branch_harm: np.ndarray | None = None,
        **metadata: Any,
    ) -> Recording:
        """The records so far.

        Args:
            total_steps: Train steps of the whole run.
            swap_harm: What :func:`smartfrz_jax.learning.harm.swap_harm` gave for these records.
            branch_harm: What :func:`smartfrz_jax.learning.harm.branch_harm` gave for these records.
            **metadata: Anything that JSON can hold: architecture, data set, schedule, seed.

        Raises:
            ValueError: If nothing was recorded, or as :class:`Recording` does.
        """
        checks.count(total_steps, "total_steps", least=0)
        if not self._steps:
            raise ValueError(
                "finish: nothing was recorded; call record(step, params, features, loss) while the network trains"
            )
        first = self._losses[self._steps.index(self.record_every)] if self.record_every in self._steps else np.nan
        return Recording(
            layers=self.layers.names,
            steps=np.array(self._steps, np.int64),
            record_every=self.record_every,
            total_steps=total_steps,
            weights=np.stack(self._weights),
            start=self._start,
            losses=np.array(self._losses, np.float32),
            first_loss=first,
            cka=np.stack(self._cka) if self._cka else None,
            own_cka=_cka_with_the_last(self._grams) if self._grams else None,
            swap_harm=swap_harm,
            branch_harm=branch_harm,
            metadata=metadata,
        )


def _cka_with_the_last(grams: list[np.ndarray]) -> np.ndarray:
    return np.stack([np.sum(gram * grams[-1], axis=-1, dtype=np.float64) for gram in grams]).clip(0, 1)


def _of_layers(layers: Layers, features: Mapping[str, jax.Array], argument: str) -> dict[str, jax.Array]:
    """The outputs of the layers, in their order."""
    checks.by_name(features, argument, "a dict from layer names to outputs")
    missing = [name for name in layers.names if name not in features]
    if missing:
        raise ValueError(
            f"{argument}: lacks the output of {len(missing)} of {len(layers)} layers: {', '.join(map(repr, missing))}; "
            "smartfrz_jax.layer_outputs makes a function that gives them all"
        )
    return {name: features[name] for name in layers.names}
