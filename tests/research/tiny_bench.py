"""A case of the long runs that takes a second: few small images, a network of two blocks."""

from functools import partial

import jax

from models.resnet import BasicBlock, ResNet
from research.long_runs.bench import Bench
from research.long_runs.cases import Case
from research.recordings.architectures import Architecture

EXAMPLES, BATCH, EPOCHS = 96, 32, 20


def tiny_bench(state):
    architecture = Architecture(partial(ResNet, (1, 1), (4, 8), BasicBlock, stem="cifar"), 8, (32,), (), {})
    case = Case(architecture, "fashion_mnist", None, EPOCHS, BATCH, "sgd", (0.05,), 1, 5e-4, augment=True)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        made = Bench("tiny", case, state=state, data_dir=None, weights_dir=None)
    made.data = made.data._replace(train=made.data.train[:EXAMPLES], held_out=made.data.held_out[:100])
    return made
