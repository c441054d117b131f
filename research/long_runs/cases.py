"""The long fine-tunings."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from models.bert import minilm
from models.efficientnet_lite import efficientnet_lite0
from models.resnet import BasicBlock, ResNet
from research.recordings.architectures import Architecture
from train.optimizers import OptimizerName


class Case(NamedTuple):
    """A fine-tuning.

    Attributes:
        architecture: The network, and the size at which it reads its images.
        data: Name of the TFDS set.
        weights: Where its weights come from: ``published``; the name of the case that trained them (its weights are in
            the folder ``weights``, unless it has run here); None from scratch.
        epochs: Times that every example is seen.
        batch_size: Examples of a step.
        optimizer: ``sgd`` has momentum 0.9.
        rates: Peaks of the cosine, without warm-up, of which the best on held-out training examples is taken; a single
            one is taken untried.
        tuning_epochs: Length of the runs in which they are tried.
        weight_decay: Of kernels and embeddings.
        augment: Whether images are mirrored and shifted by an eighth of their size.
        tokens: Tokens that are kept of a text.
    """

    architecture: Architecture
    data: str
    weights: str | None
    epochs: float
    batch_size: int
    optimizer: OptimizerName
    rates: tuple[float, ...]
    tuning_epochs: int
    weight_decay: float
    augment: bool
    tokens: int | None = None


# 48 x 48, where the paper has 224 x 224; ten epochs take 70 minutes of one core. At 32 x 32 they take 40, but there the
# last stages see one pixel, BatchNorm 32 values, and little is left of the pre-training.
_LITE = Architecture(efficientnet_lite0, 48, (32,), (), {}, published="efficientnet_lite0.safetensors")
# Nearer to the size of the pre-training; an epoch takes an hour.
_LITE_AT_96 = _LITE._replace(size=96)
# 20 x 20: ten epochs take about 20 minutes.
_RESNET = Architecture(partial(ResNet, (3, 3, 3), (16, 32, 64), BasicBlock, stem="cifar"), 20, (32,), (), {})
# 80 tokens cut 1.6 % of MRPC's training pairs short, 24 tokens 1.1 % of CoLA's sentences; 15 to 25 minutes.
_MINILM = Architecture(partial(minilm, pool="mean"), 0, (32,), (), {}, text=True, batch_norm=False, published="minilm")
_TUNED_IN = 3
_TEXT_RATES = (5e-5, 1e-4, 2e-4, 4e-4)
_LITE_RATES = (0.001, 0.003, 0.01, 0.03)
_RESNET_RATES = (0.005, 0.015, 0.05, 0.15)


def _resnet(data: str, weights: str | None, epochs: int, rates: tuple[float, ...]) -> Case:
    return Case(_RESNET, data, weights, epochs, 32, "sgd", rates, min(_TUNED_IN, epochs), 5e-4, augment=True)


def _lite(data: str) -> Case:
    return Case(_LITE, data, "published", 10, 32, "sgd", _LITE_RATES, 2, 1e-4, augment=True)


def _at_96(case: Case, rate: float) -> Case:
    """The same on larger images, with the learning rate that is best on smaller ones."""
    return case._replace(architecture=_LITE_AT_96, rates=(rate,))


def _minilm(data: str, tokens: int) -> Case:
    return Case(_MINILM, data, "published", 5, 32, "adamw", _TEXT_RATES, 2, 0.01, augment=False, tokens=tokens)


def _shortened(case: Case, epochs: int) -> Case:
    """The same in fewer epochs, with a learning rate of its own."""
    return case._replace(epochs=epochs, tuning_epochs=min(case.tuning_epochs, epochs))


_SCRATCH_RATES = (0.02, 0.05, 0.1)
_WHOLE = {
    "lite0-cifar10": _lite("cifar10"),
    "lite0-cifar100": _lite("cifar100"),
    "minilm-mrpc": _minilm("glue/mrpc", 80),
    "minilm-cola": _minilm("glue/cola", 24),
    "resnet20-cifar100": _resnet("cifar100", None, 30, _SCRATCH_RATES),
    "resnet20-cifar10": _resnet("cifar10", "resnet20-cifar100", 10, _RESNET_RATES),
    "resnet20-cifar10-weak": _resnet("cifar10", "resnet20-cifar100-1-epoch", 10, _RESNET_RATES),
    "resnet20-cifar10-scratch": _resnet("cifar10", None, 20, _SCRATCH_RATES),
}
# Those that are run in one and in three epochs, too; of CIFAR-100 one epoch is a weak pre-training.
_ALSO_SHORT = ("lite0-cifar10", "minilm-mrpc", "minilm-cola", "resnet20-cifar10", "resnet20-cifar10-weak")

CASES: dict[str, Case] = {
    **_WHOLE,
    "resnet20-cifar100-1-epoch": _shortened(_WHOLE["resnet20-cifar100"], 1),
    **{f"{name}-1-epoch": _shortened(_WHOLE[name], 1) for name in _ALSO_SHORT},
    **{f"{name}-3-epochs": _shortened(_WHOLE[name], 3) for name in _ALSO_SHORT},
    "lite0-96-cifar10-1-epoch": _shortened(_at_96(_WHOLE["lite0-cifar10"], 0.01), 1),
}


def tuned_as(name: str) -> str:
    """The first case whose learning rates are tried in the same runs."""
    case = CASES[name]
    return next(other for other in CASES if CASES[other]._replace(epochs=case.epochs) == case)
