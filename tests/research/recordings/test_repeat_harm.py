"""The second measurement of harm is judged rightly; that it repeats the run is tested with the first, where that is."""

import json

import numpy as np
import pytest

from research.recordings import repeat_harm
from smartfrz_jax.learning import recording_files
from smartfrz_jax.learning.recording import Recording


def recorded(name: str, seed: int) -> Recording:
    """Four layers, of which those up to a depth can be frozen from some moment on; the loss falls enough."""
    rng = np.random.default_rng(seed)
    harm = np.full((24, 4), np.nan, np.float32)
    harm[np.ix_([0, 8, 16], [0, 1, 2])] = rng.uniform(0.002, 0.02) * np.array([[2, 4, 6], [1, 2, 4], [0, 0.1, 1]])
    return Recording(
        layers=("a", "b", "c", "head"),
        steps=np.arange(1, 25),
        record_every=1,
        total_steps=24,
        weights=rng.normal(size=(24, 4, 64)),
        start=np.zeros((4, 64)),
        losses=np.linspace(1, 0.1, 24),
        first_loss=1.0,
        branch_harm=harm,
        metadata={"architecture": "resnet8", "name": name},
    )


@pytest.mark.slow
def test_a_measurement_that_agrees_tells_all_targets_and_is_not_made_again(tmp_path, monkeypatch, capsys):
    for seed in range(4):
        recording_files.save(recorded(f"run{seed}", seed), tmp_path / "recordings", f"run{seed}")
    measured = []

    def measure_again(first, args):
        measured.append(first.metadata["name"])
        return first.branch_harm

    monkeypatch.setattr(repeat_harm, "measure_again", measure_again)
    line = ["--recordings", str(tmp_path / "recordings"), "--data-dir", "x", "--out", str(tmp_path / "out")]
    line += ["--runs", "2", "--stride", "2"]
    assert repeat_harm.main(line) == 0
    text = (tmp_path / "out" / "repeat.md").read_text()
    assert "2 runs, 80 examples" in text
    assert "the same target for 100.0% of them" in text
    assert "| the harm, measured again | 1.000 | 1.000 |" in text
    assert "| progress_and_depth (logistic) | 0." in text
    assert len(measured) == 2
    # One that says the reverse does not; what is in the file is taken from there.
    file = tmp_path / "out" / "harm.jsonl"
    rows = [json.loads(row) for row in file.read_text().splitlines()]
    for row in rows:
        harm = -np.array(row["harm"], float)
        row["harm"] = (harm - np.nanmin(harm)).tolist()
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = tmp_path / "tables.md"
    assert repeat_harm.main([*line, "--results", str(results)]) == 0
    assert len(measured) == 2
    again = results.read_text()
    assert "<!-- repeated -->" in again
    assert "| the harm, measured again | 1.000" not in again
    file.write_text(file.read_text() + "{broken\n")
    capsys.readouterr()
    assert repeat_harm.main(line) == 2
    assert "line 3 of" in capsys.readouterr().err
    file.unlink()
    assert repeat_harm.main([*line[:-3], "9"]) == 2
    assert "runs: got 9, but there are 4 recordings" in capsys.readouterr().err
