"""Paths of files and folders as users write them: local ones, with ``~``, and those of object stores, ``gs://...``."""

from __future__ import annotations

import os
import pathlib
import re
from typing import TypeAlias

from etils import epath

Path: TypeAlias = pathlib.Path | epath.Path
PathLike: TypeAlias = str | os.PathLike[str]

_REMOTE = re.compile(r"^(\w{2,}):/+")


def as_path(path: PathLike, argument: str = "path") -> Path:
    """The path of a file or folder: with ``~`` expanded if it is local, else as it is.

    Args:
        path: What a user gave: local, or of an object store that ``etils.epath`` knows, such as ``gs://bucket/run``.
        argument: What errors name.

    Raises:
        TypeError: If it is no path.
        ValueError: If nothing is known of where it lies.

    Example:
        >>> as_path("gs://bucket/run") / "checkpoints"
        PosixGPath('gs://bucket/run/checkpoints')
        >>> as_path("~/run") == pathlib.Path.home() / "run"
        True
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{argument}: got {type(path).__name__}, expected a path: a string or pathlib.Path")
    text = os.fspath(path)
    scheme = _REMOTE.match(text)
    if scheme is None:
        return pathlib.Path(text).expanduser()
    if "://" not in text:  # so pathlib writes it
        before = f"{scheme[1]}://{text[scheme.end() :]}"
        raise ValueError(f"{argument}: got {text}, which pathlib.Path has made of {before}; pass the string")
    try:
        return epath.Path(text)
    except KeyError as error:
        raise ValueError(
            f"{argument}: got {text}, expected a local path or one of an object store that etils.epath knows, such as "
            "gs://bucket/folder"
        ) from error


def is_remote(path: Path) -> bool:
    """Whether it is in an object store, where files are written whole and cannot be added to."""
    return "://" in os.fspath(path)


def local_path(path: PathLike, argument: str = "path") -> pathlib.Path:
    """The same as :func:`as_path` of what must be on this machine.

    Raises:
        ValueError: If it is in an object store.
    """
    found = as_path(path, argument)
    if not isinstance(found, pathlib.Path):
        raise ValueError(f"{argument}: got {found}, expected a local path, as it is read or written in parts")
    return found


def try_to_write(folder: Path) -> None:
    """Makes a folder if it is not there, and tries to write in it.

    Raises:
        OSError: If either fails, with the reason.
    """
    probe = folder / f".writable.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError:
        raise
    except Exception as error:  # of the packages that an object store needs, and what they raise
        raise OSError(f"{type(error).__name__}: {error}") from error
