"""Which runs a table of the paper is made of: on this scale here, and on the paper's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from research.reproduce.paper import AUTOFREEZE, FULL, LINEAR, SIMILARITY, SMARTFRZ
from research.reproduce.predictors.settings import SIZES, WINDOWS, Setting

Scale = Literal["cpu", "paper"]


class Setup(NamedTuple):
    """A fine-tuning on the paper's scale, by ``train.finetune``.

    Attributes:
        network: The network, as the paper calls it.
        data: The data, as the paper calls it.
        options: Options of ``train.finetune`` that say so, but for files, data directory, policy and seed.
        files: Options that name files of the folder of published weights.
    """

    network: str
    data: str
    options: tuple[str, ...]
    files: Mapping[str, str]


class Plan(NamedTuple):
    """How a table is made again.

    Attributes:
        title: What it compares.
        cases: Cases of :mod:`research.long_runs` in place of the paper's networks.
        strategies: Methods of the paper, by the name of the strategy in :mod:`research.long_runs`.
        setups: The paper's own.
        policies: Options of ``train.finetune`` that choose each method.
        missing: What is not run here, and why.
        small: Fine-tunings by ``train.finetune`` on this scale, where no case of :mod:`research.long_runs` will do.
        settings: Predictors that the policies take, from the folder of unfinished runs.
    """

    title: str
    cases: tuple[str, ...]
    strategies: Mapping[str, str]
    setups: tuple[Setup, ...]
    policies: Mapping[str, tuple[str, ...]]
    missing: str = ""
    small: tuple[Setup, ...] = ()
    settings: tuple[Setting, ...] = ()


_FOUR = {"never": FULL, "freezeout": LINEAR, "autofreeze": AUTOFREEZE, "paper": SMARTFRZ}
# As published: the predictor of raw weights, trained on labels from CKA, judges every layer alone.
_RULE = ("--policy", "smartfrz", "--order", "any", "--patience", "1", "--caution", "0.5")
AS_PUBLISHED = (*_RULE, "--predictor", "paper")
_POLICIES = {
    FULL: ("--policy", "never"),
    LINEAR: ("--policy", "freezeout"),
    AUTOFREEZE: ("--policy", "autofreeze"),
    SMARTFRZ: AS_PUBLISHED,
}
_SGD = ("--optimizer", "sgd", "--learning-rate", "0.01", "--batch-size", "32")
_TEXT = ("--epochs", "5", "--optimizer", "adamw", "--learning-rate", "2e-5", "--batch-size", "32")
_IMAGES = ("--image-size", "224", "--augment", "flip-crop")


def _tuned(network: str, model: str, data: str, epochs: int) -> Setup:
    options = ("--model", model, "--data", data.lower().replace("-", ""), "--epochs", str(epochs), *_SGD, *_IMAGES)
    return Setup(network, data, options, {"--weights": f"{model}.safetensors"})


_NETWORKS = (("ResNet50", "resnet50"), ("VGG11", "vgg11"), ("MobileNetV2", "mobilenetv2"), ("DeiT-T", "deit-tiny"))
FINE_TUNED = tuple(
    _tuned(network, model, data, 100 if network == "DeiT-T" else 10)
    for data in ("CIFAR-10", "CIFAR-100")
    for network, model in _NETWORKS
)
_SCRATCH = Setup(
    "ResNet50, scratch",
    "CIFAR-10",
    ("--model", "resnet50", "--data", "cifar10", "--epochs", "160", *_SGD, *_IMAGES),
    {},
)
# As DeiT and torchvision train them; the paper does not say otherwise.
_IMAGENET = ("--data", "imagenet2012", "--image-size", "224", "--batch-size", "256")
_RESNET_SCRATCH = Setup(
    "ResNet50",
    "ImageNet",
    ("--model", "resnet50", *_IMAGENET, "--epochs", "100", "--augment", "resized-crop", "--learning-rate", "0.1",
     "--weight-decay", "1e-4"),
    {},
)  # fmt: skip
_DEIT_SCRATCH = Setup(
    "DeiT-T",
    "ImageNet",
    ("--model", "deit-tiny", *_IMAGENET, "--epochs", "300", "--augment", "deit", "--optimizer", "adamw",
     "--learning-rate", "2.5e-4", "--weight-decay", "0.05", "--warmup-epochs", "5"),
    {},
)  # fmt: skip
# CIFAR-10, as of so few examples of CIFAR-100 it learns next to nothing: 8 % of the test images.
_LITE = Setup(
    "EfficientNet-Lite0",
    "CIFAR-10",
    ("--model", "efficientnet-lite0", "--data", "cifar10", "--image-size", "48", "--augment", "flip-crop", "--epochs",
     "5", "--batch-size", "32", "--learning-rate", "0.01", "--train-split", "train[:4096]", "--evaluation-split",
     "test[:2000]", "--min-saving", "0.05"),
    {"--weights": "efficientnet_lite0.safetensors"},
)  # fmt: skip
_BERT = {"--weights": "bert-base.safetensors", "--vocab": "vocab.txt"}
_RESNET = FINE_TUNED[0]
_NO_IMAGENET = "ImageNet, which is not in the box; prepared with TFDS, it is run by `--scale paper`."
_ON_CIFAR100 = tuple(
    setup for setup in FINE_TUNED if setup.data == "CIFAR-100" and setup.network in ("ResNet50", "VGG11")
)


def _predictors(title: str, settings: tuple[Setting, ...], of: str) -> Plan:
    """A table of predictors that differ in one thing, each made here from small runs."""
    policies = {
        f"{of} {getattr(setting, of)}": (
            *_RULE, "--predictor", f"{{state}}/predictors/{setting.name}", "--window", str(setting.window)
        )
        for setting in settings
    }  # fmt: skip
    return Plan(title, (), {}, _ON_CIFAR100, {FULL: _POLICIES[FULL]} | policies, small=(_LITE,), settings=settings)


PLANS: dict[str, Plan] = {
    "table1": Plan(
        "layers frozen by a network trained before, against full training",
        ("lite0-cifar100",),
        {"never": FULL, "similarity_guided": SIMILARITY},
        (),
        {},
        "On the paper's scale: `train.finetune --policy similarity_guided --reference` from a finished run of table2.",
    ),
    "table2": Plan("fine-tuning", ("lite0-cifar10", "lite0-cifar100"), _FOUR, FINE_TUNED, _POLICIES),
    "table3": Plan(
        "training from scratch",
        ("resnet20-cifar10-scratch",),
        _FOUR,
        (_SCRATCH, _RESNET_SCRATCH),
        _POLICIES,
        _NO_IMAGENET,
    ),
    "table4": _predictors("how many records the predictor sees", WINDOWS, "window"),
    "table5": _predictors("how many weights of a layer it sees", SIZES, "size"),
    "table6": Plan(
        "text",
        ("minilm-mrpc", "minilm-cola"),
        _FOUR,
        tuple(
            Setup("BERT-base", data, ("--model", "bert-base", "--data", f"glue/{data.lower()}", *_TEXT), _BERT)
            for data in ("MRPC", "CoLA")
        ),
        _POLICIES,
    ),
    "table7": Plan("a transformer from scratch", (), {}, (_DEIT_SCRATCH,), _POLICIES, _NO_IMAGENET),
    "table8": Plan(
        "when FreezeOut freezes its first layer",
        ("resnet20-cifar10",),
        {f"freezeout:{t0}": f"t0 {t0}" for t0 in (0.3, 0.4, 0.6)} | {"freezeout": "t0 0.5"},
        (_RESNET,),
        {f"t0 {t0}": ("--policy", "freezeout", "--t0", str(t0)) for t0 in (0.3, 0.4, 0.5, 0.6)},
    ),
    "table9": Plan(
        "how often AutoFreeze decides",
        ("resnet20-cifar10",),
        {f"autofreeze:{m}": f"M {m}" for m in (2, 3, 5)} | {"autofreeze": "M 4"},
        (_RESNET,),
        {f"M {m}": ("--policy", "autofreeze", "--evaluations-per-epoch", str(m)) for m in (2, 3, 4, 5)},
    ),
}
