"""Strict set-up of every test: eight fake CPU devices, no implicit dtype or rank promotion; warnings are errors."""

import gc
import os

from tests.support.programs import FAST

os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {FAST}")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads of NumPy that wait for each other take most of the time where every core has a worker of its own.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Tracing makes many small objects, among which Python would look for cycles after each 700 (2,000 from 3.13 on).
gc.set_threshold(50_000)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest runs first, so that in the end no process waits for another that has just begun one."""
    long = tuple(Path(__file__).parent / folder for folder in ("train", "research"))
    items.sort(key=lambda item: not any(item.path.is_relative_to(folder) for folder in long))


@pytest.fixture(autouse=True)
def programs_are_kept_no_longer_than_the_test():
    """Otherwise every later test would write its programs to files; JAX goes on doing so without a directory, too."""
    yield
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


@pytest.fixture(autouse=True, scope="module")
def programs_do_not_use_up_the_memory_maps():
    """Linux gives a process 65,530: one for all tests would crash in the compiler. Their memory is given back, too."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def fashion():
    """A few real images: (images float32 (512, 28, 28, 1), labels int32 (512,))."""
    from train import fashion_mnist

    train, _ = fashion_mnist.load()
    return train.images[:512], train.labels[:512]


@pytest.fixture
def jax_defaults():
    """For tests that run optax or Flax code which does not take strict promotion (Adam's bias correction, pooling)."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the repository with real data and weights; tests that need it are skipped where it is not."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("needs ../shared/data (TFDS directories and weights), which is not here")
    return folder
