"""Finds the prepared TFDS sets below a data directory."""

from __future__ import annotations

import os
import re

from smartfrz_jax.pytrees.file_paths import Path, as_path

INFO = "dataset_info.json"
_VERSION = re.compile(r"\d+\.\d+\.\d+")


def default_data_dir() -> Path:
    """Where TFDS itself keeps its sets: ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``."""
    return as_path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"), "TFDS_DATA_DIR")


def prepared(data_dir: Path) -> list[str]:
    """Names of the sets in ``data_dir``, such as ``glue/mrpc/2.0.0``."""
    depths = ("*", "*/*", "*/*/*")
    return sorted(
        path.parent.relative_to(data_dir).as_posix()
        for depth in depths
        for path in data_dir.glob(f"{depth}/{INFO}")
        if _VERSION.fullmatch(path.parent.name)
    )


def find(name: str, data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Directory of a prepared set.

    Args:
        name: Name of the set as in TFDS, with its configuration where it has any: ``cifar10``, ``glue/mrpc``; the
            newest version is taken unless one is named: ``cifar10:3.0.2`` or ``cifar10/3.0.2``.
        data_dir: Directory that TFDS prepared the set in; that of TFDS by default.

    Raises:
        FileNotFoundError: If there is no such directory, or no such set in it.
        ValueError: If the name stands for several configurations.
    """
    root = default_data_dir() if data_dir is None else as_path(data_dir, "data_dir")
    if not root.is_dir():
        raise FileNotFoundError(
            f"data_dir: {root} is not a directory, expected the data directory of TensorFlow Datasets; {_prepare(name)}"
        )
    wanted = name.replace(":", "/").strip("/")
    found = prepared(root)
    matches = [one for one in found if one == wanted or one.startswith(f"{wanted}/")]
    if not matches:
        raise FileNotFoundError(
            f"name: no set {name!r} is prepared in {root}, expected one of those there, {found or 'none at all'}; "
            + _prepare(name)
        )
    sets = sorted({one.rpartition("/")[0] for one in matches})
    if len(sets) > 1:
        raise ValueError(f"name: {name!r} stands for {len(sets)} sets in {root}, expected one of {sets}")
    return root / max(matches, key=lambda one: tuple(int(part) for part in one.rpartition("/")[2].split(".")))


def _prepare(name: str) -> str:
    return (
        "name another directory, or prepare the set once where tensorflow is installed: "
        f"tfds build {name} --data_dir=DIRECTORY --file_format=array_record"
    )
