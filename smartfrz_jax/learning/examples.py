"""The predictor's training examples: what it would have seen of recorded runs, and what it should have said."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from smartfrz_jax.learning.recording import Recording
from smartfrz_jax.learning.targets import Criterion, Settled
from smartfrz_jax.predictor import probe
from smartfrz_jax.predictor.encoding import WITHOUT_WEIGHTS, Encoding
from smartfrz_jax.predictor.observation import Observation
from smartfrz_jax.pytrees import checks

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from smartfrz_jax.predictor.encoded import Encoded


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Training examples: what is seen of one layer at a moment, and whether to freeze it then.

    Histories overlap, so they are not stored but gathered from the recordings, by :meth:`batch`.

    Attributes:
        recordings: The recordings.
        supervision: The criterion behind the targets, in words.
        window: Records in a history.
        run: Which recording, int32 of shape ``(n,)``.
        layer: Which of its layers, int32 of shape ``(n,)``.
        moment: Which of its records is the newest of the history, int32 of shape ``(n,)``.
        target: True for *freeze*, shape ``(n,)``.
        progress: Train steps done at that moment as a share of the whole run, float32 of shape ``(n,)``.
        depth: Place of the layer, 0 for the first, 1 for the last, float32 of shape ``(n,)``.
    """

    recordings: tuple[Recording, ...]
    supervision: str
    window: int
    run: Int[np.ndarray, " n"]
    layer: Int[np.ndarray, " n"]
    moment: Int[np.ndarray, " n"]
    target: Bool[np.ndarray, " n"]
    progress: Float[np.ndarray, " n"]
    depth: Float[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.target)

    @property
    def layers(self) -> tuple[tuple[str, ...], ...]:
        """Layer names of each recording."""
        return tuple(recording.layers for recording in self.recordings)

    @functools.cached_property
    def contributions(self) -> dict[int, np.ndarray]:
        """What a policy would have known of contributions at every record, of recordings that have any.

        By run, each of shape ``(records, layers)``.
        """
        measured = {run: recording.contribution for run, recording in enumerate(self.recordings)}
        return {run: probe.latest(probe.by_policy(array)) for run, array in measured.items() if array is not None}

    @property
    def has_weights(self) -> bool:
        """Whether the recordings hold weights."""
        return self.recordings[0].weights.shape[2] > 0

    @property
    def size(self) -> int:
        """Tailored weights per record; 1, always zero, if the recordings hold none."""
        return max(1, self.recordings[0].weights.shape[2])

    def check_reads(self, encoding: Encoding) -> None:
        """Checks that the recordings hold what an encoding reads.

        Args:
            encoding: The encoding.

        Raises:
            ValueError: If it reads weights, and they hold none.
        """
        checks.instance(encoding, Encoding, "encoding", "a smartfrz_jax.predictor.Encoding")
        if encoding.reads_weights and not self.has_weights:
            raise ValueError(
                f"examples: come from recordings without weights, but weights are read by {encoding}; record the runs "
                "with their weights, or choose Encoding('none') with a regime that needs none: "
                f"{', '.join(WITHOUT_WEIGHTS)}"
            )

    def batch(self, indices: Int[np.ndarray, " batch"]) -> tuple[Observation | Encoded, Bool[np.ndarray, " batch"]]:
        """Some of the examples, as a policy would see them while the network trains.

        Args:
            indices: Which examples.

        Returns:
            The observations, NumPy arrays with a leading batch axis, and the targets.
        """
        indices = self._indices(indices, "indices")
        moment, layer = self.moment[indices], self.layer[indices]
        place = moment[:, None] - np.arange(self.window - 1, -1, -1)
        mask = place >= 0
        records = np.zeros((*place.shape, self.size), np.float32)
        start = np.zeros((len(indices), self.size), np.float32)
        losses = np.full(place.shape, np.nan, np.float32)
        elapsed, first_loss = np.zeros((2, len(indices)), np.float32)
        contributed = np.full(len(indices), np.nan, np.float32)
        for run in np.unique(self.run[indices]):
            recording = self.recordings[run]
            here = np.flatnonzero(self.run[indices] == run)
            if self.has_weights:
                records[here] = recording.weights[np.maximum(place[here], 0), layer[here, None]]
                start[here] = recording.start[layer[here]]
            losses[here] = recording.losses[np.maximum(place[here], 0)]
            elapsed[here] = recording.steps[moment[here]] / recording.record_every
            first_loss[here] = recording.first_loss
            if run in self.contributions:
                contributed[here] = self.contributions[run][moment[here], layer[here]]
        records[~mask] = 0
        losses[~mask] = np.nan
        arrays: dict[str, Any] = {
            "records": records,
            "mask": mask,
            "start": start,
            "elapsed": elapsed,
            "losses": losses,
            "first_loss": first_loss,
            "progress": self.progress[indices],
            "depth": self.depth[indices],
            "contribution": contributed,
        }
        return Observation(**arrays), self.target[indices]

    def _indices(self, indices: Any, argument: str) -> np.ndarray:
        found = np.asarray(indices)
        if found.dtype.kind not in "iu" and found.size:
            raise TypeError(f"{argument}: got {found.dtype}{list(found.shape)}, expected integers, numbers of examples")
        if found.size and not -len(self) <= found.min() <= found.max() < len(self):
            raise ValueError(
                f"{argument}: got {found.min()} to {found.max()}, expected 0 to {len(self) - 1}: there are "
                f"{len(self)} examples"
            )
        return found.astype(np.int64)

    def select(self, chosen: np.ndarray) -> Self:
        """The examples at some indices, or at which a boolean array of shape ``(n,)`` is true; same recordings."""
        fields = ("run", "layer", "moment", "target", "progress", "depth")
        chosen = np.asarray(chosen)
        if chosen.dtype != bool:
            chosen = self._indices(chosen, "chosen")
        elif chosen.shape != (len(self),):
            raise ValueError(f"chosen: got bool of shape {chosen.shape}, expected ({len(self)},), one for each example")
        return dataclasses.replace(self, **{field: getattr(self, field)[chosen] for field in fields})


def check_examples(examples: Any) -> None:
    """Raises ``TypeError`` unless they are :class:`Examples`."""
    checks.instance(
        examples, Examples, "examples", "smartfrz_jax.learning.Examples; make them with make_examples(recordings)"
    )


@dataclasses.dataclass(frozen=True)
class Hiding:
    """Shares of the examples from which something is hidden, drawn anew at every step of ``fit``.

    Attributes:
        progress: Share whose progress is unknown, as in a run of unknown length.
        losses: Share whose losses are unknown.
        contribution: Share whose contributions are unknown.
        records: Share whose history is cut to a random number of its newest records, as where a policy records less.
        min_records: Least number of records that are left, if there are as many.

    Example:
        >>> Hiding(progress=0.3, records=0.5)
        Hiding(progress=0.3, losses=0.0, contribution=0.0, records=0.5, min_records=5)
    """

    progress: float = 0.0
    losses: float = 0.0
    contribution: float = 0.0
    records: float = 0.0
    min_records: int = 5

    def __post_init__(self) -> None:
        for name in ("progress", "losses", "contribution", "records"):
            checks.between(getattr(self, name), name, "a share of the examples, from 0 to 1", 0, 1)
        checks.count(self.min_records, "min_records")

    def __call__(self, observation: Observation, rng: np.random.Generator) -> Observation:
        """The observations of a batch without what is hidden.

        Args:
            observation: NumPy arrays with a leading batch axis; they are not changed.
            rng: Source of the draws; as many for every batch of a size, whatever the shares.
        """
        checks.instance(observation, Observation, "observation", "a smartfrz_jax.predictor.Observation")
        checks.instance(rng, np.random.Generator, "rng", "a generator, such as numpy.random.default_rng(0)")
        mask = np.asarray(observation.mask)
        # The last row is not read: the draws are those with which the shipped predictors were fitted.
        no_progress, no_losses, cut, left, no_contribution, _ = rng.random((6, len(mask)))
        records = mask.sum(axis=1)
        least = np.minimum(self.min_records, records)
        kept = np.where(cut < self.records, least + (left * (records - least + 1)).astype(int), records)
        newer = np.cumsum(mask[:, ::-1], axis=1)[:, ::-1]  # this record and those after it
        mask = mask & (newer <= kept[:, None])
        lost = no_losses < self.losses
        return observation.replace(
            records=np.where(mask[:, :, None], observation.records, np.float32(0)),
            mask=mask,
            losses=np.where(mask & ~lost[:, None], observation.losses, np.float32("nan")),
            first_loss=np.where(lost, np.float32("nan"), observation.first_loss),
            progress=np.where(no_progress < self.progress, np.float32("nan"), observation.progress),
            contribution=np.where(no_contribution < self.contribution, np.float32("nan"), observation.contribution),
        )


def make_examples(
    recordings: Sequence[Recording],
    *,
    window: int = 30,
    min_records: int = 5,
    criterion: Criterion | None = None,
    stride: int = 1,
) -> Examples:
    """Training examples of every layer at every moment of some recordings.

    Args:
        recordings: The recordings, all tailored to the same size.
        window: Records in a history; 30 in the paper.
        min_records: Records that there must be before there is an example. A predictor may be asked from then on.
        criterion: When a layer should have been frozen: a function of a recording to bool of shape
            ``(records, layers)``, true for *freeze*, such as :class:`~smartfrz_jax.learning.Harmless`. Default
            ``Settled("cka")``, the paper's.
        stride: Distance of moments in records.

    Returns:
        The examples, by recording, moment and layer.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is below 1, there are no recordings or moments, sizes differ, a recording lacks what the
            criterion asks for, or the criterion's result does not fit.

    Example:
        >>> recording = Recording(
        ...     layers=("a",), steps=np.arange(6), record_every=1, total_steps=10, weights=np.ones((6, 1, 4)),
        ...     start=np.zeros((1, 4)), losses=np.ones(6), first_loss=1.0, cka=np.ones((6, 1)),
        ... )
        >>> make_examples([recording], window=3, min_records=2).target.tolist()
        [False, False, False, True, True]
    """
    for argument, value in (("window", window), ("min_records", min_records), ("stride", stride)):
        checks.count(value, argument)
    if criterion is not None:
        checks.function(criterion, "criterion", "a function of a Recording to an array of bool, such as Settled()")
    expected = "a sequence of smartfrz_jax.learning.Recording"
    checks.instance(recordings, Sequence, "recordings", expected)
    for recording in recordings:
        checks.instance(recording, Recording, "recordings", expected)
    sizes = sorted({recording.weights.shape[2] for recording in recordings})
    if len(sizes) != 1:
        raise ValueError(
            f"recordings: got {len(recordings)} of tailored sizes {sizes}, expected at least one, all of one size"
        )
    criterion = criterion or Settled()
    run, layer, moment, target, progress, depth = [], [], [], [], [], []
    for index, recording in enumerate(recordings):
        freeze = _targets(criterion, recording, index)
        layers = len(recording.layers)
        moments, which = np.meshgrid(
            np.arange(min_records - 1, len(recording.steps), stride), np.arange(layers), indexing="ij"
        )
        moments, which = moments.ravel(), which.ravel()
        run.append(np.full(len(which), index))
        layer.append(which)
        moment.append(moments)
        target.append(freeze[moments, which])
        progress.append(recording.steps[moments] / max(recording.total_steps, 1))
        depth.append(which / max(layers - 1, 1))
    if not any(map(len, target)):
        longest = max(len(recording.steps) for recording in recordings)
        raise ValueError(f"min_records: got {min_records}, but no recording has more than {longest} records")
    return Examples(
        recordings=tuple(recordings),
        supervision=getattr(criterion, "__name__", None) or repr(criterion),
        window=window,
        run=np.concatenate(run).astype(np.int32),
        layer=np.concatenate(layer).astype(np.int32),
        moment=np.concatenate(moment).astype(np.int32),
        target=np.concatenate(target),
        progress=np.concatenate(progress).astype(np.float32),
        depth=np.concatenate(depth).astype(np.float32),
    )


def _targets(criterion: Criterion, recording: Recording, index: int) -> np.ndarray:
    """Freeze (true) or keep for every record and layer."""
    try:
        freeze = np.asarray(criterion(recording))
    except ValueError as error:
        raise ValueError(f"recordings: number {index} ({recording.metadata}): {error}") from error
    shape = recording.weights.shape[:2]
    if freeze.shape != shape or freeze.dtype != bool:
        raise ValueError(
            f"criterion: gave {freeze.dtype} of shape {freeze.shape} for recording {index}, "
            f"expected bool of shape {shape}"
        )
    return freeze
