"""What is compared: predictors that read different things, and targets that say different things."""

from __future__ import annotations

from typing import Any, NamedTuple

from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax.learning.examples import Examples, Hiding
from smartfrz_jax.learning.inputs import EncodedExamples
from smartfrz_jax.learning.targets import Criterion, Harmless, Settled
from smartfrz_jax.predictor.encoding import Encoding

# Harm in branches is smaller than at the end of the run, by half or more (rank correlation 0.73 in the eight runs whose
# harm was measured to the end; swap harm 0.58), and there 1 % of the first loss is 1 to 3 points of accuracy.
TARGETS: dict[str, Criterion] = {
    "cka": Settled("cka"),
    "own_cka": Settled("own_cka"),
    "swap_harm": Harmless("swap_harm", tolerance=0.01),
    "branch_harm": Harmless("branch_harm", tolerance=0.003),
}


class Variant(NamedTuple):
    """A predictor and how it is trained.

    Attributes:
        encoding: What it reads.
        hidden: Width of the hidden layers of its MLPs.
        features: Width of keys, queries and values.
        epochs: Epochs of its training.
        learning_rate: At the start.
        weight_decay: Of its kernels.
        hiding: What is hidden from it at random as it learns.
        copies: How often an example is drawn; each time something else is hidden from it. 1 for those that read
            weights, which are not encoded ahead.
    """

    encoding: Encoding
    hidden: int = 64
    features: int = 32
    epochs: int = 6
    learning_rate: float = 0.02
    weight_decay: float = 1e-3
    hiding: Hiding | None = Hiding(progress=0.2, losses=0.1, contribution=0.2, records=0.3)
    copies: int = 3

    def prepared(self, examples: Examples, *, seed: int = 0) -> Examples:
        """The examples as :meth:`fit` takes them; every split and seed can use the same.

        Args:
            examples: The examples.
            seed: Of what is hidden.
        """
        if self.encoding.weights != "none":  # encoded, they would take too much memory
            return examples
        return sfj.learning.encode_examples(examples, self.encoding, hiding=self.hiding, copies=self.copies, seed=seed)

    def fit(self, prepared: Examples, *, seed: int) -> sfj.Predictor:
        """Trains the predictor on all the examples.

        Args:
            prepared: The examples, as :meth:`prepared` gives them.
            seed: Of its initialisation and the order of the examples.
        """
        config = sfj.predictor.PredictorConfig(
            size=prepared.size,
            hidden=self.hidden,
            features=self.features,
            encoding=self.encoding,
        )
        return sfj.learning.fit(
            sfj.Predictor(config, rngs=nnx.Rngs(seed)),
            prepared,
            sfj.learning.SGD(
                epochs=max(1, round(self.epochs / self.copies)),
                learning_rate=self.learning_rate,
                weight_decay=self.weight_decay,
            ),
            held_out=None,
            hiding=None if isinstance(prepared, EncodedExamples) else self.hiding,
            class_weights=None,  # probabilities are to be read as such
            seed=seed,
        ).predictor


def _only(weights: str, **chosen: Any) -> Encoding:
    switches = {"progress": False, "depth": False, "regime": False} | chosen
    return Encoding(weights=weights, **switches)  # pyright: ignore[reportArgumentType]


_TWO: dict[str, Any] = {"progress": True, "depth": True}
_MOVED, _LOSS, _GIVEN = "displacement", "loss_level", "contribution"
# The paper's sizes; nothing is hidden and nothing encoded ahead, as there is nothing to be gained by it.
_RAW: dict[str, Any] = {
    "hidden": 256, "features": 64, "epochs": 3, "learning_rate": 0.01, "hiding": None, "copies": 1
}  # fmt: skip

VARIANTS: dict[str, Variant] = {
    "raw (paper)": Variant(_only("raw"), weight_decay=0.0, **_RAW),
    "raw, t/T, depth": Variant(_only("raw", **_TWO), **_RAW),
    "scale-free": Variant(_only("scale_free"), copies=1),
    "scale-free, t/T, depth": Variant(_only("scale_free", **_TWO), copies=1),
    "scale-free, t/T, depth, given, loss": Variant(_only("scale_free", **_TWO, regime=(_GIVEN, _LOSS)), copies=1),
    "scale-free, t/T, depth, regime": Variant(_only("scale_free", **_TWO, regime=True), copies=1),
    "t/T, depth": Variant(_only("none", **_TWO)),
    "t/T, depth, moved": Variant(_only("none", **_TWO, regime=(_MOVED,))),
    "t/T, depth, given": Variant(_only("none", **_TWO, regime=(_GIVEN,))),
    "t/T, depth, given, loss": Variant(_only("none", **_TWO, regime=(_GIVEN, _LOSS))),
    "t/T, depth, regime": Variant(_only("none", **_TWO, regime=True)),
    "depth, regime": Variant(_only("none", depth=True, regime=True)),
}
