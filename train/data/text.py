"""A text set, encoded once and held in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from train.data.batch import Batch, Data
from train.data.order import Order
from train.data.source import Split
from train.data.wordpiece import WordPiece

_MULTIPLE = 8  # lengths that hardware likes


class Sentences(Data):
    """Texts or pairs of texts as tokens; inputs are ``input_ids``, ``attention_mask`` and ``token_type_ids``.

    Attributes:
        labels: int32 of shape ``(examples,)``.
        lengths: The lengths that batches are padded to, in ascending order.
        num_classes: Number of classes.

    Args:
        split: An open split.
        batch_size: Examples in a batch.
        tokenizer: Makes tokens of the texts, and cuts what is too long.
        seed: Of order and dropout keys.
        lengths: A batch is padded to the shortest of these that holds it. Each is one more shape to compile for, with
            every frozen set; by default there is only one, the longest example rounded up to a multiple of 8.
        drop_last: Whether the last partial batch of a training epoch is left out; see ``Order``.
        mesh: The devices that share a batch; see ``Data``.

    Raises:
        ValueError: If the split does not hold texts, or an example is longer than ``lengths`` allow.

    Example:
        >>> data = Sentences(open_split("glue/cola", data_dir=folder), 32, WordPiece("vocab.txt"))  # doctest: +SKIP
        >>> [array.shape for array in data.batch(0).inputs]  # doctest: +SKIP
        [(32, 48), (32, 48), (32, 48)]
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        tokenizer: WordPiece,
        *,
        seed: int = 0,
        lengths: Sequence[int] | None = None,
        drop_last: bool = True,
        mesh: Mesh | None = None,
    ):
        if split.kind != "text":
            raise ValueError(f"split: {split.name} holds images, expected texts; take open_images")
        super().__init__(Order(len(split), batch_size, seed, drop_last), split.num_classes, mesh)
        records = split.fetch(range(len(split)))
        tokens = tokenizer(*records.inputs)
        self.labels = records.labels
        self._tokens_of = tokens.attention_mask.sum(axis=1)
        longest = tokens.input_ids.shape[1]
        self.lengths = tuple(sorted(set(lengths or [-(-longest // _MULTIPLE) * _MULTIPLE])))
        if self.lengths[-1] < longest or self.lengths[0] < 1:
            raise ValueError(
                f"lengths: got {list(self.lengths)}, expected the largest to hold the longest example of {split.name}, "
                f"{longest} tokens; add a length, or give the tokenizer a smaller max_length"
            )
        padding = ((0, 0), (0, self.lengths[-1] - longest))
        self._inputs = (
            np.pad(tokens.input_ids, padding, constant_values=tokenizer.pad),
            np.pad(tokens.attention_mask, padding),
            np.pad(tokens.token_type_ids, padding),
        )

    def batch(self, step: int) -> Batch:
        """The training batch of a step, counted from 0 over all epochs."""
        return self._gather(*self._order(step))

    def evaluation_batch(self, step: int) -> Batch:
        """A batch of the examples in the order of the split; the last one is filled up with weight 0."""
        return self._gather(*self._in_order(step))

    def _gather(self, indices: np.ndarray, weights: np.ndarray) -> Batch:
        longest = self._tokens_of[indices].max()
        length = next(length for length in self.lengths if length >= longest)
        rows = self._share.rows
        inputs = tuple(array[indices[rows], :length] for array in self._inputs)
        return Batch(*self._share.put((inputs, self.labels[indices[rows]], weights[rows])))
