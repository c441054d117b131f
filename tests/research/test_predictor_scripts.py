"""Folds, figures and the scripts that fit and judge predictors."""

import dataclasses
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from research import json_lines
from research.predictors import evaluate as evaluation
from research.predictors import fit, held_out, learning_runs
from research.predictors.figures import Figures, table
from research.predictors.folds import folds
from research.predictors.variants import TARGETS, VARIANTS, Variant
from smartfrz_jax import Predictor
from smartfrz_jax.learning import by_run, encode_examples, evaluate, make_examples, moments, predict, recording_files
from smartfrz_jax.learning.controls import CONTROLS, two_scalar_coefficients
from smartfrz_jax.learning.recording import Recording


def recorded(architecture: str, seed: int = 0, data: str = "digits") -> Recording:
    """Two layers that walk and come to rest, the first one earlier."""
    rng = np.random.default_rng(seed)
    rest = np.array([8, 16])
    sizes = np.where(np.arange(1, 25)[:, None] < rest, 1.0, 0.05)
    weights = np.cumsum(sizes[..., None] * rng.normal(size=(24, 2, 64)), axis=0)
    cka = np.where(np.arange(1, 25)[:, None] < rest, np.arange(24)[:, None] / 24, 1.0)
    return Recording(
        layers=("a", "b"),
        steps=np.arange(1, 25),
        record_every=1,
        total_steps=24,
        weights=weights,
        start=np.zeros((2, 64)),
        losses=np.linspace(1, 0.1, 24),
        first_loss=1.0,
        cka=cka,
        metadata={"architecture": architecture, "data": data, "schedule": "cosine"},
    )


def test_folds_hold_out_families():
    runs = [recorded(name) for name in ("resnet8", "vgg9", "resnet14", "mine")]
    assert list(folds(runs, "architecture")) == [("mine", [3]), ("resnet", [0, 2]), ("vgg", [1])]
    with pytest.raises(ValueError, match="all are of one schedule"):
        list(folds(runs, "schedule"))
    with pytest.raises(ValueError, match="does not say its data"):
        list(folds([Recording(**{**vars(runs[0]), "metadata": {}})], "data"))


def test_folds_hold_out_what_is_pretrained_as_well():
    kinds = ("scratch", "cifar10:good", "cifar100:good", "published", "cifar10:weak")
    runs = [dataclasses.replace(recorded("vgg9"), metadata={"pretraining": kind}) for kind in kinds]
    assert list(folds(runs, "pretraining")) == [("good", [1, 2]), ("published", [3]), ("scratch", [0]), ("weak", [4])]


def test_table_takes_means_over_folds_and_spread_over_seeds():
    def row(fold, seed, auc):
        return Figures("cka", "data", fold, "mine", seed, 10, 5, auc, 0.9, float("nan"), 0.5, 0.1, 1.0, 12, "digest")

    text = table([row("x", 0, 0.5), row("y", 0, 0.7), row("x", 1, 0.7), row("y", 1, 0.9)])
    # 0.6 and 0.8 with the two seeds
    assert text.splitlines()[-1].startswith("| mine | 2 | 2 | 0.700 +- 0.141 | 0.900 +- 0.000 | nan")
    assert "0.600 (x)" in text


@pytest.fixture
def data_set(tmp_path):
    for n, name in enumerate(("vgg9", "resnet8", "resnet14")):
        recording_files.save(recorded(name, n, data=("digits", "letters")[n % 2]), tmp_path / "recordings", name)
    return tmp_path / "recordings"


VARIANT = "t/T, depth, regime"


@pytest.mark.slow
def test_recordings_without_weights_are_judged_by_what_needs_none(data_set, tmp_path, capsys):
    for path in data_set.glob("*.npz"):
        recording_files.save(recording_files.read(path).without_weights(), tmp_path / "small", path.stem)
    for name, folder in (("all", data_set), ("none", tmp_path / "small")):
        args = ["--recordings", str(folder), "--out", str(tmp_path / name), "--targets", "cka", "--splits", "data"]
        args += ["--variants", "t/T, depth, given, loss"] if name == "all" else []
        assert evaluation.main([*args, "--seeds", "1", "--stride", "4"]) == 0
    whole, small = (
        {(row.fold, row.variant): row.auc for row in json_lines.read(tmp_path / name / "figures.jsonl", Figures.parse)}
        for name in ("all", "none")
    )
    variants = {variant for _, variant in small}
    assert variants.isdisjoint({"update_norm", "context", "raw (paper)", "t/T, depth, regime"})
    assert variants >= {"majority", "progress_and_depth", "t/T, depth", "t/T, depth, given, loss"}
    assert small.items() >= {key: auc for key, auc in whole.items() if key[1] in variants}.items()


@pytest.mark.slow
def test_the_tables_of_recordings_in_the_repository_are_what_these_give(tmp_path):
    """Of controls: predictors would take minutes."""
    root = Path(evaluation.__file__).parents[2]
    page = (root / "benchmarks" / "predictors" / "tables.md").read_text()
    section = page.partition("<!-- predictors without weights -->")[2]
    section = section.partition("<!-- end of predictors without weights -->")[0]
    command = re.match(r"\s*`python -m train\.evaluate_predictor ([^`]*)`", section)
    assert command is not None
    said = evaluation.parse(shlex.split(command[1]))
    recordings, _ = learning_runs.load(root / said.recordings)
    assert f" {len(recordings)} recordings, every {said.stride}th moment" in section
    prepared = evaluation.Prepared(recordings, said.stride)
    for target in said.targets:
        for split in said.splits:
            table = section.partition(f"### {target}, held out by {split} (")[2].partition("###")[0]
            for name in ("progress", "progress_and_depth"):
                train, test = prepared.examples(name, target)
                aucs = []
                for _, runs in folds(recordings, split):
                    others, judged = train.select(~by_run(train, runs)), test.select(by_run(test, runs))
                    aucs.append(evaluate(CONTROLS[name](others, judged), judged.target).auc)
                assert f"| {name} | 1 | {len(aucs)} | {np.mean(aucs):.3f} |" in table


@pytest.mark.slow
def test_evaluates_and_goes_on(data_set, tmp_path, capsys):
    out = tmp_path / "evaluation"
    args = ["--recordings", str(data_set), "--out", str(out), "--targets", "cka", "--variants", VARIANT]
    args += ["--splits", "architecture", "--stride", "2"]
    assert evaluation.main([*args, "--seeds", "1"]) == 0
    lines = (out / "figures.jsonl").read_text().splitlines()
    rows = json_lines.read(out / "figures.jsonl", Figures.parse)
    assert {row.fold for row in rows} == {"resnet", "vgg"}
    by_fold = {(row.variant, row.fold): row for row in rows}
    assert by_fold["context", "resnet"].auc > 0.95
    assert by_fold[VARIANT, "resnet"].n == 40
    assert by_fold["majority", "vgg"].auc == 0.5
    # Two runs that are alike: what tells the target among both tells it within each.
    assert by_fold["progress_and_depth", "resnet"].run_auc == pytest.approx(by_fold["progress_and_depth", "resnet"].auc)
    assert by_fold["majority", "resnet"].run_auc == 0.5
    tables = (out / "figures.md").read_text()
    assert "held out by architecture" in tables
    assert "### cka" in capsys.readouterr().out
    results = tmp_path / "tables.md"
    results.write_text("Before.\n\n<!-- predictors -->\nold\n<!-- end of predictors -->\nAfter.\n")
    assert evaluation.main([*args, "--seeds", "2", "--results", str(results)]) == 0
    new = (out / "figures.md").read_text()
    assert new != tables
    assert results.read_text() == f"Before.\n\n<!-- predictors -->\n{new}<!-- end of predictors -->\nAfter.\n"
    again = (out / "figures.jsonl").read_text().splitlines()
    assert again[: len(lines)] == lines
    assert len(again) == len(lines) + 2


@pytest.mark.slow
@pytest.mark.parametrize(("without", "left"), [(["resnet8"], 2), (["letters"], 2), (["vgg9", "letters"], 1)])
def test_fits_without_networks_and_data_sets(data_set, tmp_path, capsys, without, left):
    out = tmp_path / "predictor"
    args = ["--recordings", str(data_set), "--out", str(out), "--target", "cka", "--variant", VARIANT]
    assert fit.main([*args, "--without", *without]) == 0
    said = capsys.readouterr().out
    assert f"{left} of 3 recordings" in said
    runs = [run for run in recording_files.load(data_set) if not set(without) & set(run.metadata.values())]
    two = two_scalar_coefficients(make_examples(runs, criterion=TARGETS["cka"], stride=fit.parse(args).stride))
    assert f"the two-scalar rule has coefficients ({', '.join(f'{value:.2f}' for value in two)})" in said
    assert Predictor.restore(out).config.encoding == VARIANTS[VARIANT].encoding
    assert fit.main(args) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.slow
def test_writes_what_is_held_out_and_judges_by_it(data_set, tmp_path, capsys):
    file = tmp_path / "held_out.npz"
    args = ["--recordings", str(data_set), "--target", "cka", "--without", "resnet8", "--held-out", str(file)]
    assert fit.main([*args, "--out", str(tmp_path / "p"), "--variant", "t/T, depth"]) == 0
    printed = capsys.readouterr().out
    predictor = Predictor.restore(tmp_path / "p")
    score = held_out.judge(file, predictor)
    assert f"{file}: {score.n} examples of resnet8: AUC {score.auc:.3f}" in printed
    left_out = [
        recorded for recorded in recording_files.load(data_set) if recorded.metadata["architecture"] == "resnet8"
    ]
    examples = make_examples(left_out, criterion=TARGETS["cka"], stride=12)
    expected = evaluate(predict(predictor, examples), examples.target, groups=moments(examples))
    np.testing.assert_allclose(score, expected, rtol=1e-5)
    encoded = encode_examples(examples, VARIANTS["scale-free"].encoding)
    with pytest.raises(ValueError, match=r"examples: hold weights \(scale_free\)"):
        held_out.write(file, encoded)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--held-out z.npz", "argument --held-out: nothing is left out"),
        ("--held-out z --without vgg9", "argument --held-out: got z, expected a name that ends with .npz"),
        ("--held-out z.npz --without vgg9 --variant scale-free", "--held-out: 'scale-free' reads weights (scale_free)"),
        ("--stride 0", "argument --stride: got 0, expected at least 1"),
    ],
)
def test_the_command_line_is_checked_before_anything_is_read(options, message, capsys):
    with pytest.raises(SystemExit):
        fit.parse(["--recordings", "x", "--out", "y", "--target", "cka", "--variant", "t/T, depth",
                             *options.split()])  # fmt: skip
    assert message in capsys.readouterr().err


def test_the_command_of_the_docstring_can_be_parsed():
    command = str(fit.__doc__).split("\n\n")[1].replace("\\\n", "")
    args = fit.parse(shlex.split(command)[3:])
    assert (args.target, args.variant) == ("branch_harm", "t/T, depth, given, loss")


@pytest.mark.slow
def test_a_held_out_file_that_cannot_be_written_is_an_error_before_the_fit(data_set, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Variant, "fit", None)
    args = ["--recordings", str(data_set), "--out", str(tmp_path / "p"), "--target", "cka", "--variant", VARIANT]
    file = tmp_path / "none" / "held_out.npz"
    assert fit.main([*args, "--without", "vgg9", "--held-out", str(file)]) == 2
    assert str(file) in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


@pytest.mark.slow
def test_figures_of_another_stride_or_other_recordings_are_computed_anew(data_set, tmp_path, monkeypatch, capsys):
    def controls(args, recordings):
        for fold, indices in folds(recordings, "architecture"):
            yield "cka", "architecture", fold, indices, "progress", 0

    monkeypatch.setattr(evaluation, "jobs", controls)
    file = tmp_path / "figures.jsonl"
    args = ["--recordings", str(data_set), "--out", str(tmp_path), "--targets", "cka", "--splits", "architecture"]

    def rows(*options):
        assert evaluation.main([*args, *options]) == 0
        return json_lines.read(file, Figures.parse)

    first = rows("--stride", "2")
    assert [(row.fold, row.n) for row in first] == [("resnet", 40), ("vgg", 20)]
    assert rows("--stride", "2") == first
    capsys.readouterr()
    second = rows("--stride", "4")
    assert second[:2] == first
    assert [(row.fold, row.n, row.stride) for row in second[2:]] == [("resnet", 20, 4), ("vgg", 10, 4)]
    printed = capsys.readouterr().out
    assert f"2 lines of {file} are of another stride or other recordings, and left out" in printed
    assert "of 30 examples to freeze" in (tmp_path / "figures.md").read_text()
    recording_files.save(recorded("vgg9-bn", 5), data_set, "more")
    third = rows("--stride", "4")
    assert third[:4] == second
    assert [(row.fold, row.n) for row in third[4:]] == [("resnet", 20), ("vgg", 20)]
    assert len({row.recordings for row in third}) == 2
    file.write_text('{"target": "cka"}\n')
    assert evaluation.main(args) == 2
    assert f"out: line 1 of {file} is not a result" in capsys.readouterr().err


def test_unknown_architecture_is_an_error(data_set, tmp_path, capsys):
    args = ["--recordings", str(data_set), "--out", str(tmp_path / "p"), "--target", "cka", "--variant", VARIANT]
    assert fit.main([*args, "--without", "alexnet"]) == 2
    assert "they are of digits, letters, resnet14, resnet8, vgg9" in capsys.readouterr().err


def test_recordings_that_are_not_there_are_an_error(tmp_path, capsys):
    assert evaluation.main(["--recordings", str(tmp_path / "x"), "--out", str(tmp_path / "y")]) == 2
    assert "there is no directory" in capsys.readouterr().err
