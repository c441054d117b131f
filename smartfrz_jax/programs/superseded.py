"""What is left in place of a variable that belongs to a set of layers that is no longer the frozen one."""

from __future__ import annotations

from typing import Any, NoReturn

from flax import nnx


def supersede(variable: nnx.Variable[Any]) -> nnx.Variable[Any]:
    """A new variable of the same value; whoever still holds the old one gets an error as soon as it is used.

    ``nnx.cached_partial``, ``nnx.jit_partial`` and ``nnx.split`` hold the variables of an optimizer together with the
    frozen set that it had at the time.
    """
    new = variable.copy()
    variable.set_raw_value(_Superseded())
    return new


class _Superseded:
    """The value of a superseded variable."""

    def __repr__(self) -> str:
        return "superseded, for the frozen set has changed"

    def _refuse(self, *_: Any) -> NoReturn:
        raise ValueError(
            "optimizer: its frozen set has changed since this step was bound to it (by nnx.cached_partial, "
            "nnx.jit_partial or nnx.split), so the step would go on training layers that are frozen now; after "
            "optimizer.freeze bind it again, or call the step of nnx.jit, or smartfrz_jax.TrainStep, with the model "
            "and the optimizer themselves"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # which classes are asked for to see what they can do
            raise AttributeError(name)
        self._refuse()

    # Those that JAX and NNX look up on the class.
    __getitem__ = __add__ = __int__ = _refuse
    shape = dtype = property(_refuse)
