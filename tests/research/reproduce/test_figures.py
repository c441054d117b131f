"""The paper's figures: distances of samples, orders of layers, memory over a run, and the page with them."""

from functools import partial

import numpy as np
import pytest
from scipy import stats

from models.deit import deit_tiny
from research import json_lines
from research.reproduce import __main__ as script
from research.reproduce import questions
from research.reproduce.figures import setups, write
from research.reproduce.figures.gradients import compare, distance, kind_of
from research.reproduce.figures.memory import memory_over_time, moments_of
from research.reproduce.figures.page import page
from research.reproduce.figures.similarity import Curves, order_of, rank_correlation
from research.reproduce.figures.work import FIGURES, measurements
from research.reproduce.plans import Setup
from research.reproduce.predictors import make
from research.reproduce.questions import frozen_by
from smartfrz_jax import Layer
from train import networks
from train.options import parse


@pytest.mark.parametrize("round_to", [None, 1], ids=["all different", "many equal"])
def test_the_distance_is_that_of_kolmogorov_and_smirnov(round_to):
    rng = np.random.default_rng(0)
    whole, sample = rng.normal(size=5000).astype(np.float32), rng.standard_t(3, size=300).astype(np.float32)
    if round_to is not None:
        whole, sample = whole.round(round_to), sample.round(round_to)
    expected = stats.ks_2samp(*(part.astype(np.float64) for part in (whole, sample))).statistic  # else in float32
    assert distance(whole, sample) == pytest.approx(expected, abs=1e-12)


def test_a_layer_of_few_large_gradients_is_told_badly_by_samples():
    rng = np.random.default_rng(0)
    even, few = np.ones(100_000, np.float32), np.zeros(100_000, np.float32)
    few[:50] = 1.0
    positions = rng.integers(0, 100_000, (8, 1024))
    assert compare(even, even[positions])["size_error"] == 0
    found = compare(few, few[positions])
    assert found["size_error"] > 0.3
    assert (found["zeros"], found["weights"]) == (0.9995, 100_000)
    assert found["tail"] == pytest.approx(2000, rel=0.01)
    assert found["distance"] < 0.01  # which the distance does not tell


@pytest.mark.parametrize(
    ("name", "shape", "place", "kind"),
    [
        ("stem/kernel", (3, 3, 3, 8), 0, "first layer"),
        ("a/kernel", (3, 3, 8, 8), 1, "convolution"),
        ("a/kernel", (1, 1, 8, 8), 1, "1 x 1 convolution"),
        ("a/kernel", (3, 3, 1, 8), 1, "depthwise convolution"),
        ("blocks/0/attn/qkv/kernel", (8, 24), 1, "attention"),
        ("blocks/0/mlp/fc1/kernel", (8, 24), 1, "dense"),
        ("words/embedding", (90, 8), 0, "embedding"),
        ("pos_embed", (1, 9, 8), 1, "embedding"),
        ("head/kernel", (8, 2), 2, "head"),
    ],
)
def test_kinds_of_layers(name, shape, place, kind):
    assert kind_of(Layer(name.removesuffix("/kernel"), (name,), (name,)), shape, place, 3) == kind


def test_rank_correlation_is_spearmans():
    a, b = np.random.default_rng(0).integers(0, 5, (2, 40))
    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert np.isnan(rank_correlation(a, np.ones(40)))


def test_the_order_in_which_layers_settle():
    steps = np.arange(20)
    cka = np.stack([np.where(steps < at, 0.05 * (steps - at), 0) + 1 for at in (2, 10, 4)], axis=1)
    found = order_of(Curves("vgg", ("a", "b", "c"), (steps + 1) / 20, cka))
    assert (found.residual, found.correlation, found.unsettled) == (False, 0.5, 0.0)
    assert found.overtaken == pytest.approx(1 / 3)  # c before b, of three pairs


def test_memory_and_moments_of_a_run():
    row = {"steps": 6, "memory": [[1, 0, 100], [4, 2, 40]], "frozen": [[3, ["a", "b"], []]]}
    assert memory_over_time(row).tolist() == [100, 100, 100, 40, 40, 40]
    assert moments_of(row) == {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize("scale", ["cpu", "paper"])
def test_setups_are_options_of_the_script(scale, tmp_path):
    every = list(measurements(FIGURES, scale))
    assert {one.figure for one in every} == {*FIGURES} - ({"figure4"} if scale == "cpu" else set())
    for one in every:
        parse(one.run.options(tmp_path, tmp_path, tmp_path))


@pytest.mark.slow
def test_the_figures_of_a_tiny_network(shared, tmp_path, monkeypatch, jax_defaults):
    """Measures all three, is called again without measuring anything, and the page has them."""
    monkeypatch.setattr(networks, "deit_tiny", partial(deit_tiny, depth=1))
    options = ["--model", "deit-tiny", "--data", "cifar10", "--image-size", "16", "--epochs", "1", "--batch-size", "4"]
    options += ["--train-split", "train[:16]", "--evaluation-split", "test[:8]", "--mesh", "data=1", "--lead", "0"]
    tiny = {"cpu": (Setup("tiny", "CIFAR-10", tuple(options), {}),), "paper": ()}
    for name in ("GRADIENTS", "SIMILARITIES", "MEMORY"):
        monkeypatch.setattr(f"research.reproduce.figures.work.{name}", tiny)
    half = {"half": ("--policy", "static_prefix", "--stages", "0.5:0.6")}
    monkeypatch.setattr("research.reproduce.figures.work.MEMORY_POLICIES", half)
    monkeypatch.setitem(setups.GRADIENT_STEPS, "cpu", 1)
    argv = [*FIGURES, "--data-dir", str(shared / "data/tfds"), "--weights", str(tmp_path), "--out", str(tmp_path)]
    argv += ["--state", str(tmp_path / "state")]
    assert script.main(argv) == 0
    gradients, similarity, memory = json_lines.read(tmp_path / write.ROWS, dict)
    assert {layer["kind"] for layer in gradients["layers"]} == gradients["histograms"].keys()
    assert all(0 < layer["distance"] < 0.2 for layer in gradients["layers"])
    assert np.shape(similarity["cka"]) == (4, len(similarity["layers"]))
    held = memory_over_time(memory)
    assert len(held) == memory["steps"] == 4
    assert held[-1] < held[0]
    assert set(moments_of(memory).values()) == {0.5}
    before = (tmp_path / write.ROWS).read_text()
    assert script.main(argv) == 0
    assert (tmp_path / write.ROWS).read_text() == before
    text = (tmp_path / "figures.md").read_text()
    assert "| tiny | CIFAR-10 | half | cpu |" in text
    assert all((tmp_path / f"figure{number}.png").exists() for number in (3, 4, 5))


@pytest.mark.slow
def test_the_pages_are_those_of_rows_and_recordings():
    rows = json_lines.read(script.FOLDER / write.ROWS, dict)
    recorded = list(write.recorded_curves().values())
    assert (script.FOLDER / "figures.md").read_text() == page(rows, recorded)
    predictors = json_lines.read(script.FOLDER / make.ROWS, dict)
    text = questions.page(predictors, rows, [curves for _, curves in recorded])
    assert (script.FOLDER / "questions.md").read_text() == text


def test_a_rule_without_hindsight_freezes_more_and_too_early():
    """Of two layers one settles at half time; the other stands still in between, which the rule takes for the end."""
    steps = np.arange(40)
    cka = np.stack([np.minimum(steps, 20) / 20, np.clip((steps - 10) / 40, 0, 0.5) + 0.5], axis=1)
    curves = Curves("two", ("a", "b"), (steps + 1) / 40, cka)
    known, saved, early = frozen_by(curves, 40)
    assert early == 0.5
    assert 0 < known < saved
    assert frozen_by(curves, 4)[0] < known
