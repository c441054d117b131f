"""Programs that outlive the process: JAX's persistent compilation cache, set so that it keeps every one."""

from __future__ import annotations

import jax

from smartfrz_jax.pytrees.file_paths import PathLike, as_path, try_to_write


def enable_compilation_cache(directory: PathLike) -> None:
    """Keeps compiled programs in a directory, for this process and for later ones.

    A run that is resumed, or started again, then loads its programs in a fraction of the time that compiling them
    takes. They are still traced. By itself JAX keeps nothing, and of what a directory is given for only programs that
    took a second or more.

    Args:
        directory: Made if it is not there; ``gs://...`` too. Several processes may share it.

    Raises:
        OSError: If the directory cannot be made or written.

    Example:
        >>> import tempfile
        >>> enable_compilation_cache(tempfile.mkdtemp())
    """
    directory = as_path(directory, "directory")
    try:
        try_to_write(directory)
    except OSError as error:
        raise OSError(
            f"directory: programs cannot be kept in {directory} ({error.strerror or error}); name a directory that can "
            "be written, or leave it out"
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
