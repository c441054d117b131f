"""Which examples to hold out: whole runs, by what their metadata say, or whole layers.

Consecutive histories of a layer share all records but one, so examples are never held out by moments.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from smartfrz_jax.learning.examples import Examples, check_examples
from smartfrz_jax.pytrees import checks

if TYPE_CHECKING:
    from jaxtyping import Bool, Int


def by_run(examples: Examples, runs: Iterable[int]) -> Bool[np.ndarray, " n"]:
    """Mask of the examples that come from the given recordings.

    Args:
        examples: The examples.
        runs: Indices of recordings.

    Raises:
        ValueError: If there is no such recording.
    """
    check_examples(examples)
    checks.instance(runs, Iterable, "runs", "numbers of recordings, a sequence of integers")
    runs, known = list(dict.fromkeys(runs)), range(len(examples.recordings))
    for unknown in [run for run in runs if run not in known]:
        raise ValueError(f"runs: there is no recording {unknown}; the examples come from {len(known)}, counted from 0")
    return np.isin(examples.run, runs)


def by_metadata(examples: Examples, **fields: Any) -> Bool[np.ndarray, " n"]:
    """Mask of the examples from recordings whose metadata say all of this.

    Args:
        examples: The examples.
        **fields: A value by field of the metadata, such as ``architecture="vgg"``, or a list, set or tuple of values.

    Raises:
        ValueError: If a recording lacks such a field, or none has such a value.

    Example:
        >>> from smartfrz_jax.learning import Recording, make_examples
        >>> runs = [
        ...     Recording(
        ...         layers=("a",), steps=np.arange(6), record_every=1, total_steps=6, weights=np.ones((6, 1, 4)),
        ...         start=np.zeros((1, 4)), losses=np.ones(6), first_loss=1.0, cka=np.ones((6, 1)),
        ...         metadata={"architecture": architecture},
        ...     )
        ...     for architecture in ("vgg", "resnet")
        ... ]  # fmt: skip
        >>> by_metadata(make_examples(runs, window=3), architecture="resnet").tolist()
        [False, False, True, True]
    """
    check_examples(examples)
    mask = np.ones(len(examples), bool)
    for field, wanted in fields.items():
        wanted = list(wanted) if isinstance(wanted, list | set | tuple) else [wanted]
        values = metadata_values(examples, field)
        for unknown in [value for value in wanted if value not in values]:
            raise ValueError(
                f"{field}: no recording has {unknown!r}; they have {', '.join(map(repr, dict.fromkeys(values)))}"
            )
        mask &= np.isin(examples.run, [run for run, value in enumerate(values) if value in wanted])
    return mask


def metadata_values(examples: Examples, field: str) -> list[Any]:
    """What the metadata of each recording say in a field, for one split by each of them.

    Args:
        examples: The examples.
        field: The field.

    Raises:
        ValueError: If a recording lacks it.
    """
    for index, recording in enumerate(examples.recordings):
        if field not in recording.metadata:
            raise ValueError(
                f"{field}: recording {index} does not have it in its metadata; it has "
                f"{', '.join(map(repr, recording.metadata)) or 'none'}"
            )
    return [recording.metadata[field] for recording in examples.recordings]


def by_layer(examples: Examples, layers: Iterable[str]) -> Bool[np.ndarray, " n"]:
    """Mask of the examples of the given layers, in every recording that has them.

    Args:
        examples: The examples.
        layers: Layer names.

    Raises:
        ValueError: If no recording has such a layer.
    """
    check_examples(examples)
    wanted = set(checks.names(layers, "layers"))
    known = dict.fromkeys(name for names in examples.layers for name in names)
    for unknown in sorted(wanted - known.keys()):
        raise ValueError(f"layers: no recording has a layer {unknown!r}; they have {', '.join(map(repr, known))}")
    mask = np.zeros(len(examples), bool)
    for run, names in enumerate(examples.layers):
        chosen = [index for index, name in enumerate(names) if name in wanted]
        mask |= (examples.run == run) & np.isin(examples.layer, chosen)
    return mask


def moments(examples: Examples) -> Int[np.ndarray, " n"]:
    """A number for each moment of each run, the same for all its layers: ``evaluate(..., groups=moments(examples))``.

    Args:
        examples: The examples.
    """
    check_examples(examples)
    return np.unique(np.stack([examples.run, examples.moment]), axis=1, return_inverse=True)[1].ravel()
