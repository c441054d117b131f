"""Figures of the closed loop, against numbers worked out by hand."""

import dataclasses
import itertools
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("matplotlib")

import smartfrz_jax as sfj
from research import json_lines
from research.recordings.architectures import Architecture
from research.recordings.sets import FASHION
from research.trials import closed_loop, report, trial
from research.trials.cases import CASES, Case
from research.trials.result import Result
from research.trials.strategies import Situation, strategies
from research.trials.trial import Bench


def result(strategy, seed, accuracy, compute, cached=None, seconds=10.0):
    cached = compute if cached is None else cached
    return Result("case", strategy, seed, accuracy, 1.0, compute, cached, seconds, seconds, [])


RESULTS = [
    result("never", 0, 0.80, 1.0),
    result("never", 1, 0.90, 1.0),
    result("static:half", 0, 0.82, 0.6, 0.4, 5.0),
    result("static:half", 1, 0.86, 0.6, 0.4, 8.0),
    result("shorter:0.5,1.0", 0, 0.70, 0.5),
    result("shorter:0.5,2.0", 0, 0.75, 0.5),
    result("smartfrz:0.5", 7, 0.99, 0.1),
]


def test_rows_are_paired_by_seed():
    rows = {row.strategy: row for row in report.rows(RESULTS)}
    half = rows["static:half"]
    assert half.seeds == 2
    assert half.difference == pytest.approx(-1.0)  # +2 and -4 points
    assert half.error == pytest.approx(3.0)  # their standard deviation is 3 sqrt(2), over sqrt(2)
    assert half.time == pytest.approx(0.65)
    assert half.compute_cached == 0.4
    assert rows["never"].difference == 0
    assert "smartfrz:0.5" not in rows  # no run of never with that seed
    assert "shorter:0.5,1.0" not in rows  # the other rate is better
    assert rows["shorter:0.5,2.0"].difference == pytest.approx(-5.0)
    assert np.isnan(rows["shorter:0.5,2.0"].error)


def test_at_matched_compute():
    asked = [result("smartfrz:0.5", 0, 0.81, 0.8), result("smartfrz:0.5", 1, 0.87, 0.7)]
    # With seed 0 static lies half-way between .82 at .6 and .80 at 1; with seed 1 a quarter of the way from .86 to .90.
    lines = report.matched(RESULTS[:-1] + asked).splitlines()
    assert lines[0] == "| strategy | compute | less static | less shorter |"
    assert lines[2] == "| smartfrz:0.5 | 0.75 | +0.00 +- 0.00 | - |"  # of shorter there is nothing with seed 1
    cheap = [result("smartfrz:0.5", 0, 0.81, 0.5, 0.45)]
    assert report.matched(RESULTS[:-1] + cheap).splitlines()[2] == "| smartfrz:0.5 | 0.50 | - | +6.00 |"
    in_cache = report.matched(RESULTS[:-1] + cheap, cached=True).splitlines()[2]
    assert in_cache.startswith("| smartfrz:0.5 | 0.45 | -0.83 |")  # .82 - .05 / .6 * .02 is .8183


def test_table_and_picture(tmp_path):
    rows = report.rows(RESULTS)
    text = report.table(rows)
    assert "| static:half | 2 | 0.60 | 0.40 | 0.65 | 84.00 | -1.00 +- 3.00 |" in text
    report.picture(rows, tmp_path / "case.png", "case")
    assert (tmp_path / "case.png").stat().st_size > 10_000


FORWARD = {"a": 1.0, "b": 2.0, "c": 3.0}


class Account:
    """Three layers of forward cost 1, 2 and 3; a step costs three times that, and a frozen one its forward pass."""

    class Flops:
        def __init__(self, total, by_layer):
            self.total, self.forward_by_layer = total, by_layer

    def flops(self, frozen=None):
        names = frozen.names if frozen is not None else ()
        total = sum(cost * (1 if name in names else 3) for name, cost in FORWARD.items())
        return self.Flops(total, FORWARD)


LAYERS = sfj.Layers(tuple(sfj.Layer(name, (name,), (name,)) for name in "abc"))


def bench():
    made = Bench.__new__(Bench)
    made.layers, made.account = LAYERS, Account()
    made.setup = CASES["resnet14-weak"].setup.__class__(
        **{**CASES["resnet14-weak"].setup.__dict__, "steps": 10, "examples": 6, "batch_size": 3}
    )
    return made


@pytest.mark.parametrize(
    ("frozen", "total_steps", "compute", "cached"),
    [
        ([], 10, 1.0, 1.0),
        ([], 5, 0.5, 0.5),
        # a saves 2 in 6 steps of 180 in all; its forward pass (1) in those after an epoch of 2 steps
        ([(4, ["a"])], 10, 1 - 12 / 180, 1 - (12 + 4) / 180),
        # b alone is not a front, and is one with a from step 6 on
        ([(2, ["b"]), (6, ["a"])], 10, 1 - (8 * 4 + 4 * 2) / 180, 1 - (8 * 4 + 4 * 2 + 2 * 3) / 180),
    ],
)
def test_compute_by_hand(frozen, total_steps, compute, cached):
    got = bench().compute(frozen, total_steps)
    np.testing.assert_allclose(got, (compute, cached), rtol=1e-12)


def test_with_augmentation_there_is_nothing_to_keep():
    made = bench()
    made.setup = dataclasses.replace(made.setup, augment=True)
    compute, cached = made.compute([(4, ["a"])], 10)
    assert compute == cached == pytest.approx(1 - 12 / 180)


class Tiny(nnx.Module):
    """Three layers that read images of 4 x 4 pixels."""

    def __init__(self, num_classes: int, rngs: nnx.Rngs):
        sizes = (48, 8, 8, num_classes)
        self.layers = nnx.List([nnx.Linear(*of, rngs=rngs) for of in itertools.pairwise(sizes)])

    def __call__(self, images):
        x = images.reshape(images.shape[0], -1)
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


@pytest.mark.slow
@pytest.mark.usefixtures("jax_defaults")
def test_what_similarity_guided_looks_at_is_counted_but_for_its_reference(tmp_path, monkeypatch):
    monkeypatch.setitem(trial.ARCHITECTURES, "tiny", Architecture(Tiny, 4, (16,), (40,), {}, batch_norm=False))
    setup = dataclasses.replace(
        CASES["resnet14-weak"].setup, architecture="tiny", data=FASHION, pretraining="scratch", batch_size=16, steps=40,
        examples=80, batch_norm="none",
    )  # fmt: skip
    made = Bench("tiny", Case(setup, 100), out=tmp_path, data_dir=tmp_path, weights_dir=None, say=print)
    looked = []
    features = made._features
    monkeypatch.setattr(made, "_features", lambda *of: looked.append(1) or features(*of))
    got = made.trial("similarity_guided", strategies()["similarity_guided"], 0, predictor=None)
    passes = len(looked) - 1  # one is of the reference
    assert 5 <= passes <= 20  # a window at least, and every second step at most
    compute, cached = made.compute(got.frozen, 40)
    probing = passes * made.forward_share(80)
    assert probing > 0.1  # all 80 examples where a step has 16
    assert (got.compute, got.compute_cached) == pytest.approx((compute + probing, cached + probing))

    # In rehearsals, too: beside the runs, three evaluations on a fifth of the examples.
    looked.clear()
    monkeypatch.setattr(made, "compute", lambda frozen, steps: (0.0, 0.0))
    _, price = made.rehearse({"similarity_guided": strategies()["similarity_guided"]}, 1.0, 0)
    assert looked
    assert price == pytest.approx(len(looked) * made.forward_share(80) + 3 * made.forward_share(16))


def test_every_strategy_makes_a_policy_or_says_what_it_lacks():
    costs = {"a": 1.0, "b": 2.0}
    reference = {"a": np.ones((4, 2)), "b": np.ones((4, 2))}
    situation = Situation(100, costs, lambda: reference, None, lambda params: 0.0, 0)
    for strategy in strategies().values():
        if strategy.needs is None:
            assert isinstance(strategy.policy(situation), sfj.Policy)
        else:
            with pytest.raises(ValueError, match="predictors"):
                strategy.policy(situation)


def test_what_is_done_is_not_run_again(tmp_path):
    args = closed_loop.parse(
        f"--data-dir {tmp_path} --out {tmp_path} --cases resnet14-weak --seeds 2 --strategies never static:*".split()
    )
    names = [name for name in strategies() if name == "never" or name.startswith("static:")]
    everything = [(case, name, seed) for case, name, _, seed in closed_loop.wanted(args, [])]
    assert everything == [("resnet14-weak", name, seed) for seed in (0, 1) for name in names]
    file = tmp_path / "results.jsonl"
    known = result("never", 1, 0.5, 1.0)._replace(case="resnet14-weak", frozen=[(3, ["a"])])
    file.write_text(json.dumps(known._asdict()) + "\n")
    assert json_lines.read(file, Result.parse) == [known]
    left = [(case, name, seed) for case, name, _, seed in closed_loop.wanted(args, [known])]
    assert left == [run for run in everything if run != ("resnet14-weak", "never", 1)]
    file.write_text("{broken\n")
    with pytest.raises(ValueError, match="line 1"):
        json_lines.read(file, Result.parse)


def test_rates_of_shorter_schedules_are_chosen_with_one_seed(tmp_path):
    line = f"--data-dir {tmp_path} --out {tmp_path} --cases resnet14-weak --seeds 2 --strategies shorter:0.4,*"
    results = []
    asked = []
    for case, name, _, seed in closed_loop.wanted(closed_loop.parse(line.split()), results):
        asked.append((name, seed))
        results.append(
            result(name, seed, {"0.5": 0.3, "1.0": 0.5, "2.0": 0.4}[name.split(",")[1]], 0.4)._replace(case=case)
        )
    assert asked == [(f"shorter:0.4,{rate}", 0) for rate in (0.5, 1.0, 2.0)] + [("shorter:0.4,1.0", 1)]


def test_the_report_is_made_of_known_results_and_its_links_lead_to_the_pictures(tmp_path):
    out, pictures, file = tmp_path / "out", tmp_path / "docs/pictures", tmp_path / "tables.md"
    out.mkdir()
    case = "resnet14-weak"
    made = [result("never", 0, 0.5, 1.0), result("static:all", 0, 0.4, 0.3)]
    lines = [json.dumps(row._replace(case=case)._asdict()) for row in made]
    (out / "results.jsonl").write_text("\n".join(lines) + "\n")
    line = f"--data-dir {tmp_path} --out {out} --pictures {pictures} --results {file} --cases {case} --seeds 1"
    assert closed_loop.main([*line.split(), "--strategies", "never", "static:all"]) == 0
    assert (pictures / f"{case}.png").read_bytes().startswith(b"\x89PNG")
    for folder, text in ((tmp_path, file.read_text()), (out, (out / "results.md").read_text())):
        (link,) = re.findall(r"!\[.*\]\((.*)\)", text)
        assert (folder / link).resolve() == (pictures / f"{case}.png").resolve()
        assert "| static:all | 1 | 0.30 " in text
        assert "-10.00" in text


def test_errors_name_the_way_out(tmp_path, capsys):
    with pytest.raises(SystemExit):
        closed_loop.parse(["--data-dir", "x", "--strategies", "sttaic"])
    assert "matches none of never" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        closed_loop.parse(["--data-dir", "x", "--predictors", str(tmp_path / "none"), "--strategies", "smartfrz:*"])
    assert f"argument --predictors: no folder {tmp_path / 'none'}; make one" in capsys.readouterr().err
    args = ["--data-dir", str(tmp_path / "none"), "--out", str(tmp_path / "out"), "--cases", "resnet14-weak"]
    assert closed_loop.main([*args, "--strategies", "never"]) == 2
    assert "none" in capsys.readouterr().err


def test_what_lacks_its_predictor_is_named(tmp_path, capsys):
    (tmp_path / "predictors" / "resnet14-weak" / "predictor").mkdir(parents=True)
    line = f"--data-dir {tmp_path} --out {tmp_path} --cases resnet14-weak vgg9-bn-good"
    line += " --strategies smartfrz:0.[25] cka:0.5"
    with_some = closed_loop.parse([*line.split(), "--predictors", str(tmp_path / "predictors")])
    assert closed_loop.left_out(with_some) == {
        str(tmp_path / "predictors/resnet14-weak/cka_predictor"): ["cka:0.5"],
        str(tmp_path / "predictors/vgg9-bn-good/predictor"): ["smartfrz:0.2", "smartfrz:0.5"],
        str(tmp_path / "predictors/vgg9-bn-good/cka_predictor"): ["cka:0.5"],
    }
    file = tmp_path / "tables.md"
    assert closed_loop.main([*line.split(), "--results", str(file)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "left out for want of --predictors: smartfrz:0.2, smartfrz:0.5, cka:0.5\n"
    assert "nothing to compare" in printed.err
    assert not file.exists()
