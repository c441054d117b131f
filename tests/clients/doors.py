"""Two doors to training, Flax's own and this library's: a client is written once and goes through either."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training import train_state

import smartfrz_jax as sfj
from smartfrz_jax.pytrees import paths


class Bare(NamedTuple):
    """What a loop over bare pytrees calls."""

    value_and_grad: Callable[..., Any]
    tx: optax.GradientTransformation
    apply_updates: Callable[..., Any]


class Stock:
    """Flax and optax as they are."""

    TrainState = train_state.TrainState

    def optimizer(self, model, tx, *inputs, wrt=nnx.Param, forward=None):
        return nnx.Optimizer(model, tx, wrt=wrt)

    def grads_of(self, optimizer, loss_fn, **kwargs):
        return nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, optimizer.wrt), **kwargs)

    def loss_of(self, optimizer, loss_fn, argnum):
        return loss_fn

    def train_state(self, cls=TrainState, *, layers, **kwargs):
        return cls.create(**kwargs)

    def loss_of_params(self, state, loss_fn):
        return loss_fn

    def grads_of_params(self, state, loss_fn, **kwargs):
        return jax.value_and_grad(loss_fn, **kwargs)

    def jit(self, step, *modules):
        return nnx.jit(step) if modules else jax.jit(step)

    def bare(self, tx, frozen):
        return Bare(jax.value_and_grad, tx, optax.apply_updates)


class Freezing:
    """The same with a frozen set."""

    TrainState = sfj.linen.TrainState

    def optimizer(self, model, tx, *inputs, wrt=nnx.Param, forward=None):
        layers = sfj.nnx.find_layers(model, *inputs, wrt=wrt, forward=forward)
        return sfj.nnx.Optimizer(model, tx, wrt=wrt, layers=layers)

    def grads_of(self, optimizer, loss_fn, **kwargs):
        return optimizer.value_and_grad(loss_fn, **kwargs)

    def loss_of(self, optimizer, loss_fn, argnum):
        return optimizer.with_frozen(loss_fn, argnum=argnum)

    def train_state(self, cls=TrainState, *, layers, **kwargs):
        return cls.create(layers=layers(), **kwargs)

    def loss_of_params(self, state, loss_fn):
        return state.with_frozen(loss_fn)

    def grads_of_params(self, state, loss_fn, **kwargs):
        return state.value_and_grad(loss_fn, **kwargs)

    def jit(self, step, *modules):
        return sfj.TrainStep(step)

    def bare(self, tx, frozen):
        value_and_grad = partial(sfj.value_and_grad, frozen=frozen)
        return Bare(value_and_grad, sfj.freeze(tx, frozen), partial(sfj.apply_updates, frozen=frozen))


class Programs:
    """Calls a jitted or pmapped step by a program compiled ahead, for loops that ``sfj.TrainStep`` does not serve."""

    def __init__(self, step):
        self.flops = []
        self.renew(step)

    def renew(self, step):
        """The next call compiles a step."""
        self._step, self._program = step, None

    def __call__(self, *args):
        if self._program is None:
            self._program = self._step.lower(*args).compile()
            self.flops.append(self._program.cost_analysis()["flops"])
        return self._program(*args)


@dataclasses.dataclass
class NnxRun:
    """A training run whose step writes into modules.

    Attributes:
        step: A compiled function of the modules and the batch, to the loss.
        modules: Its modules by name, in the order of its arguments, optimizers among them.
        batch: What follows them.
        frozen: Layers to freeze, by the names of the model and of the optimizer that trains it: their names, or a
            function from all layers to these.
    """

    step: Callable[..., jax.Array]
    modules: dict[str, Any]
    batch: tuple[Any, ...]
    frozen: dict[tuple[str, str], Any]

    def advance(self) -> np.ndarray:
        return np.asarray(self.step(*self.modules.values(), *self.batch))

    def arrays(self) -> dict[str, np.ndarray]:
        """Every variable of all modules but the optimizers, by name."""
        others = {name: module for name, module in self.modules.items() if not isinstance(module, nnx.Optimizer)}
        return _arrays({name: nnx.as_pure(nnx.state(module)) for name, module in others.items()})

    def freeze(self) -> tuple[set[str], set[str]]:
        """Freezes the layers; returns the names of what must not change from now on, and of the weights that train."""
        held, active = set(), set()
        for (model, optimizer), names in self.frozen.items():
            owner = self.modules[optimizer]
            owner.freeze(self.modules[model], names(owner.frozen.layers) if callable(names) else names)
            held |= _belonging(owner.frozen, model)
            active |= _active(owner.frozen, model)
        return held, active


@dataclasses.dataclass
class StateRun:
    """A training run whose step takes a train state and returns the next.

    Attributes:
        step: A compiled function of the state and the batch, to the next state and the loss.
        state: The train state.
        batch: What follows it.
        frozen: Layers to freeze.
    """

    step: Callable[..., Any]
    state: Any
    batch: tuple[Any, ...]
    frozen: tuple[str, ...]

    def advance(self) -> np.ndarray:
        self.state, loss = self.step(self.state, *self.batch)
        return np.asarray(loss)

    def arrays(self) -> dict[str, np.ndarray]:
        """Parameters and other collections of the state, by name."""
        own = {field.name for field in dataclasses.fields(sfj.linen.TrainState)} - {"params", "step"}
        fields = {name: value for name, value in vars(self.state).items() if name not in own}
        return _arrays(fields)

    def freeze(self) -> tuple[set[str], set[str]]:
        """Freezes the layers; returns the names of what must not change from now on, and of the weights that train."""
        self.state = self.state.freeze(self.frozen)
        return _belonging(self.state.frozen, "params"), _active(self.state.frozen, "params")


@dataclasses.dataclass
class BareRun:
    """A training run over parameters and optimizer state in the loop's own hands.

    Attributes:
        make_step: For a frozen set, a step of the parameters, the optimizer state and the batch, to the next ones and
            the loss.
        tx: The optax transformation.
        carry: Parameters and optimizer state.
        batch: What follows them.
        start: The frozen set at first; ``None`` with Flax's own door.
        frozen: Layers to freeze.
    """

    make_step: Callable[..., Callable[..., Any]]
    tx: optax.GradientTransformation
    carry: tuple[Any, Any]
    batch: tuple[Any, ...]
    start: sfj.Frozen | None
    frozen: tuple[str, ...]

    def __post_init__(self):
        self.step = Programs(jax.jit(self.make_step(self.start), donate_argnums=(0, 1)))

    def advance(self) -> np.ndarray:
        *self.carry, loss = self.step(*self.carry, *self.batch)
        return np.asarray(loss)

    def arrays(self) -> dict[str, np.ndarray]:
        """The parameters by name."""
        return _arrays({"params": self.carry[0]})

    def freeze(self) -> tuple[set[str], set[str]]:
        """Freezes the layers; returns the names of what must not change from now on, and of the weights that train."""
        (params, opt_state), frozen = self.carry, self.start.add(self.frozen)
        self.carry = params, sfj.migrate_opt_state(opt_state, self.tx, params, frozen)
        self.step.renew(jax.jit(self.make_step(frozen), donate_argnums=(0, 1)))
        return _belonging(frozen, "params"), _active(frozen, "params")


def make_params(init, *args, **kwargs):
    """Parameters of a Linen module, drawn on the host: its own initialisation would be the slowest part of a test."""
    generator = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(0.3 * generator.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(draw, jax.eval_shape(partial(init, **kwargs), *args)["params"])


def flops(run) -> list[float]:
    """FLOPs of the programs of a run, in the order of their first use."""
    return run.step.flops if isinstance(run.step, Programs) else [program.cost.flops for program in run.step.programs]


def assert_equal(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """The same names and, bit for bit, the same values."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def _belonging(frozen, tree):
    layers = [layer for layer in frozen.layers if layer.name in frozen.names]
    return {f"{tree}/{name}" for layer in layers for name in (*layer.params, *layer.state)}


def _active(frozen, tree):
    return {f"{tree}/{name}" for name in frozen.layers.owner if name not in frozen.params}


def _arrays(tree):
    return {
        name: np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)
        for name, leaf in paths.flatten(tree).items()
    }
