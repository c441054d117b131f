"""An object store for tests: what ``etils.epath`` does with ``gs://`` paths happens in a local folder."""

import contextlib
import os
from pathlib import Path

from etils.epath import gpath, testing

_ONE = ("exists", "isdir", "listdir", "makedirs", "mkdir", "open", "remove", "rmtree", "stat")


@contextlib.contextmanager
def buckets(folder: Path):
    """Within it, ``gs://bucket/x`` is ``folder/bucket/x``, but cannot be added to, as in an object store."""

    def local(path):
        return str(path).replace("gs://", f"{folder}/", 1)

    def one(original, path, *args, **kwargs):
        if "gs://" in str(path) and args and "a" in args[0]:
            raise OSError("objects cannot be added to")
        return original(local(path), *args, **kwargs)

    def two(original, path, target, **kwargs):
        return original(local(path), local(target), **kwargs)

    def glob(original, path):
        return [found.replace(f"{folder}/", "gs://", 1) for found in original(local(path))]

    backends = dict(gpath._PREFIX_TO_BACKEND)
    with testing.mock_epath(**dict.fromkeys(_ONE, one), rename=two, replace=two, copy=two, glob=glob):
        gpath._PREFIX_TO_BACKEND[None] = backends[None]  # local paths stay as they are
        yield "gs://bucket"
    assert not os.path.exists("gs:")
