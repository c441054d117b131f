"""Ways to fine-tune a decoder with less memory: frozen sets, fixed or taking turns, and adapters of low rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

import smartfrz_jax as sfj
from models.llama import Llama
from train.data.language.perplexity import next_token_loss
from train.loop import make_step

NAMES = ("full", "bottom_half", "lisa", "lisa_blocks", "badam", "lora", "lisa_blocks_kept", "badam_kept")
RANK = 8
_TURNS = 5  # of lisa in a run; badam has twice as many


class Training(NamedTuple):
    """A strategy at work.

    Attributes:
        step: From inputs and labels to the loss; it changes the model.
        cost: Of the program that the last step ran.
        programs: How many there are.
        compile_seconds: Time for all of them.
    """

    step: Callable[[Any, Any], jax.Array]
    cost: Callable[[], sfj.cost.ProgramCost]
    programs: Callable[[], int]
    compile_seconds: Callable[[], float]


def loss_fn(model: Llama, inputs: tuple[Any, ...], labels: jax.Array) -> jax.Array:
    """Mean cross entropy of the next token."""
    return next_token_loss(model(*inputs), labels)


def make(
    name: str, model: Llama, inputs: tuple[Any, ...], labels: Any, *, rate: float, steps: int, seed: int
) -> Training:
    """A strategy for a network with a head of its own.

    Args:
        name: One of ``NAMES``. ``lisa`` trains embeddings, norm and head beside two blocks, as the paper does;
            ``lisa_blocks`` the two blocks alone, ``badam`` one block and the head. With ``_kept``, blocks return
            with the moments they had; else with fresh ones.
        model: The network.
        inputs: Of a batch.
        labels: Of a batch.
        rate: Learning rate of AdamW.
        steps: Length of the run.
        seed: Of draws, and of adapters.
    """
    if name == "lora":
        return _lora(model, inputs, labels, rate, seed)
    layers = sfj.nnx.find_layers(model, *inputs, granularity="block")
    name, kept, _ = name.partition("_kept")
    returning = "kept" if kept else "fresh"
    turn = max(1, steps // _TURNS)
    policy, frozen = sfj.policies.never(), ()
    match name:
        case "bottom_half":
            frozen = layers.names[: 1 + len(model.layers) // 2]
        case "lisa":
            policy = sfj.policies.lisa(_active(model), switch_every=turn, seed=seed)
        case "lisa_blocks":
            policy = sfj.policies.lisa(_active(model), switch_every=turn, rest="freeze", seed=seed, keep=())
        case "badam":
            policy = sfj.policies.badam(max(1, turn // 2), seed=seed)
    optimizer = sfj.nnx.Optimizer(model, optax.adamw(rate), layers=layers, returning=returning, frozen=frozen or policy)
    train_step = sfj.TrainStep(make_step(loss_fn), donate=True, max_programs=2 * _TURNS + 2)
    freezer = sfj.nnx.Freezer(model, optimizer, policy, train_step=train_step)
    freezer.start()

    def step(inputs: Any, labels: Any) -> jax.Array:
        loss = train_step(model, optimizer, inputs, labels)
        freezer.step(loss=loss)
        return loss

    def cost() -> sfj.cost.ProgramCost:
        assert train_step.last is not None
        return train_step.last.cost

    return Training(step, cost, lambda: len(train_step.programs), lambda: train_step.compile_seconds)


def _active(model: Llama) -> int:
    return min(2, len(model.layers) - 1)


def _lora(model: Llama, inputs: tuple[Any, ...], labels: Any, rate: float, seed: int) -> Training:
    rngs = nnx.Rngs(seed)
    for layer in model.layers:
        for name in ("q_proj", "v_proj"):
            base = getattr(layer.self_attn, name)
            setattr(
                layer.self_attn,
                name,
                nnx.LoRA(base.in_features, RANK, base.out_features, base_module=base, rngs=rngs),
            )
    optimizer = nnx.Optimizer(model, optax.adamw(rate), wrt=nnx.LoRAParam)

    @nnx.jit(donate_argnums=(0, 1))
    def train_step(model: Llama, optimizer: nnx.Optimizer, inputs: Any, labels: Any) -> jax.Array:
        of_adapters = nnx.DiffState(0, nnx.LoRAParam)
        loss, grads = nnx.value_and_grad(loss_fn, argnums=of_adapters)(model, inputs, labels)
        optimizer.update(model, grads)
        return loss

    cost = sfj.program_cost(train_step, model, optimizer, inputs, labels)
    seconds = cost.trace_seconds + cost.compile_seconds
    return Training(
        lambda inputs, labels: train_step(model, optimizer, inputs, labels),
        lambda: cost,
        lambda: 1,
        lambda: seconds,
    )
