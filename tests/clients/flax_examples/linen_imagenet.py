"""Flax's ImageNet example in Linen, at toy size, on two devices: one function makes one run."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import jax_utils
from flax import linen as nn
from flax.training.dynamic_scale import DynamicScale
from jax.sharding import PartitionSpec

from smartfrz_jax.linen import find_layers
from tests.clients.doors import Programs, StateRun

IMAGES = jax.random.uniform(jax.random.key(0), (4, 8, 8, 3))
LABELS = jnp.array([0, 2, 1, 2])


class ResNetBlock(nn.Module):
    norm: Any
    strides: int = 1

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(4, (3, 3), self.strides, use_bias=False, name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y))
        y = nn.Conv(4, (3, 3), use_bias=False, name="conv2")(y)
        y = self.norm(scale_init=nn.initializers.zeros_init(), name="bn2")(y)
        if x.shape != y.shape:
            x = self.norm(name="norm_proj")(nn.Conv(4, (1, 1), self.strides, use_bias=False, name="conv_proj")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Its BatchNorms average over the devices."""

    @nn.compact
    def __call__(self, x, train=True):
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, axis_name="batch")
        x = nn.relu(norm(name="bn_init")(nn.Conv(4, (3, 3), use_bias=False, name="conv_init")(x)))
        x = ResNetBlock(norm, 2, name="block_0")(x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def imagenet_run(door, dynamic_scale):
    """State and step of the example."""

    class TrainState(door.TrainState):
        batch_stats: Any
        dynamic_scale: Any

    model = ResNet()
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), IMAGES)
    state = door.train_state(
        TrainState,
        apply_fn=model.apply,
        params=variables["params"],
        tx=optax.sgd(optax.cosine_decay_schedule(0.1, 10), momentum=0.9, nesterov=True),
        layers=lambda: find_layers(model, variables, IMAGES),
        batch_stats=variables["batch_stats"],
        dynamic_scale=dynamic_scale,
    )

    def train_step(state, images, labels):
        def loss_fn(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, new = state.apply_fn(variables, images, mutable=["batch_stats"])
            penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params) if leaf.ndim > 1)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss + 0.5e-4 * penalty, new

        if state.dynamic_scale is None:
            (loss, new), grads = door.grads_of_params(state, loss_fn, has_aux=True)(state.params)
            grads = jax.lax.pmean(grads, "batch")
        else:
            grad_fn = state.dynamic_scale.value_and_grad(
                door.loss_of_params(state, loss_fn), has_aux=True, axis_name="batch"
            )
            dynamic_scale, is_finite, (loss, new), grads = grad_fn(state.params)
        stepped = state.apply_gradients(grads=grads, batch_stats=new["batch_stats"])
        if state.dynamic_scale is not None:
            keep = partial(jax.tree.map, partial(jnp.where, is_finite))
            stepped = stepped.replace(
                opt_state=keep(stepped.opt_state, state.opt_state),
                params=keep(stepped.params, state.params),
                dynamic_scale=dynamic_scale,
            )
        return stepped, jax.lax.pmean(loss, "batch")

    return state, train_step


FROZEN = ("conv_init", "block_0/conv1")


@dataclasses.dataclass
class ReplicatedRun(StateRun):
    """Its state has an axis of devices, so layers freeze before it is replicated again."""

    pmapped: Any

    def freeze(self):
        self.state = jax_utils.unreplicate(self.state)
        names = super().freeze()
        self.step.renew(self.pmapped)
        self.state = jax_utils.replicate(self.state, jax.devices()[:2])
        return names


def imagenet(door):
    """``jax.pmap``, a dynamic loss scale, a penalty on the weights in the loss."""
    state, train_step = imagenet_run(door, DynamicScale())
    devices = jax.devices()[:2]
    batch = IMAGES.reshape(2, 2, *IMAGES.shape[1:]), LABELS.reshape(2, 2)
    pmapped = jax.pmap(train_step, axis_name="batch", devices=devices)
    return ReplicatedRun(Programs(pmapped), jax_utils.replicate(state, devices), batch, FROZEN, pmapped)


def sharded_imagenet(door):
    """The same under ``jax.shard_map``, in float32."""
    state, train_step = imagenet_run(door, None)
    mesh = jax.make_mesh((2,), ("batch",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    all_of_it, split = PartitionSpec(), PartitionSpec("batch")
    step = jax.shard_map(
        train_step, mesh=mesh, in_specs=(all_of_it, split, split), out_specs=all_of_it, check_vma=False
    )
    return StateRun(door.jit(step), state, (IMAGES, LABELS), FROZEN)


EXAMPLES = (imagenet, sharded_imagenet)
