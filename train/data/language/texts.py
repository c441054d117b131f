"""Texts to model: the sentences of a TFDS set, or those of a file."""

from __future__ import annotations

import json
from typing import NamedTuple

from smartfrz_jax.pytrees.file_paths import Path
from train.data.source import Split, open_split

_SUFFIXES = (".txt", ".jsonl")


class Texts(NamedTuple):
    """Some texts.

    Attributes:
        prompts: What is read before each, but not learned; often empty.
        texts: What is learned.
    """

    prompts: list[str]
    texts: list[str]


def is_file(data: str) -> bool:
    """Whether the name of a set is that of a file of texts."""
    return data.endswith(_SUFFIXES)


def read_split(split: Split) -> Texts:
    """The texts of a TFDS split, each field of an example a text of its own."""
    inputs = split.fetch(range(len(split))).inputs
    texts = [text for example in zip(*inputs, strict=True) for text in example if text.strip()]
    return Texts([""] * len(texts), texts)


def open_texts(name: str, split: str, data_dir: Path) -> Split:
    """A TFDS split whose texts are read, whether it has labels or not; raises as :func:`train.data.open_split` does."""
    opened = open_split(name, split, data_dir, labelled=False)
    if opened.kind != "text":
        raise ValueError(f"data: {opened.name} holds images, expected texts; choose another set")
    return opened


def read_file(path: Path, argument: str = "data") -> Texts:
    """Reads a file of texts.

    Args:
        path: ``.txt``, a text in each line that is not empty; or ``.jsonl``, in each line an object with a ``text``, or
            with a ``prompt`` and the ``completion`` that is learned.
        argument: What errors name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is of another kind, a line is no such object, or there is no text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: {path} is not there; expected a file of texts")
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{argument}: got {path}, expected a file named {' or '.join(f'*{s}' for s in _SUFFIXES)}")
    lines = [(number, line) for number, line in enumerate(path.read_text("utf-8").split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{argument}: {path} holds no text, expected one in each line")
    if path.suffix == ".txt":
        return Texts([""] * len(lines), [line for _, line in lines])
    pairs = [_pair(line, f"{argument}: line {number} of {path}") for number, line in lines]
    return Texts([prompt for prompt, _ in pairs], [text for _, text in pairs])


def _pair(line: str, where: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    entry = entry if isinstance(entry, dict) else {}
    prompt, text = entry.get("prompt", ""), entry.get("text", entry.get("completion"))
    if not isinstance(prompt, str) or not isinstance(text, str):
        raise ValueError(
            f'{where} is {line[:80]!r}, expected {{"text": ...}} or {{"prompt": ..., "completion": ...}} with strings'
        )
    return prompt, text
