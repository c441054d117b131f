"""A training run of a small network, under a policy that freezes what it is told."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import smartfrz_jax as sfj

WIDTH, DEPTH = 8, 4
X = jax.random.normal(jax.random.key(1), (16, WIDTH))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(DEPTH)])

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


def loss_fn(model, x):
    return ((model(x) - 0.5) ** 2).mean()


def decided(at: dict[int, tuple[str, ...]]) -> sfj.Policy:
    """Freezes what it is told, from the steps on that it is told; the sets are whole sets, so they may shrink."""

    def init(layers, params):
        return {}

    def update(state, layers, *, step, **signals):
        names = [names for since, names in at.items() if step >= since]
        return frozenset(names[-1] if names else ()), state

    return sfj.Policy(init, update, "decided")


NAMES = tuple(f"layers/{i}" for i in range(DEPTH))
TX = optax.adam(0.01)


class Loop:
    """A training run."""

    def __init__(self, policy, *, account=False, max_programs=8, **options):
        self.model = Net(nnx.Rngs(0))
        self.layers = sfj.nnx.find_layers(self.model, X)
        self.optimizer = sfj.nnx.Optimizer(self.model, TX, layers=self.layers)
        self.traces = 0

        def train_step(model, optimizer, x):
            self.traces += 1
            loss, grads = optimizer.value_and_grad(loss_fn)(model, x)
            optimizer.update(model, grads)
            return loss

        costs = sfj.nnx.account(self.model, self.layers, loss_fn, X, tx=TX) if account else None
        self.step = sfj.TrainStep(train_step, account=costs, max_programs=max_programs)
        self.freezer = sfj.nnx.Freezer(self.model, self.optimizer, policy, train_step=self.step, **options)
        self.frozen = []

    def run(self, steps):
        for _ in range(steps):
            loss = self.step(self.model, self.optimizer, X)
            self.frozen.append(len(self.optimizer.frozen.names))
            self.freezer.step(loss=loss)
        return self

    @property
    def params(self):
        return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(self.model)))
