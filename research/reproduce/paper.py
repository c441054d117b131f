"""What the tables of the paper say (arXiv 2401.16720): accuracy in percent, time in seconds or minutes, TFLOPs."""

from __future__ import annotations

from typing import NamedTuple

FULL, LINEAR, AUTOFREEZE, SMARTFRZ, SIMILARITY = "Full", "Linear", "AutoFreeze", "SmartFRZ", "Similarity-guided"


class Said(NamedTuple):
    """A row of a table.

    Attributes:
        network: The network.
        data: The data set.
        method: What freezes, as the paper calls it.
        accuracy: Percent; None where it cannot be read.
        time: In the unit of the table; None where it has none.
        tflops: Compute; None where the table has none.
    """

    network: str
    data: str
    method: str
    accuracy: float | None
    time: float | None = None
    tflops: float | None = None


def _rows(text: str) -> tuple[Said, ...]:
    """Four methods a line, each with accuracy, time and, of Table 2, TFLOPs."""
    rows = []
    for network, data, *figures in map(str.split, text.strip().splitlines()):
        width = len(figures) // 4
        for place, method in enumerate((FULL, LINEAR, AUTOFREEZE, SMARTFRZ)):
            rows.append(Said(network, data, method, *map(float, figures[place * width : (place + 1) * width])))
    return tuple(rows)


TABLES: dict[int, tuple[Said, ...]] = {
    1: (
        Said("ResNet50", "CIFAR-100", FULL, 81.68, None, 12360),
        Said("ResNet50", "CIFAR-100", SIMILARITY, 81.75, None, 6454),
        Said("VGG11", "CIFAR-100", FULL, 74.95, None, 22950),
        Said("VGG11", "CIFAR-100", SIMILARITY, 74.89, None, 12811),
    ),
    2: _rows("""
        ResNet50    CIFAR-10  96.10 2594 12360  96.05 1980 8247  96.24 2424 8716  96.12 1955 8122
        VGG11       CIFAR-10  93.36 2698 22950  92.35 1587 10291  93.08 1895 13350  93.58 1554 10059
        MobileNetV2 CIFAR-10  94.15 1369 960  94.19 977 567  94.26 1245 678  94.03 972 561
        DeiT-T      CIFAR-10  97.48 14603 32400  97.06 8760 16290  97.35 10368 17786  97.65 8662 15529
        ResNet50    CIFAR-100 81.68 2500 12360  81.48 1844 7085  81.30 1963 7716  81.73 1787 6398
        VGG11       CIFAR-100 74.95 2703 22950  73.26 1846 12307  74.74 2027 13946  74.66 1831 12121
        MobileNetV2 CIFAR-100 76.52 1371 960  75.59 1000 540  76.43 1248 652  76.73 986 532
        DeiT-T      CIFAR-100 85.03 14628 32400  83.89 9956 17542  84.59 11154 18710  84.82 9599 16636
    """),
    3: _rows("""
        ResNet50 CIFAR-10 77.48 711  74.99 615  72.82 630  77.64 538
        ResNet50 ImageNet 76.89 780  75.45 626  74.06 682  76.80 621
    """),
    4: tuple(
        Said(network, "CIFAR-100", f"window {size}", accuracy)
        for network, accuracies in (("ResNet50", (81.17, 81.73, 81.75, 82.11)), ("VGG11", (74.45, 74.66, 75.11, 74.67)))
        for size, accuracy in zip((20, 30, 40, 50), accuracies, strict=True)
    ),
    5: tuple(
        Said(network, "CIFAR-100", f"size {size}", accuracy)
        for network, accuracies in (("ResNet50", (81.28, 81.73, 81.33, None)), ("VGG11", (73.98, 74.66, 74.48, None)))
        for size, accuracy in zip((512, 1024, 2048, 4096), accuracies, strict=True)
    ),  # those of 4096 are cut off in the text at hand
    6: _rows("""
        BERT-base MRPC 86.51 316  85.80 221  86.02 266  86.76 215
        BERT-base CoLA 56.65 723  55.90 429  56.05 431  56.66 423
    """),
    7: _rows("DeiT-T ImageNet 72.21 2190  71.19 1817  71.55 1815  72.06 1801"),
    8: tuple(
        Said("ResNet50", "CIFAR-10", f"t0 {t0}", accuracy, seconds)
        for t0, accuracy, seconds in ((0.3, 95.62, 1989), (0.4, 95.81, 1986), (0.5, 96.05, 1980), (0.6, 95.97, 2015))
    ),
    9: tuple(
        Said("ResNet50", "CIFAR-10", f"M {m}", accuracy, seconds)
        for m, accuracy, seconds in ((2, 96.19, 2536), (3, 96.28, 2487), (4, 96.24, 2424), (5, 95.69, 2378))
    ),
}  # fmt: skip
