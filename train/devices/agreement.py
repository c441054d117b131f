"""Decisions of several processes compared: a freeze that differs would leave each waiting for the others for ever."""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

import smartfrz_jax as sfj

DIGEST_BYTES = 8


class Decided(NamedTuple):
    """What a process has decided.

    Attributes:
        frozen: Names of the layers that are frozen.
        coming: Names of those that will be, if that is another set.
        due: Steps done by then.
    """

    frozen: list[str]
    coming: list[str]
    due: int


def check_decisions(freezer: sfj.Freezer, *, every: int = 1) -> None:
    """Compares what the processes have frozen, and are about to, so that all stop before they run different programs.

    It is for the end of every step, and looks at one in ``every``. Where no decision takes effect less than that many
    steps later, each is compared once before it does: nothing is done in between that waits for the device.

    Args:
        freezer: That of this process, after its step. All processes must call this after the same steps.
        every: Steps from one comparison to the next; the freezer's lead.

    Raises:
        ValueError: On every process, if one has decided something else than the first; it names the layers.
    """
    if jax.process_count() == 1 or freezer.steps % max(1, every):
        return
    pending = freezer.pending
    decided = Decided(
        sorted(freezer.frozen.names),
        [] if pending is None else sorted(pending.frozen.names),
        0 if pending is None else pending.due,
    )
    text = json.dumps(decided).encode()
    digest = np.frombuffer(hashlib.sha256(text).digest()[:DIGEST_BYTES], np.uint32)
    digests = multihost_utils.process_allgather(digest)
    if (digests == digests[0]).all():
        return
    raise ValueError(_difference(freezer.steps, [Decided(*json.loads(one)) for one in _gather(text)]))


def _gather(text: bytes) -> list[bytes]:
    """The texts of all processes."""
    lengths = np.ravel(multihost_utils.process_allgather(np.array([len(text)], np.int32)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    texts: Any = multihost_utils.process_allgather(padded)
    return [bytes(one[:length]) for one, length in zip(np.asarray(texts), lengths, strict=True)]


def _difference(step: int, decided: list[Decided]) -> str:
    first = decided[0]
    number, other = next((number, one) for number, one in enumerate(decided) if one != first)
    return (
        f"policy: after step {step}, process 0 {_said(first, other)}, and process {number} {_said(other, first)}, "
        "expected one decision of all processes; start all with the same command, versions and data, and give policies "
        "of your own nothing that differs between processes, such as the time"
    )


def _said(decided: Decided, other: Decided) -> str:
    only = [name for name in decided.frozen if name not in other.frozen]
    if decided.frozen != other.frozen:
        return f"has frozen {_names(only)}"
    only = [name for name in decided.coming if name not in other.coming]
    return f"freezes {_names(only)} after step {decided.due}" if decided.due else "freezes nothing"


def _names(only: list[str]) -> str:
    more = f" and {len(only) - 5} more" if len(only) > 5 else ""
    return ", ".join(map(repr, only[:5])) + more if only else "nothing that the other has not"
