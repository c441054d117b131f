"""The paper's figures: distances of samples, orders of layers, memory over a run, and the page with them."""

import numpy as np
import pytest
from scipy import stats

from research import json_lines
from research.reproduce import __main__ as script
from research.reproduce.figures import write
from research.reproduce.figures.gradients import compare, distance, kind_of
from research.reproduce.figures.memory import memory_over_time, moments_of
from research.reproduce.figures.page import page
from research.reproduce.figures.similarity import Curves, order_of, rank_correlation
from research.reproduce.figures.work import FIGURES, measurements
from smartfrz_jax import Layer
from train.options import parse


@pytest.mark.parametrize("round_to", [None, 1], ids=["all different", "many equal"])
def test_the_distance_is_that_of_kolmogorov_and_smirnov(round_to):
    rng = np.random.default_rng(0)
    whole, sample = rng.normal(size=5000).astype(np.float32), rng.standard_t(3, size=300).astype(np.float32)
    if round_to is not None:
        whole, sample = whole.round(round_to), sample.round(round_to)
    assert distance(whole, sample) == pytest.approx(stats.ks_2samp(whole, sample).statistic, abs=1e-12)


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
def test_the_page_is_that_of_the_rows_and_recordings():
    rows = json_lines.read(script.FOLDER / write.ROWS, dict)
    assert (script.FOLDER / "figures.md").read_text() == page(rows, list(write.recorded_curves().values()))
