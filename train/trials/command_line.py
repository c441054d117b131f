"""What the command lines of all comparisons have in common."""

from __future__ import annotations

import argparse
from pathlib import Path


def make_parser(script: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options for what is read and written.

    Args:
        script: Name of the script in ``train``, and of its folder in ``runs``.
        doc: Its docstring, of which the first paragraph is the description.
    """
    parser = argparse.ArgumentParser(prog=f"python -m train.{script}", description=str(doc).split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs", script), help="folder for everything written")
    parser.add_argument("--results", type=Path, metavar="FILE", help="Markdown file in which to renew the tables, too")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of prepared TFDS data sets")
    parser.add_argument("--weights", type=Path, help="folder of published weights")
    return parser
