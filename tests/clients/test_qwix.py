"""qwix as client: LoRA, also beside quantized weights, on a network of one's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.clients.doors import Freezing, NnxRun, Stock, assert_equal, flops

qwix = pytest.importorskip("qwix", reason="needs qwix: `make test-tunix` installs it")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("jax_defaults"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # its own
]

X = jax.random.normal(jax.random.key(0), (4, 8))
Y = jax.random.normal(jax.random.key(1), (4, 3))


class Network(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.second = nnx.Linear(8, 8, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.second(nnx.relu(self.norm(self.first(x))))))


def adapted(**options):
    provider = qwix.LoraProvider(module_path="first|second|head", rank=2, alpha=2.0, **options)
    return qwix.apply_lora_to_model(Network(nnx.Rngs(0)), provider, X, rngs=nnx.Rngs(1))


def run_of(door, model):
    optimizer = door.optimizer(model, optax.adamw(1e-2), X, wrt=nnx.LoRAParam)

    def loss_fn(model, x, y):
        return jnp.square(model(x) - y).mean()

    def train_step(model, optimizer, x, y):
        loss, grads = door.grads_of(optimizer, loss_fn)(model, x, y)
        optimizer.update(model, grads)
        return loss

    modules = {"model": model, "optimizer": optimizer}
    frozen = {("model", "optimizer"): lambda layers: [name for name in layers.names if "first" in name]}
    return NnxRun(door.jit(train_step, model), modules, (X, Y), frozen)


@pytest.mark.parametrize("options", [{}, {"weight_qtype": "nf4", "tile_size": 4}], ids=["lora", "qlora"])
def test_adapters_train_and_freeze(options):
    stock, run = run_of(Stock(), adapted(**options)), run_of(Freezing(), adapted(**options))
    start = stock.arrays()
    for _ in range(3):
        np.testing.assert_array_equal(run.advance(), stock.advance())
    assert_equal(run.arrays(), stock.arrays())

    (held, active), before = run.freeze(), run.arrays()
    for _ in range(2):
        run.advance()
    after = run.arrays()
    base = {name for name in start if "lora" not in name}
    assert held
    assert base
    assert_equal({name: after[name] for name in base}, {name: start[name] for name in base})
    assert_equal({name: after[name] for name in held}, {name: before[name] for name in held})
    assert not [name for name in active if np.array_equal(after[name], before[name])]
    unfrozen, frozen = flops(run)
    assert frozen < unfrozen
