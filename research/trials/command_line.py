"""What the command lines of all comparisons have in common."""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Iterable
from pathlib import Path

from train.command_line import local_path


def make_parser(script: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options for what is read and written.

    Args:
        script: Name of the script in ``train``, and of its folder in ``runs``.
        doc: Its docstring, of which the first paragraph is the description.
    """
    parser = argparse.ArgumentParser(prog=f"python -m research.trials.{script}", description=str(doc).split("\n\n")[0])
    parser.add_argument("--out", type=local_path, default=Path("runs", script), help="folder for everything written")
    parser.add_argument("--results", type=local_path, metavar="FILE", help="page to renew the tables in, too")
    parser.add_argument("--data-dir", type=local_path, required=True, help="folder of prepared TFDS data sets")
    parser.add_argument("--weights", type=local_path, help="folder of published weights")
    return parser


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns, with ``*`` and ``?`` as in file names, is of the name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
