"""What a compiled step costs with layers frozen, by the compiler's own account."""

import jax
import jax.numpy as jnp
import optax
import pytest

from smartfrz_jax import Frozen, find_layers
from smartfrz_jax.freezing import transform

pytestmark = pytest.mark.usefixtures("jax_defaults")

# The cost of a compiled step. All layers of the deep network cost the same forward: one unit.
DEPTH, WIDTH, BATCH = 8, 64, 512
DEEP = {f"l{i}": {"kernel": jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)} for i in range(DEPTH)}
UNIT = 2 * BATCH * WIDTH * WIDTH


def deep_loss(params, x):
    for i in range(DEPTH):
        x = jax.nn.relu(x @ params[f"l{i}"]["kernel"])
    return jnp.mean(x)


DEEP_X = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)
DEEP_LAYERS = find_layers(DEEP, deep_loss, DEEP_X)


def units(tx, frozen, *, norm=False, ema=False) -> float:
    """Forward passes of one layer that a compiled step costs."""

    def step(params, average, state, x):
        value, grads = transform.value_and_grad(deep_loss, frozen)(params, x)
        updates, state = transform.freeze(tx, frozen).update(grads, state, params)
        params = transform.apply_updates(params, updates, frozen)
        average = optax.incremental_update(params, average, 0.1) if ema else average
        return params, average, state, value, optax.tree.norm(grads) if norm else 0.0

    state = jax.eval_shape(transform.freeze(tx, frozen).init, DEEP)
    compiled = jax.jit(step).lower(DEEP, DEEP, state, DEEP_X).compile()
    return compiled.cost_analysis()["flops"] / UNIT


def expected_units(frozen: set[int]) -> int:
    """Forward; weight gradients of active layers; activation gradients of all behind the first active one."""
    active = [i for i in range(DEPTH) if i not in frozen]
    return DEPTH + len(active) + (DEPTH - 1 - active[0] if active else 0)


@pytest.mark.parametrize(
    "frozen", [(), range(2), range(4), range(6), range(8), (3,), (0, 1, 5, 6)], ids=lambda frozen: str(list(frozen))
)
@pytest.mark.parametrize(
    ("tx", "extra"),
    [
        (optax.sgd(0.1, momentum=0.9), {}),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)), {"norm": True, "ema": True}),
    ],
    ids=["momentum", "clip, adamw, norm, ema"],
)
def test_compiled_step_gets_cheaper_by_the_expected_share(tx, extra, frozen):
    got = units(tx, Frozen(DEEP_LAYERS, frozenset(f"l{i}" for i in frozen)), **extra)
    assert expected_units(set(frozen)) <= got < expected_units(set(frozen)) + 0.6


@pytest.mark.parametrize(
    ("tx", "extra"),
    [
        (optax.adamw(0.1, weight_decay=0.1), {}),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), {}),
        (optax.sgd(0.1), {"norm": True}),
        (optax.sgd(0.1), {"ema": True}),
        (optax.apply_if_finite(optax.adam(0.1), 3), {}),
        (optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(), {}),
    ],
    ids=["adamw", "clip", "norm", "ema", "apply_if_finite", "MultiSteps"],
)
def test_nothing_brings_the_cost_of_frozen_layers_back(tx, extra):
    got = units(tx, Frozen(DEEP_LAYERS, frozenset(f"l{i}" for i in range(6))), **extra)
    assert expected_units(set(range(6))) <= got < expected_units(set(range(6))) + 0.6


@pytest.mark.slow
def test_convolutions_get_cheaper():
    params = {f"c{i}": jax.ShapeDtypeStruct((3, 3, 16, 16), jnp.float32) for i in range(4)}
    x = jax.ShapeDtypeStruct((8, 16, 16, 16), jnp.float32)

    def loss(params, x):
        for i in range(4):
            dims = ("NHWC", "HWIO", "NHWC")
            x = jax.nn.relu(jax.lax.conv_general_dilated(x, params[f"c{i}"], (1, 1), "VALID", dimension_numbers=dims))
        return jnp.mean(x)

    layers = find_layers(params, loss, x)

    def flops(names):
        frozen = Frozen(layers, frozenset(names))
        step = jax.jit(transform.value_and_grad(loss, frozen))
        return step.lower(params, x).compile().cost_analysis()["flops"]

    forward = [2 * 8 * side**2 * 9 * 16 * 16 for side in (14, 12, 10, 8)]
    for count in range(4):
        # The activation gradient of a VALID convolution is counted with its padding by some compilers: not below.
        expected = sum(forward) + sum(forward[count:]) + sum(forward[count + 1 :])
        assert flops([f"c{i}" for i in range(count)]) == pytest.approx(expected, rel=0.12)
    assert flops(params) == pytest.approx(sum(forward), rel=0.05)


def test_memory_of_a_compiled_step_falls():
    def temporary(names):
        frozen = Frozen(DEEP_LAYERS, frozenset(names))
        compiled = jax.jit(transform.value_and_grad(deep_loss, frozen)).lower(DEEP, DEEP_X).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    activation = 4 * BATCH * WIDTH
    assert temporary(()) - temporary([f"l{i}" for i in range(6)]) >= 4 * activation
