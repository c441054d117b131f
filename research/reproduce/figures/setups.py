"""What the figures are made of: on this scale here, and on the paper's."""

from __future__ import annotations

from collections.abc import Mapping

from research.reproduce.plans import AS_PUBLISHED, FINE_TUNED, Scale, Setup

_LITE = {"--weights": "efficientnet_lite0.safetensors"}
_MINILM = {"--weights": "minilm.safetensors", "--vocab": "vocab.txt"}
_FEW = ("--epochs", "1", "--batch-size", "16", "--learning-rate", "0.01", "--train-split", "train[:256]")


def _small(network: str, model: str, size: int, files: Mapping[str, str] | None = None) -> Setup:
    options = ("--model", model, "--data", "cifar10", "--image-size", str(size), "--augment", "none", *_FEW)
    return Setup(network, "CIFAR-10", options, files or {})


_MINILM_COLA = ("--model", "minilm", "--data", "glue/cola", "--max-tokens", "24", "--optimizer", "adamw")
_LITE_CIFAR100 = ("--model", "efficientnet-lite0", "--data", "cifar100", "--image-size", "48", "--augment", "flip-crop")

# Figure 3: every kind of layer; steps before the gradients, by scale.
GRADIENT_STEPS: dict[Scale, int] = {"cpu": 5, "paper": 200}
GRADIENTS: dict[Scale, tuple[Setup, ...]] = {
    "cpu": (
        _small("ResNet50", "resnet50", 32),
        _small("EfficientNet-Lite0", "efficientnet-lite0", 48, _LITE),
        _small("DeiT-T", "deit-tiny", 32),
        Setup("MiniLM", "CoLA", (*_MINILM_COLA, *_FEW), _MINILM),
        _small("VGG11", "vgg11", 32),
    ),
    "paper": tuple(setup for setup in FINE_TUNED if setup.data == "CIFAR-10"),
}

# Figure 4: one network that is known to the end, and trains again.
SIMILARITIES: dict[Scale, tuple[Setup, ...]] = {
    "paper": tuple(setup for setup in FINE_TUNED if (setup.network, setup.data) == ("ResNet50", "CIFAR-10")),
    "cpu": (),  # of recordings that are there
}

# Figure 5: what a step holds while layers freeze.
_SHORT = ("--train-split", "train[:1024]", "--epochs", "5", "--batch-size", "32", "--min-saving", "0.05")
MEMORY: dict[Scale, tuple[Setup, ...]] = {
    "cpu": (
        Setup(
            "EfficientNet-Lite0",
            "CIFAR-100",
            (*_LITE_CIFAR100, *_SHORT, "--learning-rate", "0.01", "--evaluation-split", "test[:1000]"),
            _LITE,
        ),
        Setup("MiniLM", "CoLA", (*_MINILM_COLA, *_SHORT, "--learning-rate", "1e-4"), _MINILM),
    ),
    "paper": tuple(setup for setup in FINE_TUNED if setup.data == "CIFAR-100" and setup.network != "DeiT-T"),
}
MEMORY_POLICIES = {"SmartFRZ": AS_PUBLISHED, "default": ("--policy", "smartfrz")}
