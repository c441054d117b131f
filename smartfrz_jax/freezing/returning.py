"""Optimizer state of frozen layers, put aside on the host until they return."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import jax
import numpy as np
import optax
from jax.core import Tracer

from smartfrz_jax.freezing import migrate
from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.pytrees import hosts
from smartfrz_jax.pytrees.types import PyTree

Returning = Literal["fresh", "kept"]


class Kept:
    """What the optimizer of one run held of its frozen layers when they froze, as NumPy arrays on the host.

    Nothing of it is on a device, and no compiled step takes it as an argument: a ``TrainState`` and an ``Optimizer``
    refer to it statically, and carry only a number, ``version``, that says which contents go with them. Going on from
    an older state than the last one that froze something is an error, then, and not a mixture of two moments.

    Shared state (Adam's step count, a schedule's, hyperparameters, the clock of ``MultiSteps``) is the run's, so it is
    not put aside: it has gone on when a layer returns. optax corrects Adam's moments for their start at zero by one
    count for the whole tree (``scale_by_adam`` calls ``bias_correction(mu, b1, count)`` with a scalar ``count``), where
    moments of ``k`` updates need the correction for ``k``. What that does to a layer which returns after ``t`` updates
    of the run, with the usual decays of 0.9 and 0.999:

    - with fresh moments and large ``t`` its steps are ``(1 - 0.9**k) / sqrt(1 - 0.999**k)`` times too long: 3 times the
      first, 6.5 times the tenth, 3 times the hundredth, 1.3 times the thousandth;
    - with kept moments the same factor holds for a ``k`` that starts from the updates that the layer had when it froze:
      1.3 from a thousand on, falling to 1.

    So keep the moments of optimizers of this kind, or choose a smaller second decay. Momentum and Lion have no such
    correction. Adafactor's decay grows with the count of the run, ``1 - count**-0.8``, to which fresh factors are far
    too small; only its clipping of each update's RMS, which is on by default, bounds the steps then. What an optimizer
    computes anew every so many steps of the run, such as GaLore's projection and Sophia's curvature, is for a fresh
    layer as at the start until the next time: with GaLore its kernels do not train until then. Gradients that wait for
    an update, as in ``MultiSteps``, are never put aside. Nothing is there of layers that are frozen from the beginning,
    if the optimizer was made so: their moments are fresh when they train first.

    Of several processes each puts aside all of it.

    Attributes:
        version: Number of times that the contents changed.
        arrays: The contents by key path in the optimizer's state; part of a checkpoint.

    Example:
        >>> from smartfrz_jax import find_layers, linen
        >>> params = {"a": {"kernel": jax.numpy.ones((2, 2))}, "b": {"kernel": jax.numpy.ones((2, 2))}}
        >>> apply_fn = lambda params, x: x @ params["a"]["kernel"] @ params["b"]["kernel"]
        >>> layers = find_layers(params, apply_fn, jax.numpy.ones((1, 2)))
        >>> tx = optax.sgd(0.1, momentum=0.9)
        >>> state = linen.TrainState.create(apply_fn=apply_fn, params=params, tx=tx, layers=layers, returning="kept")
        >>> state = state.freeze(["a"])
        >>> list(state.kept.arrays)
        [".inner_states['train'].inner_state[0].trace['a']['kernel']"]
        >>> state = state.freeze(Frozen(layers))
        >>> state.kept.arrays
        {}
    """

    def __init__(self) -> None:
        self.version = 0
        self.arrays: dict[str, np.ndarray] = {}

    def migrate(
        self, version: Any, opt_state: Any, tx: optax.GradientTransformation, params: PyTree, frozen: Frozen
    ) -> tuple[Any, Any]:
        """:func:`smartfrz_jax.migrate_opt_state` that puts aside the state of what freezes, and puts back what returns.

        Under ``jax.eval_shape`` nothing is put aside.

        Args:
            version: The number that goes with ``opt_state``: an integer array of shape ``()``.
            opt_state: State of ``freeze(tx, other)``.
            tx: The optax transformation.
            params: Parameter pytree.
            frozen: The new frozen set.

        Returns:
            State of ``freeze(tx, frozen)``, and the number that goes with it.

        Raises:
            ValueError: If ``opt_state`` does not fit, or is older than what was put aside last.
        """
        if isinstance(version, Tracer | jax.ShapeDtypeStruct):
            return migrate.migrate_opt_state(opt_state, tx, params, frozen), version
        if int(version) != self.version:
            raise ValueError(
                f"opt_state: is of version {int(version)}, but what was put aside for returning layers is of version "
                f"{self.version}: layers have been frozen or have returned from another state of this run since. Go on "
                "from that one, restore a checkpoint, or let layers return afresh"
            )
        dropped = migrate.dropped(opt_state, tx, params, frozen)
        migrated = migrate.migrate_opt_state(opt_state, tx, params, frozen, kept=self.arrays, may_lack=True)
        # Copies: on a CPU, NumPy would otherwise hold on to the optimizer's own memory.
        now = self.arrays | {path: np.array(leaf) for path, leaf in hosts.fetch(dropped).items()}
        back = migrate.held(migrated, tx, params, frozen)
        self.arrays = {path: array for path, array in now.items() if path not in back}
        self.version += 1
        return migrated, version + 1

    def current(self, version: Any) -> Any:
        """The number of the present contents, in place of that of a state which is about to be overwritten."""
        if isinstance(version, Tracer | jax.ShapeDtypeStruct):
            return version
        return version + (self.version - int(version))

    def load(self, version: Any, arrays: dict[str, np.ndarray]) -> None:
        """Takes over the contents of a checkpoint, and the number that goes with them."""
        self.version, self.arrays = int(version), arrays

    @contextlib.contextmanager
    def unchanged_on_error(self) -> Iterator[None]:
        """Within it, an exception puts the contents back."""
        version, arrays = self.version, self.arrays
        try:
            yield
        except BaseException:
            self.version, self.arrays = version, arrays
            raise


def make_kept(returning: Returning) -> Kept | None:
    """An empty :class:`Kept` for ``"kept"``, nothing for ``"fresh"``.

    Raises:
        ValueError: If ``returning`` is neither.
    """
    if returning not in ("fresh", "kept"):
        raise ValueError(
            f"returning: got {returning!r}, expected 'fresh' (the optimizer starts anew for layers that return) or "
            "'kept' (it goes on from what it held of them when they froze)"
        )
    return Kept() if returning == "kept" else None
