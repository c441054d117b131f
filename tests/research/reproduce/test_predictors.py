"""Predictors of Tables 4 and 5: what they differ in, and that each can be made and judged from recordings."""

import numpy as np
import pytest

import smartfrz_jax as sfj
from research import json_lines
from research.recordings.plan import runs
from research.reproduce.predictors import make
from research.reproduce.predictors.settings import (
    JUDGED,
    LEARNED,
    SETTINGS,
    SIZE,
    SIZES,
    WINDOWS,
    Setting,
    recorded_runs,
)
from smartfrz_jax.learning.recording import Recording

pytestmark = pytest.mark.usefixtures("jax_defaults")


def _recording(seed, layers=4, records=40):
    """Layers that stop moving one after the other, and whose CKA settles as they do."""
    rng = np.random.default_rng(seed)
    ends = np.linspace(8, 32, layers)
    moves = np.arange(records)[:, None] < ends
    weights = np.cumsum(rng.normal(size=(records, layers, 96)) * moves[..., None], axis=0)
    cka = 1 - 0.5 * np.clip(1 - np.arange(1, records + 1)[:, None] / ends, 0, None)
    return Recording(
        layers=tuple("abcd"[:layers]), steps=np.arange(1, records + 1), record_every=1, total_steps=records,
        weights=weights, start=np.zeros((layers, 96)), losses=np.ones(records), first_loss=1.0, cka=cka,
    )  # fmt: skip


class Recorded(make.Workshop):
    """A workshop whose recordings are there."""

    def recording(self, run):
        return _recording(sum(map(ord, run.name)) % 1000)


def test_settings_differ_in_one_thing_and_runs_are_of_the_plan():
    paper = Setting()
    for setting in SETTINGS:
        assert sum(a != b for a, b in zip(setting, paper, strict=True)) == (setting != paper)
    assert {*WINDOWS, *SIZES} <= {*SETTINGS}
    assert max(setting.size for setting in SETTINGS) == SIZE
    names = [*LEARNED, *(name for group in JUDGED.values() for name in group)]
    assert sorted(run.name for run in recorded_runs()) == sorted(names)
    assert len(set(names)) == len(names)
    assert {run.name for run in runs()} >= {*names}


@pytest.mark.slow
def test_an_averaging_predictor_does_not_look_at_its_records_order():
    predictor = make.fitted(Setting(window=6, size=16, averaged=True), [_recording(0)])
    mask = np.arange(6) > 1
    records = np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32)
    order = [0, 1, 5, 3, 2, 4]
    np.testing.assert_allclose(predictor._pool(records[order], mask), predictor._pool(records, mask), rtol=1e-5)
    other = make.fitted(Setting(window=6, size=16), [_recording(0)])
    assert not np.allclose(other._pool(records[order], mask), other._pool(records, mask), rtol=1e-3)


@pytest.mark.slow
def test_every_setting_is_made_and_judged_once(tmp_path, monkeypatch):
    chosen = (Setting(8, 32), Setting(8, 64), Setting(8, 32, averaged=True), Setting(8, 32, "scale_free"))
    monkeypatch.setattr(make, "SETTINGS", chosen)
    workshop, results = Recorded(tmp_path, tmp_path, None, print), tmp_path / make.ROWS
    make.work(workshop, LEARNED, results=results, minutes=10)
    rows = json_lines.read(results, dict)
    assert [row["setting"] for row in rows] == ["8x32", "8x64", "8x32-averaged", "8x32-scale_free"]
    assert all(row["scores"].keys() == JUDGED.keys() for row in rows)
    scale_free = rows[-1]["scores"]
    assert all(scores["auc"] > 0.8 for scores in scale_free.values())  # that a layer has stopped is all there is to see
    before = results.read_text()
    make.work(workshop, LEARNED, results=results, minutes=10)
    assert results.read_text() == before
    restored = sfj.Predictor.restore(workshop.predictor(chosen[1], LEARNED))
    assert restored.config.size == 64
