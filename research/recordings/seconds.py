"""How long the parts of a recording take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax

_COMPILING = ("/jax/core/compile/backend_compile_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration")


class Seconds(dict[str, float]):
    """Seconds that the parts of a recording took; compiling is part of them, and also counted alone."""

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Adds the time until the block ends."""
        start = time.perf_counter()
        yield
        self._add(part, time.perf_counter() - start)

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Adds what JAX compiles until the block ends."""

        def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
            if event in _COMPILING:
                self._add("compiling", duration_secs)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    def _add(self, part: str, seconds: float) -> None:
        self[part] = round(self.get(part, 0.0) + seconds, 3)
