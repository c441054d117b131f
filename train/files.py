"""Files that are there whole or not at all."""

from __future__ import annotations

import os

from smartfrz_jax.pytrees.file_paths import Path, is_remote


def write_whole(path: Path, text: str) -> None:
    """Writes a file beside another and puts it in its place: killed at any moment, one of the two is there whole.

    Args:
        path: The file; it is made if it is not there.
        text: What is to be in it.

    Raises:
        OSError: If it cannot be written.
    """
    if is_remote(path):  # where files are only written whole
        path.write_text(text)
        return
    target = path.resolve()  # of a link, what it points to
    part = target.with_name(f"{target.name}.part")
    part.write_text(text)
    os.replace(part, target)
