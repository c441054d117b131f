"""Paths on command lines."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable
from typing import TypeVar

from smartfrz_jax.pytrees import file_paths

T = TypeVar("T")


def file_path(text: str) -> file_paths.Path:
    """A type for ``argparse``: a local path, with ``~`` expanded, or one of an object store, such as gs://bucket/run."""
    return _checked(file_paths.as_path, text)


def local_path(text: str) -> pathlib.Path:
    """A type for ``argparse``: a local path, with ``~`` expanded."""
    return _checked(file_paths.local_path, text)


def _checked(make: Callable[[str], T], text: str) -> T:
    try:
        return make(text)
    except ValueError as error:  # argparse would not print its text
        raise argparse.ArgumentTypeError(str(error).removeprefix("path: ")) from error
