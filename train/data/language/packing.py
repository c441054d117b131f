"""Texts packed into sequences of one length: what is read, which text it belongs to, and what comes next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jax.sharding import Mesh

from train.data.batch import Batch, Data
from train.data.order import Order

if TYPE_CHECKING:
    from jaxtyping import Int

IGNORED = -1  # the label of a token from which nothing is learned
_OPEN = 64  # sequences that may still have room


class Packed(NamedTuple):
    """Sequences, int32 of shape ``(sequences, length)`` each.

    Attributes:
        input_ids: Numbers of the tokens.
        segment_ids: Equal for the tokens of one text, counted from 1 in each sequence; 0 at padding.
        labels: The token that comes next; ``IGNORED`` at padding, and before the tokens of a prompt.
    """

    input_ids: Int[np.ndarray, "n length"]
    segment_ids: Int[np.ndarray, "n length"]
    labels: Int[np.ndarray, "n length"]


def pack(texts: Sequence[np.ndarray], length: int, separator: int, *, prompts: Sequence[int] | None = None) -> Packed:
    """Packs texts into as few sequences as come about by putting each into the first of the last that has room for it.

    A text is read with the separator before it, so that its first token is predicted, too; and the separator behind it
    is predicted. Every token, and the end of every text, is therefore a label once. A text that is longer than
    ``length`` is cut into pieces, each of which is read from the token before its first label on.

    Args:
        texts: Tokens of each, int32.
        length: Tokens of a sequence.
        separator: The token between texts.
        prompts: Tokens at the beginning of each text that are read but not learned; none by default.

    Example:
        >>> packed = pack([np.array([5, 6]), np.array([7])], 6, separator=0)
        >>> packed.input_ids.tolist(), packed.labels.tolist(), packed.segment_ids.tolist()
        ([[0, 5, 6, 0, 7, 0]], [[5, 6, 0, 7, 0, -1]], [[1, 1, 1, 2, 2, 0]])
    """
    sequences: list[list[tuple[np.ndarray, np.ndarray]]] = []
    room: list[int] = []
    for text, prompt in zip(texts, prompts or [0] * len(texts), strict=True):
        read, following = np.insert(text, 0, separator), np.append(text, separator)
        following[:prompt] = IGNORED
        for start in range(0, len(read), length):
            piece = read[start : start + length], following[start : start + length]
            first = max(0, len(room) - _OPEN)
            at = next((i for i in range(first, len(room)) if room[i] >= len(piece[0])), len(room))
            if at == len(room):
                sequences.append([])
                room.append(length)
            sequences[at].append(piece)
            room[at] -= len(piece[0])
    shape = len(sequences), length
    packed = Packed(np.full(shape, separator, np.int32), np.zeros(shape, np.int32), np.full(shape, IGNORED, np.int32))
    for row, pieces in enumerate(sequences):
        end = 0
        for number, (read, following) in enumerate(pieces, start=1):
            where = row, slice(end, end + len(read))
            packed.input_ids[where], packed.segment_ids[where], packed.labels[where] = read, number, following
            end += len(read)
    return packed


class PackedTexts(Data):
    """Packed sequences in batches; inputs are ``input_ids`` and ``segment_ids``, labels the tokens that come next.

    Attributes:
        num_classes: Number of tokens of the vocabulary.
        labelled: Number of tokens that are predicted.

    Args:
        packed: The sequences.
        batch_size: Sequences in a batch.
        vocab_size: Number of tokens of the vocabulary.
        seed: Of the order.
        drop_last: Whether the last partial batch of a training epoch is left out; see ``Order``.
        mesh: The devices that share a batch; see ``Data``.

    Raises:
        ValueError: If there are fewer sequences than ``drop_last`` needs, or nothing is to be predicted.

    Example:
        >>> packed = pack([np.array([5, 6])] * 8, 6, separator=0)
        >>> data = PackedTexts(packed, 2, vocab_size=10)
        >>> data.steps_per_epoch, data.labelled, data.batch(0).labels.shape
        (2, 24, (2, 6))
    """

    def __init__(
        self,
        packed: Packed,
        batch_size: int,
        *,
        vocab_size: int,
        seed: int = 0,
        drop_last: bool = True,
        mesh: Mesh | None = None,
    ):
        self.labelled = int((packed.labels != IGNORED).sum())
        if not self.labelled:
            raise ValueError("packed: got no token to predict, expected texts that are not prompts alone")
        super().__init__(Order(len(packed.labels), batch_size, seed, drop_last), vocab_size, mesh)
        self._packed = packed

    def batch(self, step: int) -> Batch:
        """The training batch of a step, counted from 0 over all epochs."""
        return self._gather(*self._order(step))

    def evaluation_batch(self, step: int) -> Batch:
        """A batch of the sequences in order; the last one is filled up with weight 0."""
        return self._gather(*self._in_order(step))

    def _gather(self, indices: np.ndarray, weights: np.ndarray) -> Batch:
        rows = self._share.rows
        input_ids, segment_ids, labels = (array[indices[rows]] for array in self._packed)
        return Batch(*self._share.put(((input_ids, segment_ids), labels, weights[rows])))
