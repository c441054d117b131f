"""A split of a prepared TFDS set, for image or text classification: random access, without TensorFlow."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from smartfrz_jax.pytrees.file_paths import Path, as_path
from train.data import directory, grey_levels

# Pairs whose order is not that of their names.
_ORDERED_PAIRS = (("premise", "hypothesis"), ("title", "description"))


class Records(NamedTuple):
    """Some examples.

    Attributes:
        inputs: One list for each input: images, uint8 of shape ``(height, width, channels)``, of which those of 16 bits
            are rescaled, or strings.
        labels: int32 of shape ``(examples,)``.
    """

    inputs: tuple[list[Any], ...]
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Split:
    """A split of a prepared set; can be pickled, so that worker processes can read it.

    Attributes:
        name: Full name of the set, such as ``glue/mrpc/2.0.0``.
        split: Split as it was asked for, such as ``train[:500]``.
        folder: Directory of the set.
        kind: ``image`` or ``text``.
        inputs: Names of the input features: one image, or one or two texts.
        label: Name of the label feature; empty where labels are not read.
        label_names: Names of the classes.
        image_shape: Height, width and channels; None where the images differ. Of text sets: empty.
        parts: Where the examples are: files, each with the first example and the one behind the last.
        source: The TFDS data source.
    """

    name: str
    split: str
    folder: str
    kind: Literal["image", "text"]
    inputs: tuple[str, ...]
    label: str
    label_names: tuple[str, ...]
    image_shape: tuple[int | None, ...]
    parts: tuple[tuple[str, int, int], ...] = dataclasses.field(repr=False)
    source: Any = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.label_names)

    def overlap(self, other: Split) -> int:
        """Number of examples that are in another split, too."""
        return sum(
            max(0, min(stop, other_stop) - max(start, other_start))
            for file, start, stop in self.parts
            for other_file, other_start, other_stop in other.parts
            if file == other_file
        )

    def fetch(self, indices: Sequence[int] | np.ndarray) -> Records:
        """Reads and decodes examples.

        Args:
            indices: Their numbers within the split.

        Raises:
            ValueError: If a record cannot be read, or a label is not a class of the set.
            IndexError: If an index is not in the split.
        """
        indices = [int(i) for i in indices]
        for i in indices:
            if not 0 <= i < len(self):
                raise IndexError(
                    f"indices: got {i}, expected 0 to {len(self) - 1} in split {self.split!r} of {self.name}"
                )
        try:
            rows = self.source.__getitems__(indices)
            inputs = tuple([self._decoded(field, row[field]) for row in rows] for field in self.inputs)
        except Exception as error:
            raise self._unreadable(indices, error) from error
        if not self.label:
            return Records(inputs, np.zeros(len(rows), np.int32))
        labels = np.array([row[self.label] for row in rows], np.int64)
        wrong = np.flatnonzero((labels < 0) | (labels >= self.num_classes))
        if wrong.size:
            raise ValueError(
                f"{self._example(indices[wrong[0]])} has {self.label} {labels[wrong[0]]}, expected 0 to "
                f"{self.num_classes - 1}; take a split with labels (-1 is a hidden one, as in the test splits of "
                "GLUE), or prepare the set again"
            )
        return Records(inputs, labels.astype(np.int32))

    def _decoded(self, field: str, value: Any) -> Any:
        if self.kind == "text":
            return value.decode("utf-8")
        return grey_levels.decode(self.source.dataset_info.features[field], value)

    def _example(self, index: int) -> str:
        return f"example {index} of split {self.split!r} of {self.name} in {self.folder}"

    def _unreadable(self, indices: list[int], error: Exception) -> ValueError:
        """The error again, with the name of the first example that has it."""
        for i in indices:
            try:
                row = self.source.__getitems__([i])[0]
                for field in self.inputs:
                    self._decoded(field, row[field])
            except Exception as alone:
                error, first = alone, i
                break
        else:
            first = indices[0]
        return ValueError(
            f"{self._example(first)} cannot be read: {type(error).__name__}: {error}; expected an intact record; "
            "copy the files again from where they came from, or prepare the set again"
        )


def open_split(
    name: str,
    split: str = "train",
    data_dir: str | os.PathLike[str] | None = None,
    *,
    sentences: Sequence[str] | None = None,
    label: str | None = None,
    labelled: bool = True,
) -> Split:
    """Opens a split of a set that TFDS prepared as array_record files.

    Args:
        name: Name of the set, such as ``cifar10``, ``imagenet2012``, ``glue/mrpc``; with a version if wanted.
        split: A split or a part of one, in the notation of TFDS: ``train``, ``train[:500]``, ``train[90%:]``.
        data_dir: Data directory of TFDS; its default one if None.
        sentences: The text features to read, in this order; if None the one or two that the set has, by name, or as
            is usual (premise before hypothesis).
        label: The label feature; ``label`` or else the only class label of the set if None.
        labelled: Whether labels are read. Otherwise any set of images or texts opens, and all labels are 0.

    Raises:
        FileNotFoundError: If the directory, the set or one of its files is not there.
        ValueError: If the split is not there, the files have another format, images are neither uint8 nor uint16, or
            the features do not say what is input and what is label.
        ModuleNotFoundError: If TFDS is not installed.

    Example:
        >>> train = open_split("cifar10", "train[:500]", data_dir)  # doctest: +SKIP
        >>> len(train), train.num_classes, train.image_shape  # doctest: +SKIP
        (500, 10, (32, 32, 3))
    """
    folder = directory.find(name, data_dir)
    builder = _builder(folder)
    import tensorflow_datasets as tfds

    info = builder.info
    file_format = info.file_format.value if info.file_format else None
    if file_format != "array_record":
        raise ValueError(
            f"name: {info.full_name} in {folder} is stored as {file_format}, expected array_record, which can be read "
            "at random; prepare it again with tfds build --file_format=array_record, or convert it with "
            "tfds convert_format --out_file_format=array_record"
        )
    try:
        instructions = info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        lengths = {one: info.splits[one].num_examples for one in info.splits}
        raise ValueError(
            f"split: got {split!r} of {info.full_name}, expected one of {lengths} (examples), or a part of one such as "
            f"'train[:500]' or 'train[90%:]'; TFDS says: {error}"
        ) from error
    parts = tuple((str(one.filename), one.skip, one.skip + one.take) for one in instructions)
    for file, _, _ in parts:
        if not as_path(file).exists():
            raise FileNotFoundError(
                f"{file}, a file of split {split!r} of {info.full_name}, is missing; copy it from where the set came "
                "from, or prepare the set again"
            )
    kind, inputs, image_shape = _inputs(info, sentences)
    label = _label(info, label) if labelled else ""
    label_names = tuple(info.features[label].names) if labelled else ()
    encoded = {field: tfds.decode.SkipDecoding() for field in inputs} if kind == "image" else None
    return Split(
        info.full_name, split, str(folder), kind, inputs, label, label_names, image_shape,
        parts, builder.as_data_source(split=split, decoders=encoded),
    )  # fmt: skip


def evaluation_split(name: str, data_dir: str | os.PathLike[str] | None = None) -> str:
    """The split that a set is evaluated on: ``validation`` where it has one (GLUE, ImageNet), else ``test`` (CIFAR).

    Raises:
        FileNotFoundError: If the set is not there.
        ValueError: If it has neither.
    """
    info = _builder(directory.find(name, data_dir)).info
    for split in ("validation", "test"):
        if split in info.splits:
            return split
    raise ValueError(
        f"name: {info.full_name} has the splits {list(info.splits)}, expected 'validation' or 'test' among them; "
        "hold out a part of the training set: --train-split 'train[:90%]' --evaluation-split 'train[90%:]'"
    )


def _builder(folder: Path) -> Any:
    """What ``tfds.data_source`` makes of a set once it has found the directory."""
    try:
        import tensorflow_datasets as tfds
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}; reading {folder} needs the packages for training: pip install 'smartfrz_jax[train]'"
        ) from error
    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:
        raise ValueError(
            f"{folder} cannot be opened: {type(error).__name__}: {error}; expected dataset_info.json and features.json "
            "as TFDS writes them; copy the directory again, or prepare the set again with a recent TFDS"
        ) from error


def _of_kind(info: Any, kind: str) -> list[str]:
    import tensorflow_datasets as tfds

    spec = getattr(tfds.features, kind)
    return sorted(field for field in info.features if isinstance(info.features[field], spec))  # they come in any order


def _inputs(
    info: Any, sentences: Sequence[str] | None
) -> tuple[Literal["image", "text"], tuple[str, ...], tuple[int | None, ...]]:
    images, texts = _of_kind(info, "Image"), _of_kind(info, "Text")
    if sentences is not None:
        if not 1 <= len(sentences) <= 2 or not set(sentences) <= set(texts):
            raise ValueError(
                f"sentences: got {list(sentences)}, expected one or two of {texts}, the texts of {info.full_name}"
            )
        return "text", tuple(sentences), ()
    if len(images) == 1:
        grey_levels.check_type(info.full_name, info.features[images[0]])
        return "image", (images[0],), tuple(info.features[images[0]].shape)
    if images or not 1 <= len(texts) <= 2:
        raise ValueError(
            f"name: {info.full_name} has the image features {images} and the text features {texts}, expected one "
            "image, or one or two texts; name the texts to read with sentences=(...)"
        )
    pair = next((pair for pair in _ORDERED_PAIRS if set(pair) == set(texts)), tuple(texts))
    return "text", pair, ()


def _label(info: Any, label: str | None) -> str:
    classes = _of_kind(info, "ClassLabel")
    if label is None:
        label = "label" if "label" in classes or len(classes) != 1 else classes[0]
    if label not in classes:
        raise ValueError(
            f"label: got {label!r}, expected one of {classes}, the class labels of {info.full_name}; "
            "name one, or take a classification set"
        )
    return label
