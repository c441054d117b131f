"""A network of blocks, and steps of it as ``train.finetune`` makes them."""

import jax
import numpy as np
import optax
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax.nnx import scan_blocks
from smartfrz_jax.pytrees import paths
from train.devices import mesh as meshes
from train.devices.accumulate import accumulating_step
from train.devices.recompute import recomputed
from train.loop import make_step

WIDTH, EXAMPLES, CLASSES = 64, 32, 4
X = np.random.default_rng(0).standard_normal((EXAMPLES, WIDTH), np.float32)
Y = np.random.default_rng(1).integers(0, CLASSES, EXAMPLES).astype(np.int32)
TX = optax.sgd(0.1, momentum=0.9)


class Block(nnx.Module):
    def __init__(self, norm, rngs):
        self.frozen_params = frozenset()
        self.wide = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.narrow = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs) if norm else None

    def __call__(self, x):
        hidden = jax.nn.gelu(self.wide(x))
        x = x + self.narrow(jax.nn.gelu(hidden * jax.nn.sigmoid(hidden)))
        return x if self.norm is None else self.norm(x)


class Net(nnx.Module):
    """Three blocks and a head, or as many as asked for."""

    def __init__(self, *, norm=False, depth=3, scan=False):
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([Block(norm, rngs) for _ in range(depth)])
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)
        self.scan = scan

    def __call__(self, x):
        if self.scan:
            return self.head(scan_blocks(self.blocks, x))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss_fn(model, inputs, labels):
    return optax.softmax_cross_entropy_with_integer_labels(model(*inputs), labels).mean()


class Made:
    """A network with its optimizer and its step, on one device or on a mesh."""

    def __init__(self, mesh=None, *, remat=False, accumulate=1, frozen=(), tx=TX, **network):
        self.mesh = None if mesh is None else meshes.make_mesh(mesh, batch_size=EXAMPLES, accumulate=accumulate)
        self.model = Net(**network)
        layers = sfj.nnx.find_layers(self.model, X)
        self.optimizer = sfj.nnx.Optimizer(self.model, tx, layers=layers)
        self.optimizer.freeze(self.model, [name for name in layers.names if name.startswith(tuple(frozen))])
        if self.mesh is not None:
            meshes.place_module(self.model, self.mesh)
            meshes.place_module(self.optimizer, self.mesh)
        of_examples = recomputed(loss_fn, remat=remat, mesh=self.mesh)
        step = make_step(of_examples)
        if accumulate > 1:
            step = accumulating_step(of_examples, lambda *examples: examples, accumulate, self.mesh)
        self.step = sfj.TrainStep(meshes.pinned(step, self.mesh))
        batch = ((X,), Y)
        self.batch = jax.device_put(batch) if mesh is None else jax.device_put(batch, meshes.by_example(self.mesh))

    def run(self, steps=3):
        """Losses, and arrays by name."""
        losses = [float(self.step(self.model, self.optimizer, *self.batch)) for _ in range(steps)]
        arrays = paths.flatten(nnx.as_pure(nnx.state(self.model)))
        return losses, {name: np.array(leaf) for name, leaf in arrays.items()}

    @property
    def cost(self):
        """Of the step's program, which is compiled and not run."""
        return self.step.program(self.model, self.optimizer, *self.batch).cost
