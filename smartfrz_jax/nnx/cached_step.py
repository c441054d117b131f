"""A train step whose frozen front runs once for every example, whatever a policy freezes in the course of the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from flax import nnx

from smartfrz_jax.caching.exchange import rows_sharding
from smartfrz_jax.caching.split_loss import BatchSizeError, check_each
from smartfrz_jax.caching.store import Storage, check_indices, check_room
from smartfrz_jax.cost.account import Account
from smartfrz_jax.freezing.frozen import Frozen, check_frozen
from smartfrz_jax.jaxprs import example_axis
from smartfrz_jax.nnx.cache_maker import CacheMaker
from smartfrz_jax.nnx.layers import check_model
from smartfrz_jax.nnx.optimizer import Optimizer
from smartfrz_jax.nnx.prefix_cache import PrefixCache, inputs_from_activations, needed_inputs
from smartfrz_jax.nnx.read_values import ReadValues, WrittenError, unwritten
from smartfrz_jax.programs import arguments
from smartfrz_jax.programs.train_step import Program, TrainStep
from smartfrz_jax.pytrees import checks

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Int

_ON_DEVICE = Storage()

# Raised while a step from activations is traced, before anything has changed: the plain step goes on.
_ENDS = (BatchSizeError, WrittenError)


class CachedStep:
    """A :class:`smartfrz_jax.TrainStep` that keeps the activations at the end of the frozen front.

    While nothing is frozen it is a plain step. For every frozen set there is then a :class:`PrefixCache`, made from the
    one before it, and a step from its activations on. Where activations cannot be kept, the plain step goes on, and a
    ``SavingWarning`` says why, once for each cause; where it would not pay, it goes on without a word.

    Results are those of the plain step, up to the rounding of programs that XLA compiles apart. Activations are not
    part of checkpoints: after :meth:`restored`, which a Freezer that knows the step calls, they are computed anew, bit
    for bit. So they are where something else than the step has set what the frozen front reads, or another model comes.
    Where a batch is divided among the devices of a mesh, so are the activations: each holds some examples.

    Args:
        make_step: From a loss function to a plain step, of ``(model, optimizer, *inputs)``, that calls it
            with the model and the inputs, such as through ``optimizer.value_and_grad``. It is called with ``loss_fn``
            and with losses that begin at activations, the first of their inputs.
        loss_fn: A function of ``(model, *inputs)``, as that of :class:`PrefixCache`.
        examples: Number of examples in the data set.
        storage: Where activations are kept, on the ``"device"`` by default or the ``"host"``, in which type, and in how
            many bytes. For files, see :class:`PrefixCache`.
        views: Number of augmented views of each example that there are; 1 if there is no augmentation.
        account: The account of the step, from :func:`account`; see :class:`smartfrz_jax.TrainStep`. With
            ``total_steps`` it tells whether keeping activations still pays.
        total_steps: Train steps of the whole run. Without it, or the account, activations are kept wherever they can.
        donate: Whether a step may overwrite the model and the optimizer; see :class:`smartfrz_jax.TrainStep`.

    Attributes:
        cache: What is kept for the present frozen set; ``None`` if nothing is.
        programs: What was compiled so far, in the order of first use; without the passes that compute activations.
        last: The program of the last call; ``None`` before the first.
        flops: FLOPs of the last call on all devices, the computation of activations that were not there included.

    Raises:
        TypeError: If what ``make_step`` makes is jitted, or ``storage`` is no ``Storage``.
        ValueError: If a number is below 1, or there is no such place or type.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> import optax
        >>> import smartfrz_jax as sfj
        >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
        >>> images, batch = np.ones((8, 2), np.float32), np.arange(4)
        >>> layers = sfj.nnx.find_layers(model, images[batch])
        >>> optimizer = sfj.nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param, layers=layers)
        >>> def make_step(loss_fn):
        ...     def train_step(model, optimizer, *inputs):
        ...         loss, grads = optimizer.value_and_grad(loss_fn)(model, *inputs)
        ...         optimizer.update(model, grads)
        ...         return loss
        ...     return train_step
        >>> step = CachedStep(make_step, lambda model, x: (model(x) ** 2).mean(), examples=len(images))
        >>> loss = step(model, optimizer, batch, images[batch])
        >>> optimizer.freeze(model, ["layers/0"])
        >>> loss = step(model, optimizer, batch, images[batch])
        >>> step.cache.bytes_per_example, int(step.cache.store.filled.sum())
        (12, 4)
    """

    def __init__(
        self,
        make_step: Callable[[Callable[..., Any]], Any],
        loss_fn: Callable[..., Any],
        *,
        examples: int,
        storage: Storage = _ON_DEVICE,
        views: int = 1,
        account: Account | None = None,
        total_steps: int | None = None,
        donate: bool = False,
    ):
        checks.function(make_step, "make_step", "a function of a loss to a plain train step")
        checks.function(loss_fn, "loss_fn", "a function of (model, *inputs)")
        checks.instance(storage, Storage, "storage", "a smartfrz_jax.caching.Storage, such as Storage('host')")
        check_room(examples, views, storage.budget)
        if total_steps is not None:
            checks.count(total_steps, "total_steps")
        if storage.place not in ("device", "host"):
            got = repr(storage.place)
            raise ValueError(f"place: got {got}, expected 'device' or 'host'; to keep files, use a PrefixCache")
        self.account = account
        self.cache: PrefixCache | None = None
        self.programs: list[Program] = []
        self.last: Program | None = None
        self.flops = 0.0
        self._make_step, self._donate = make_step, donate
        self._examples, self._views, self._storage = examples, views, storage
        self._maker = CacheMaker(loss_fn, examples, storage, views, account, total_steps)
        self._plain = TrainStep(make_step(loss_fn), account=account, donate=donate)
        self._cached: TrainStep | None = None
        self._frozen: Frozen | None = None
        self._read: ReadValues | None = None
        self._coming: _Coming | None = None
        self._history: Sequence[tuple[int, Frozen]] = ()
        self._usual: tuple[Any, ...] | None = None
        self._done = 0
        self._waited = 0.0

    @property
    def wait_seconds(self) -> float:
        """Time that the loop stood still for tracing and compiling, and for making caches."""
        steps = self._plain, self._cached, self._coming and self._coming.step
        return self._waited + sum(step.wait_seconds for step in steps if step)

    def program(self, model: nnx.Module, optimizer: Optimizer, indices: Any, *inputs: Any) -> Program:
        """The program for these arguments, compiled now if it is new; see :meth:`smartfrz_jax.TrainStep.program`.

        Args:
            model: The model.
            optimizer: Its optimizer.
            indices: As of a call; not looked at.
            *inputs: As of a call.
        """
        _check_loop(model, optimizer)
        self._follow(model, optimizer, inputs)
        if self.cache is None or self._cached is None or example_axis.count(inputs) < 2:
            return self._listed(self._plain.program(model, optimizer, *inputs))
        args = inputs_from_activations(self.cache, inputs, self._storage.dtype)
        try:
            return self._listed(self._cached.program(model, optimizer, *args))
        except _ENDS as error:
            self._end(error)
        return self._listed(self._plain.program(model, optimizer, *inputs))

    def prepare(self, owner: Optimizer, new: Optimizer) -> Callable[[], None]:
        """Begins to compile the program for another frozen set; see :meth:`smartfrz_jax.TrainStep.prepare`.

        Args:
            owner: The optimizer.
            new: The same with that frozen set, and with shapes in place of arrays.

        Returns:
            A function without arguments that waits for the program.

        Raises:
            ValueError: If the step was not called before.
        """
        checks.instance(owner, Optimizer, "owner", "the smartfrz_jax.nnx.Optimizer of the step")
        checks.instance(new, Optimizer, "new", "the smartfrz_jax.nnx.Optimizer with the frozen set to come")
        if self._usual is None:
            raise ValueError(
                "owner: the step was not called yet, so the shapes of its batch are unknown; call it first"
            )
        model, *inputs = self._usual
        start = time.perf_counter()
        cache = self._maker.make(model, new.frozen, inputs, self._done, self.cache)
        self._waited += time.perf_counter() - start
        if cache is None:
            return self._plain.compile_ahead(model, new, *inputs)
        step = self._step_from(cache)
        try:
            wait = step.compile_ahead(model, new, *inputs_from_activations(cache, inputs, self._storage.dtype))
        except WrittenError:  # which is said when it is called
            return self._plain.compile_ahead(model, new, *inputs)
        before, self._coming = self._coming, _Coming(new.frozen, cache.frozen, step)
        self._waited += before.step.wait_seconds if before else 0.0
        return wait

    def __call__(
        self, model: nnx.Module, optimizer: Optimizer, indices: Int[np.ndarray, " n"], *inputs: Any, view: int = 0
    ) -> Any:
        """Runs the step.

        Args:
            model: The model.
            optimizer: Its optimizer.
            indices: Which examples of the data set the batch has; on the host.
            *inputs: The batch. One example alone is not looked up, as the plain step takes it.
            view: Which view of the examples it is.

        Raises:
            ValueError: If an index is wrong, or there is not one for each example.
        """
        _check_loop(model, optimizer)
        indices = check_indices(indices, view, self._examples, self._views)
        examples = example_axis.count(inputs)
        check_each(len(indices), examples)
        self._check_values(model, optimizer)
        self._follow(model, optimizer, inputs)
        self._done += 1
        if self.cache is not None and self._cached is not None and examples > 1:
            try:
                fetching = self.cache.fetch_flops(indices, view)
                activations = self.cache.fetch(model, indices, *inputs, view=view)
                out = self._cached(model, optimizer, activations, *needed_inputs(self.cache, inputs))
                self._note(model)
                self.last = self._listed(self._cached.last)
                cost = self.last.cost
                self.flops = cost.flops * cost.devices + fetching
                return out
            except _ENDS as error:
                self._end(error)
        out = self._plain(model, optimizer, *inputs)
        self._note(model)
        self.last = self._listed(self._plain.last)
        self.flops = self.last.cost.flops * self.last.cost.devices
        return out

    def restored(self, history: Sequence[tuple[int, Frozen]]) -> None:
        """Says that the run goes on from a checkpoint: what is kept belongs to other parameters.

        Activations are computed anew, by the programs by which the run had computed them, so that a run that was
        interrupted ends with the bits of one that was not. For that the first batch must be as large as the first of
        the run was, and what is stored must fit, now as then.

        Args:
            history: The frozen sets of the run until then, in order, each with the number of steps done before.
        """
        checks.instance(history, Sequence, "history", "pairs of a number of steps and a smartfrz_jax.Frozen")
        for done, frozen in history:
            checks.count(done, "history", least=0)
            check_frozen(frozen)
        before, self._history = self.wait_seconds, tuple(history)
        self._frozen, self._coming, self._cached, self.cache = None, None, None, None
        self._waited += before - self.wait_seconds

    def _follow(self, model: nnx.Module, optimizer: Optimizer, inputs: tuple[Any, ...]) -> None:
        """Makes the cache and the step for the frozen set of the optimizer, if that has changed."""
        if self._usual is None:
            self._usual = arguments.of((model, *inputs))
        inputs = self._usual[1:]  # what comes just now may be the rest of an epoch
        if optimizer.frozen == self._frozen:
            return
        self._check_values(model, optimizer)
        if self._frozen is None:
            self._done = int(optimizer.step[...])
        start, before = time.perf_counter(), self.wait_seconds
        coming, old, known = self._coming, self.cache, None
        if self._history:
            old, known = self._maker.rebuilt(model, self._history, inputs), self._history[-1][1]
            self._history = ()
        self._frozen, self._coming, self._cached, self.cache = optimizer.frozen, None, None, None
        decided = known == optimizer.frozen
        cache = old if decided else self._maker.make(model, optimizer.frozen, inputs, self._done, old)
        if cache is not None and self._maker.has_room(cache, None if cache is old else old, rows_sharding(inputs)):
            prepared = coming is not None and (coming.frozen, coming.kept) == (optimizer.frozen, cache.frozen)
            self._cached = coming.step if coming and prepared else self._step_from(cache)
            self.cache, self._read = cache, ReadValues(cache.variables)
            self._note(model)
        # So that all of it adds what just passed, whatever steps came and went.
        self._waited += before + time.perf_counter() - start - self.wait_seconds

    def _step_from(self, cache: PrefixCache) -> TrainStep:
        whole = [name for name, is_whole in cache.variables.items() if is_whole]
        return TrainStep(unwritten(self._make_step(cache.loss), whole), donate=self._donate)

    def _check_values(self, model: nnx.Module, optimizer: Optimizer) -> None:
        """Forgets what is stored if it was computed from other values than the frozen front has now."""
        if self.cache is None or self._read is None or self._read.are_of(model):
            return
        self.cache.clear()
        self._note(model)
        self._done = int(optimizer.step[...])
        if not self._maker.pays(self.cache, self._done):
            self._end()

    def _note(self, model: nnx.Module) -> None:
        """Says that what is stored is of the values that the frozen front has now."""
        if self.cache is not None and self._read is not None:
            self._read.note(model)

    def _end(self, error: ValueError | None = None) -> None:
        """Goes on without a cache until the frozen set changes."""
        if error is not None:
            self._maker.warn(error)
        self._waited += self._cached.wait_seconds if self._cached else 0.0
        self._cached, self.cache = None, None

    def _listed(self, program: Program | None) -> Program:
        assert program is not None
        if program not in self.programs:
            self.programs.append(program)
        return program


def _check_loop(model: Any, optimizer: Any) -> None:
    """Raises ``TypeError`` unless a step can be called with these."""
    check_model(model)
    checks.instance(optimizer, Optimizer, "optimizer", "the smartfrz_jax.nnx.Optimizer of the model")


class _Coming(NamedTuple):
    """A step that is being compiled.

    Attributes:
        frozen: For this frozen set.
        kept: That of the activations which it begins at.
        step: The step.
    """

    frozen: Frozen
    kept: Frozen
    step: TrainStep
