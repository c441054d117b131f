"""The type of what JAX takes for a pytree, for annotations."""

from typing import Any, TypeAlias

PyTree: TypeAlias = Any
