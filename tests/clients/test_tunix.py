"""Tunix's own models as clients: with nothing frozen every bit is as in its loop; a freeze holds and saves."""

import numpy as np
import optax
import pytest
from flax import nnx

from tests.clients.doors import Freezing, NnxRun, Stock, assert_equal, flops

REASON = "needs google-tunix: `make test-tunix` installs it"
tunix_models = pytest.importorskip("tests.clients.tunix_models", reason=REASON)
qwix = pytest.importorskip("qwix", reason=REASON)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("jax_defaults"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # theirs
]

ADAPTED = ".*(q_proj|k_proj|v_proj|o_proj|q_einsum|kv_einsum|attn_vec_einsum|gate_proj|up_proj|down_proj)"


def run_of(door, model, wrt):
    """Tunix's train step, of ``PeftTrainer``."""
    inputs = [tunix_models.BATCH[name] for name in ("input_tokens", "positions", "attention_mask")]
    optimizer = door.optimizer(
        model,
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
        *inputs,
        wrt=wrt,
        forward=lambda model, tokens, positions, mask: model(tokens, positions, None, mask)[0],
    )

    def train_step(model, optimizer, batch):
        grad_fn = door.grads_of(optimizer, tunix_models.loss_fn)
        loss, grads = grad_fn(model, **batch)
        grad_norm = optax.global_norm(grads)
        optimizer.update(model, grads)
        return loss + 0 * grad_norm

    paths = ("/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, wrt)))
    first = [path for path in paths if path.startswith("layers/0/")]
    return NnxRun(
        door.jit(train_step, model),
        {"model": model, "optimizer": optimizer},
        (tunix_models.BATCH,),
        {("model", "optimizer"): lambda layers: [layer.name for layer in layers if layer.kernels[0] in first]},
    )


def check(make, wrt):
    stock, run = run_of(Stock(), make(), wrt), run_of(Freezing(), make(), wrt)
    start = stock.arrays()
    for _ in range(3):
        np.testing.assert_array_equal(run.advance(), stock.advance())
    assert_equal(run.arrays(), stock.arrays())

    (held, active), before = run.freeze(), run.arrays()
    for _ in range(2):
        run.advance()
    after = run.arrays()
    assert_equal({name: after[name] for name in held}, {name: before[name] for name in held})
    assert not [name for name in active if np.array_equal(after[name], before[name])]
    unfrozen, frozen = flops(run)
    assert frozen < unfrozen
    return start, after


@pytest.mark.parametrize("make", tunix_models.MODELS, ids=lambda make: make.__name__.removeprefix("make_"))
def test_fine_tuning(make):
    check(make, nnx.Param)


@pytest.mark.parametrize("make", tunix_models.MODELS[::4], ids=lambda make: make.__name__.removeprefix("make_"))
def test_lora_trains_adapters_alone(make):
    def adapted():
        provider = qwix.LoraProvider(module_path=ADAPTED, rank=2, alpha=2.0)
        batch = tunix_models.BATCH
        arguments = batch["input_tokens"], batch["positions"], None, batch["attention_mask"]
        return qwix.apply_lora_to_model(make(), provider, *arguments, rngs=nnx.Rngs(1))

    before, after = check(adapted, nnx.LoRAParam)
    base = [name for name in before if "lora" not in name]
    assert len(base) < len(before)
    assert_equal({name: after[name] for name in base}, {name: before[name] for name in base})
