"""The fine-tunings on which policies are compared; no predictor that takes part may have seen their networks."""

from __future__ import annotations

from typing import NamedTuple

from research.recordings.plan import PUBLISHED
from research.recordings.plan import Run as Setup
from research.recordings.sets import BIGRAM_SHIFT


class Case(NamedTuple):
    """A fine-tuning.

    Attributes:
        setup: Network, data, where its weights come from, and how it is trained.
        held_out: Most examples on which it is measured.
    """

    setup: Setup
    held_out: int


# Strong pre-training: ImageNet, fine-tuned on 1,280 images of 96 x 96 for 5 epochs, BatchNorms in evaluation mode.
CASES: dict[str, Case] = {
    "lite0-cifar10": Case(
        Setup(
            architecture="efficientnet-lite0",
            data="cifar10",
            pretraining=PUBLISHED,
            optimizer="adamw",
            schedule="cosine",
            learning_rate=3e-4,
            weight_decay=0.0,
            batch_size=32,
            steps=200,
            examples=1280,
            augment=False,
            batch_norm="fixed",
        ),
        held_out=2000,
    ),
    "minilm-bigram-shift": Case(
        Setup(
            architecture="minilm",
            data=BIGRAM_SHIFT,
            pretraining=PUBLISHED,
            optimizer="adamw",
            schedule="cosine",
            learning_rate=1e-4,
            weight_decay=0.01,
            batch_size=16,
            steps=240,
            examples=1600,
            augment=False,
            batch_norm="none",
        ),
        held_out=2000,
    ),
    "resnet14-weak": Case(
        Setup(
            architecture="resnet14",
            data="cifar10",
            pretraining="cifar100:weak",
            optimizer="sgd",
            schedule="cosine",
            learning_rate=0.03,
            weight_decay=5e-4,
            batch_size=32,
            steps=600,
            examples=4000,
            augment=False,
            batch_norm="train",
        ),
        held_out=4000,
    ),
    "vgg9-bn-good": Case(
        Setup(
            architecture="vgg9-bn",
            data="cifar10",
            pretraining="cifar100:good",
            optimizer="sgd",
            schedule="cosine",
            learning_rate=0.02,
            weight_decay=5e-4,
            batch_size=32,
            steps=600,
            examples=4000,
            augment=False,
            batch_norm="train",
        ),
        held_out=4000,
    ),
}
