"""A network on many devices, and what is read off its programs."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import smartfrz_jax as sfj
from smartfrz_jax.pytrees import paths

WIDTHS = (16, 24, 32, 40, 8)
NAMES = ("layers/0", "layers/1", "layers/2", "layers/3")
X = jax.random.normal(jax.random.key(0), (32, WIDTHS[0]))
Y = jax.random.normal(jax.random.key(1), (32, WIDTHS[-1]))
MOMENTUM = optax.chain(optax.clip_by_global_norm(1.0), optax.add_decayed_weights(0.01), optax.sgd(0.05, momentum=0.9))
ADAMW = optax.adamw(0.01)


class Net(nnx.Module):
    def __init__(self, norm, rngs):
        self.layers = nnx.List([nnx.Linear(n, m, rngs=rngs) for n, m in itertools.pairwise(WIDTHS)])
        self.norms = nnx.List([nnx.BatchNorm(width, rngs=rngs) for width in (WIDTHS[1:-1] if norm else ())])

    def __call__(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < len(self.norms):
                x = self.norms[i](x)
            if i + 1 < len(self.layers):
                x = nnx.relu(x)
        return x


def make(tx=MOMENTUM, *, norm=False, returning="fresh"):
    model = Net(norm, nnx.Rngs(0))
    layers = sfj.nnx.find_layers(model, X)
    return model, sfj.nnx.Optimizer(model, tx, layers=layers, returning=returning)


def step(model, optimizer, x, y):
    loss, grads = optimizer.value_and_grad(lambda model, x: jnp.square(model(x) - y).mean())(model, x)
    optimizer.update(model, grads)
    return loss


train_step = nnx.jit(step)


def mesh_of(kind):
    return jax.make_mesh((8,), ("data",), axis_types=(kind,))


KINDS = {"params": [AxisType.Auto, AxisType.Explicit], "ids": ["auto", "explicit"]}


def replicate(module, mesh):
    nnx.update(module, jax.device_put(nnx.state(module), NamedSharding(mesh, PartitionSpec())))


def batch(mesh):
    return jax.device_put((X, Y), NamedSharding(mesh, PartitionSpec("data")))


def arrays(module):
    return {name: np.array(leaf) for name, leaf in paths.flatten(nnx.as_pure(nnx.state(module))).items()}


def compiled_text(jitted, *args) -> str:
    compiled = jitted.lower(*args).compile()
    return getattr(compiled, "compiled", compiled).as_text()


COLLECTIVE = r" = (.*?) (?:all-reduce|reduce-scatter)(?:-start)?\("


def reduced(text) -> list[tuple[int, ...]]:
    """Shapes that a program reduces over the devices, with sides in order: XLA may transpose them."""
    lines = re.findall(COLLECTIVE, text)
    shapes = [shape for line in lines for shape in re.findall(r"f32\[([\d,]*)\]", line)]
    assert all(re.sub(r"f32\[[\d,]*\](\{[\d,]*\})?|/\*index=\d+\*/|[(), ]", "", line) == "" for line in lines), lines
    return sorted(tuple(sorted(map(int, filter(None, shape.split(","))))) for shape in shapes)


def gradient_shapes(active) -> list[tuple[int, ...]]:
    """What must be reduced: the gradients of some layers, and the loss."""
    sides = [(WIDTHS[NAMES.index(name)], WIDTHS[NAMES.index(name) + 1]) for name in active]
    return sorted([(), *((m,) for _, m in sides), *(tuple(sorted(side)) for side in sides)])


def run(policy, mesh=None, steps=12):
    """Steps with a policy, on one device or many. Returns the freezer, the parameters, and those of each freeze."""
    model, optimizer = make(norm=True)
    if mesh is not None:
        replicate(model, mesh)
        replicate(optimizer, mesh)
    freezer = sfj.nnx.Freezer(model, optimizer, policy)
    x, y = (X, Y) if mesh is None else batch(mesh)
    held = {}
    for _ in range(steps):
        loss = train_step(model, optimizer, x, y)
        frozen = freezer.step(loss=loss)
        new = [name for layer in frozen.layers if layer.name in frozen.names for name in (*layer.params, *layer.state)]
        held = {name: leaf for name, leaf in arrays(model).items() if name in new} | held
    return freezer, arrays(model), held
