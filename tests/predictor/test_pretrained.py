"""The predictors that come with the library, and what their model card says of them."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import smartfrz_jax as sfj
from research.predictors import fit, held_out, learning_runs
from research.predictors.variants import TARGETS
from smartfrz_jax.learning.controls import logistic_regression
from smartfrz_jax.learning.examples import make_examples
from smartfrz_jax.policies.progress import COEFFICIENTS
from smartfrz_jax.predictor.context import context_names
from smartfrz_jax.predictor.encoded import Encoded
from smartfrz_jax.predictor.encoding import PAPER

FOLDER = Path(sfj.__file__).parent / "predictor" / "pretrained"
RECORDINGS = Path(__file__).parents[2] / "benchmarks" / "recordings"
HELD_OUT = Path(__file__).parent / "held_out.npz"
MOST_BYTES = 5_000_000


@pytest.fixture(scope="module")
def default() -> sfj.Predictor:
    return sfj.Predictor.pretrained()


@pytest.mark.parametrize("name", ["default", "paper"])
def test_is_small_enough_for_the_wheel(name):
    assert sum(file.stat().st_size for file in (FOLDER / name).rglob("*") if file.is_file()) <= MOST_BYTES


def test_the_papers_has_the_papers_shape():
    assert sfj.Predictor.pretrained("paper").config == sfj.predictor.PredictorConfig(encoding=PAPER)


def test_the_main_figures_of_the_card(default):
    """On eleven runs of a network that the predictor has not seen."""
    card = " ".join((FOLDER / "README.md").read_text().split())
    found = re.search(r"\*\*AUC (0\.\d{3}), across layers ([01]\.\d{3}), balanced accuracy (0\.\d{3})\*\*", card)
    assert found is not None
    got = held_out.judge(HELD_OUT, default)
    assert got.n > 1000
    for value, said in zip((got.auc, got.moment_auc, got.balanced_accuracy), found.groups(), strict=True):
        assert value == pytest.approx(float(said), abs=0.001)


def test_it_is_better_than_the_two_scalars_there(default):
    intercept, of_progress, of_depth = COEFFICIENTS
    with np.load(HELD_OUT) as file:
        names = context_names(default.config.encoding)
        progress, depth = (file["context"][:, names.index(name)] for name in ("progress", "depth"))
        logit = intercept + of_progress * progress + of_depth * depth
        control = sfj.learning.evaluate(1 / (1 + np.exp(-logit)), file["target"], groups=file["moment"])
    assert held_out.judge(HELD_OUT, default).auc > control.auc


@pytest.mark.slow
def test_made_again_from_other_recordings_it_is_as_good(default, tmp_path):
    """The card's command on the recordings in the repository: the same runs once more, their harm measured better."""
    options = [*["--target", "branch_harm", "--without", "resnet14", "--variant"], "t/T, depth, given, loss"]
    options += ["--out", str(tmp_path / "again"), "--held-out", str(tmp_path / "held_out.npz")]
    assert fit.main(["--recordings", str(RECORDINGS), *options]) == 0
    again = sfj.Predictor.restore(tmp_path / "again")
    for file in (HELD_OUT, tmp_path / "held_out.npz"):
        got, shipped = held_out.judge(file, again), held_out.judge(file, default)
        assert got.auc == pytest.approx(shipped.auc, abs=0.01)
        assert got.balanced_accuracy == pytest.approx(shipped.balanced_accuracy, abs=0.02)


def numbers_of_the_two_scalar_rule(coefficients):
    """Its coefficients, and when it freezes layers of three depths at caution 0.95, as parts of the run."""
    intercept, of_progress, of_depth = coefficients
    moments = (np.log(0.95 / 0.05) - intercept - of_depth * np.array([0, 0.25, 0.5])) / of_progress
    return np.array([*coefficients, *moments])


@pytest.mark.slow
def test_the_two_scalar_rule_of_other_recordings_is_the_same_but_for_which_runs_there_are():
    """That noise is measured: by fits to as many runs, drawn from these with replacement."""
    runs, _ = learning_runs.load(RECORDINGS)
    runs = [run for run in runs if run.metadata["architecture"] != "resnet14"]
    examples = make_examples(runs, criterion=TARGETS["branch_harm"], stride=12)
    inputs = np.stack([examples.progress, examples.depth], axis=1)
    mean, std = inputs.mean(axis=0), inputs.std(axis=0)

    def fitted(chosen):
        w = logistic_regression((inputs[chosen] - mean) / std, examples.target[chosen], class_weights=None)
        return numbers_of_the_two_scalar_rule([w[-1] - w[:-1] @ (mean / std), *(w[:-1] / std)])

    rows, rng = [np.flatnonzero(examples.run == run) for run in range(len(runs))], np.random.default_rng(0)
    drawn = [[rows[run] for run in rng.integers(len(runs), size=len(runs))] for _ in range(50)]
    others = [fitted(np.concatenate(some)) for some in drawn]
    noise = np.std(others, axis=0)
    assert (np.abs(fitted(slice(None)) - numbers_of_the_two_scalar_rule(COEFFICIENTS)) < 2 * noise).all()
    assert (noise < [0.4, 0.5, 0.5, 0.07, 0.06, 0.05]).all()  # or the line before would say little


def confidence(predictor, **numbers):
    """Of layers that differ in one number, all else as in the middle of a usual run."""
    names = context_names(predictor.config.encoding)
    usual = {"progress": 0.4, "depth": 0.3, "loss_level": np.log(0.6), "contribution": np.log1p(200 * 0.01)}
    n = len(next(iter(numbers.values())))
    context = np.stack([np.broadcast_to(numbers.get(name, usual[name]), n) for name in names], axis=1)
    encoded = Encoded(
        jnp.zeros((n, 30, 0)), jnp.ones((n, 30), bool), jnp.asarray(context, jnp.float32),
        jnp.ones((n, len(names)), bool),
    )  # fmt: skip
    return np.asarray(jax.device_get(sfj.predictor.freeze_probability(predictor, encoded)))


@pytest.mark.parametrize(
    ("numbers", "rises"),
    [
        ({"progress": np.linspace(0.1, 1, 10)}, True),
        ({"depth": np.linspace(0, 0.95, 10)}, False),
        ({"contribution": np.log1p(200 * np.geomspace(1e-3, 0.1, 10))}, False),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_it_has_learned_which_way_things_point(default, numbers, rises):
    got = confidence(default, **numbers)
    steps = np.diff(got) if rises else -np.diff(got)
    assert steps.sum() > 0.1
    assert steps.min() > -0.02


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="name: got 'large', expected 'default' or 'paper'"):
        sfj.Predictor.pretrained("large")
