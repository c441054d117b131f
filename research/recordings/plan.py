"""Which runs the training set consists of, always the list that ``research.recordings.collect --list`` prints.

Every architecture learns three data sets (two of text), each from scratch, from weak and from good pre-training, so
that its layers are more or less ready at the start; networks of images also two from strong pre-training, one on
the same classes. Optimizers, schedules, learning rates, batch sizes and lengths are dealt out like cards: in equal
numbers within an architecture (those from strong pre-training apart), and in an order that its name fixes. Small
networks of images learn all of CIFAR-10, too, in one epoch and in three.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from typing import Literal, TypeVar, get_args

from research.recordings.architectures import ARCHITECTURES, Architecture
from research.recordings.schedules import Schedule
from research.recordings.sets import FASHION, WORD_ORDER
from train.optimizers import OptimizerName

T = TypeVar("T")

SCRATCH, PUBLISHED = "scratch", "published"

# For each data set, what the networks are pre-trained on and for how long. Examples are never the same.
_IMAGES = {
    "cifar10": (SCRATCH, "cifar100:weak", "cifar100:good", "cifar10:good"),
    "cifar100": (SCRATCH, "cifar10:weak", "cifar10:good"),
    FASHION: (SCRATCH, "cifar10:weak", "cifar10:good"),
}
_STRONG = (("cifar100", "cifar100:strong"), ("cifar10", "cifar100:strong"))
_TEXTS = dict.fromkeys(("glue/cola", "glue/mrpc"), (SCRATCH, f"{WORD_ORDER}:weak", f"{WORD_ORDER}:good"))
_PUBLISHED_IMAGES = ("cifar10", "cifar10", "cifar100", FASHION)
_PUBLISHED_TEXTS = ("glue/mrpc", "glue/mrpc", WORD_ORDER, WORD_ORDER)
# Whose harm is measured by going on to the end of the run with layers frozen.
_TRUE_HARM = {
    "resnet8-cifar10-scratch-0",
    "resnet8-cifar10-cifar10-good-0",
    "resnet14-cifar100-cifar10-good-0",
    "vgg9-bn-cifar10-cifar100-weak-0",
    f"vgg9-{FASHION}-cifar10-good-0",
    "bottleneck20-cifar10-cifar100-good-0",
    "deit6-cifar10-cifar10-good-0",
    f"bert4-glue-cola-{WORD_ORDER}-good-0",
}
# Of the peak rates.
_FACTORS = {SCRATCH: (1.0,), "weak": (0.3, 1.0), "good": (0.1, 0.3), "strong": (0.1, 0.3), PUBLISHED: (1.0,)}
_EXAMPLES = (1000, 2000, 4000)
# Of runs on all of CIFAR-10.
_WHOLE, _WHOLE_BATCH, _EPOCHS = 50_000, 32, (1, 3)
_WHOLE_SOURCES = (SCRATCH, "cifar100:weak", "cifar100:good", "cifar100:strong")


@dataclasses.dataclass(frozen=True)
class Run:
    """One recording: a run, its reference, which differs in the seed, and the counterfactuals.

    Attributes:
        architecture: Name of the network.
        data: Name of the data set.
        pretraining: ``scratch``, ``published``, or what it was pre-trained on and how well, such as ``cifar100:weak``.
        optimizer: ``sgd`` or ``adamw``.
        schedule: Of the learning rate.
        learning_rate: Its peak.
        weight_decay: Of kernels and embeddings.
        batch_size: Examples in a batch.
        steps: Length of the run.
        examples: Examples that it trains on.
        augment: Whether images are mirrored and shifted at random.
        batch_norm: ``train``, ``fixed`` or ``none``.
        true_harm: Whether the harm of freezing is measured to the end of the run, too.
        copy: Tells runs apart that agree in architecture, data and pre-training.
        epochs: Of runs on all examples of a data set, how often they see them; None for others.
    """

    architecture: str
    data: str
    pretraining: str
    optimizer: OptimizerName
    schedule: Schedule
    learning_rate: float
    weight_decay: float
    batch_size: int
    steps: int
    examples: int
    augment: bool
    batch_norm: Literal["train", "fixed", "none"]
    true_harm: bool = False
    copy: int = 0
    epochs: int | None = None

    @property
    def name(self) -> str:
        """Name of the run and of its file."""
        which = self.copy if self.epochs is None else f"whole-{self.epochs}"
        return _name(self.architecture, self.data, self.pretraining, which)

    @property
    def seed(self) -> int:
        """Seed of head, order, augmentation and dropout; the reference has the next."""
        return 10 * (1 + self.copy)

    def __str__(self) -> str:
        rest = f"augment {'yes' if self.augment else 'no '} batch norm {self.batch_norm:5s}"
        return (
            f"{self.name:52s} {self.optimizer:5s} {self.schedule:8s} rate {self.learning_rate:<7g} "
            f"decay {self.weight_decay:<6g} {self.steps:4d} steps of {self.batch_size:2d} on {self.examples:4d} {rest}"
            f"{' true harm' if self.true_harm else ''}"
        )


def runs() -> list[Run]:
    """All runs; those of one architecture lie far apart, so that the first few are of many kinds."""
    by_architecture = [_runs_of(name, architecture) for name, architecture in ARCHITECTURES.items()]
    by_architecture += [_strong_runs_of(name, architecture) for name, architecture in ARCHITECTURES.items()]
    rounds = itertools.zip_longest(*by_architecture)
    return [run for one_of_each in rounds for run in one_of_each if run is not None] + _whole_runs()


def _whole_runs() -> list[Run]:
    """On all of CIFAR-10, short ones first; as many of each pre-training, schedule and length as can be."""
    small = [name for name, architecture in ARCHITECTURES.items() if not (architecture.text or architecture.published)]
    rng = random.Random("whole")
    cases = [(epochs, name) for epochs in _EPOCHS for name in small]
    sources, schedules = _deal(rng, _WHOLE_SOURCES, len(cases)), _deal(rng, get_args(Schedule), len(cases))
    chosen: list[Run] = []
    for (epochs, name), source, schedule in zip(cases, sources, schedules, strict=True):
        architecture = ARCHITECTURES[name]
        optimizer = rng.choice(tuple(architecture.rates))
        chosen.append(
            Run(
                architecture=name,
                data="cifar10",
                pretraining=source,
                optimizer=optimizer,
                schedule=schedule,
                learning_rate=_rate(rng, architecture, optimizer, source),
                weight_decay=5e-4 if optimizer == "sgd" else 0.05,
                batch_size=_WHOLE_BATCH,
                steps=epochs * (_WHOLE // _WHOLE_BATCH),
                examples=_WHOLE,
                augment=True,
                batch_norm=_batch_norm(architecture, source, fixed=False),
                epochs=epochs,
            )
        )
    return chosen


def _strong_runs_of(name: str, architecture: Architecture) -> list[Run]:
    if architecture.text or architecture.published:
        return []
    cases = [(data, source, 0) for data, source in _STRONG]
    return _dealt(name, architecture, cases, random.Random(f"{name}, strong"))


def _runs_of(name: str, architecture: Architecture) -> list[Run]:
    if architecture.published:
        sets = _PUBLISHED_TEXTS if architecture.text else _PUBLISHED_IMAGES
        cases = [(data, PUBLISHED, sets[:place].count(data)) for place, data in enumerate(sets)]
    else:
        sources = _TEXTS if architecture.text else _IMAGES
        cases = [(data, source, 0) for data, several in sources.items() for source in several]
    return _dealt(name, architecture, cases, random.Random(name))


def _dealt(name: str, architecture: Architecture, cases: list[tuple[str, str, int]], rng: random.Random) -> list[Run]:
    rng.shuffle(cases)
    optimizers = _deal(rng, tuple(architecture.rates), len(cases))
    schedules = _deal(rng, get_args(Schedule), len(cases))
    batch_sizes = _deal(rng, architecture.batch_sizes, len(cases))
    steps = _deal(rng, architecture.steps, len(cases))
    examples = _deal(rng, _EXAMPLES, len(cases))
    fixed = _deal(rng, (True, False), len(cases))
    augment = _deal(rng, (True, False), len(cases))
    return [
        Run(
            architecture=name,
            data=data,
            pretraining=source,
            optimizer=optimizers[i],
            schedule=schedules[i],
            learning_rate=_rate(rng, architecture, optimizers[i], source),
            weight_decay=rng.choice((0.0, 5e-4) if optimizers[i] == "sgd" else (0.0, 0.05)),
            batch_size=batch_sizes[i],
            steps=steps[i],
            examples=_at_most(examples[i], data, architecture),
            augment=augment[i] and not architecture.text,
            batch_norm=_batch_norm(architecture, source, fixed=fixed[i]),
            true_harm=_name(name, data, source, copy) in _TRUE_HARM,
            copy=copy,
        )
        for i, (data, source, copy) in enumerate(cases)
    ]


def _name(architecture: str, data: str, pretraining: str, which: int | str) -> str:
    return f"{architecture}-{data}-{pretraining}-{which}".replace("/", "-").replace(":", "-")


def _deal(rng: random.Random, values: Sequence[T], n: int) -> list[T]:
    """``n`` of the values, each as often as the others or once more."""
    cards = list(itertools.islice(itertools.cycle(rng.sample(values, len(values))), n))
    rng.shuffle(cards)
    return cards


def _rate(rng: random.Random, architecture: Architecture, optimizer: OptimizerName, source: str) -> float:
    factor = rng.choice(_FACTORS[source.rpartition(":")[2]])
    return float(f"{factor * rng.choice(architecture.rates[optimizer]):.2g}")


def _at_most(examples: int, data: str, architecture: Architecture) -> int:
    if architecture.published:
        return 1280
    return min(examples, 2000) if data in (FASHION, *_TEXTS) else examples


def _batch_norm(architecture: Architecture, source: str, *, fixed: bool) -> Literal["train", "fixed", "none"]:
    if not architecture.batch_norm:
        return "none"
    if source == PUBLISHED:
        return "fixed"  # fitted to batches of 16 they lose more than there is to gain: .33 where these reach .59
    trained = source.endswith((":good", ":strong"))  # statistics after little training are of no use
    return "fixed" if trained and fixed else "train"
