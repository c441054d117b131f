"""Pages of tables: sections that scripts write, each between two comments with its name, beside text by hand."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import jax

from train.log import write_whole

_ROOT = Path(__file__).resolve().parents[1]


def write_section(file: Path, name: str, text: str) -> None:
    r"""Puts a text between ``<!-- name -->`` and ``<!-- end of name -->`` in a file, at its end if they are not there.

    The pages are ``benchmarks/*/tables.md``, beside the data.

    Args:
        file: Markdown file; it is made if it is not there.
        name: Name of the section.
        text: What is to be there.

    Raises:
        ValueError: If the first comment is there and the second is not behind it.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "tables.md"
        >>> write_section(file, "table", "one")
        >>> write_section(file, "table", "two")
        >>> file.read_text()
        '<!-- table -->\ntwo\n<!-- end of table -->\n'
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    section = f"{begin}{text.strip()}\n{end}"
    old = file.read_text() if file.exists() else ""
    before, found, rest = old.partition(begin)
    _, closed, after = rest.partition(end)
    if found and not closed:
        raise ValueError(f"results: {file} has {begin.strip()!r} without {end.strip()!r} after it; add that line")
    write_whole(file, before + section + after if found else f"{old}\n{section}" if old else section)


def publish(text: str, file: Path, *, section: str, results: Path | None) -> None:
    """Prints what a script has found, and writes it to a file of its own and, if there is one, to a page of tables.

    Args:
        text: Markdown.
        file: A file that has nothing else.
        section: Name of the section in ``results``.
        results: Markdown file in which to renew the section.

    Raises:
        ValueError: As for :func:`write_section`.
    """
    print(text)
    file.write_text(f"{text}\n")
    if results is not None:
        write_section(results, section, text)


def provenance(script: str) -> str:
    """What a table was made with, in one paragraph: command, commit, versions and hardware.

    Args:
        script: Name of the module that was run.
    """
    command = shlex.join(["python", "-m", script, *sys.argv[1:]])
    versions = f"jax {jax.__version__}, Python {platform.python_version()}"
    return f"`{command}`; commit {commit()}; {versions}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores."


def commit() -> str:
    """The commit that is checked out, ``-dirty`` if files differ from it; ``unknown`` outside of a repository."""
    try:
        asked = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(asked, cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
