"""What predictors of weights differ in, and the runs that they learn from and are judged on."""

from __future__ import annotations

from typing import Literal, NamedTuple

from research.recordings.plan import Run, runs

SIZE = 4096  # weights that are recorded of a layer; the first of them are a smaller sample


class Setting(NamedTuple):
    """A predictor; the paper's but for what is said.

    Attributes:
        window: Records that it sees.
        size: Weights that it sees of a layer.
        weights: The form in which it reads them.
        averaged: Whether records count alike, in place of attention.
    """

    window: int = 30
    size: int = 1024
    weights: Literal["raw", "scale_free"] = "raw"
    averaged: bool = False

    @property
    def name(self) -> str:
        """A name for rows and files."""
        form = "" if self.weights == "raw" else f"-{self.weights}"
        return f"{self.window}x{self.size}{form}{'-averaged' if self.averaged else ''}"


PAPER = Setting()
WINDOWS = tuple(Setting(window=window) for window in (20, 30, 40, 50))  # Table 4
SIZES = tuple(Setting(size=size) for size in (512, 1024, 2048, 4096))  # Table 5
LONG = Setting(window=80)
SCALE_FREE = Setting(weights="scale_free")
AVERAGED = Setting(averaged=True)
# Most valuable first.
SETTINGS = tuple(dict.fromkeys((PAPER, *WINDOWS, *SIZES, AVERAGED, SCALE_FREE, LONG)))

# All on data and networks that no fine-tuning of Tables 4 and 5 has.
LEARNED = ("resnet8-fashion_mnist-scratch-0", "vgg9-fashion_mnist-scratch-0", "mobilenet14-cifar10-scratch-0")
JUDGED = {
    "convolutions": ("bottleneck20-cifar10-scratch-0",),
    "transformers": ("deit6-cifar10-scratch-0", "bert4-glue-cola-scratch-0"),
}


def recorded_runs() -> list[Run]:
    """The runs to record."""
    names = {*LEARNED, *(name for group in JUDGED.values() for name in group)}
    return [run for run in runs() if run.name in names]
