"""Long runs: a policy that leaves the path of never is the policy run from the start; interruptions change nothing."""

import itertools

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
from flax import nnx

import smartfrz_jax as sfj
from models import weights
from research import json_lines
from research.long_runs.__main__ import NAMES, RESULTS, best_rate, jobs
from research.long_runs.bench import Bench
from research.long_runs.cases import CASES, Case, tuned_as
from research.long_runs.labels import label
from research.long_runs.pairs import kept_activations, moments
from research.long_runs.report import lines, page
from research.long_runs.run import LEAD, REHEARSAL, Job, Runner
from research.long_runs.strategies import FIRST, STRATEGIES, WITHDRAWN, Strategy
from research.recordings.architectures import ARCHITECTURES
from research.recordings.sets import open_set
from research.trials.classification import losses_on
from tests.research.tiny_bench import tiny_bench

pytestmark = pytest.mark.usefixtures("jax_defaults")

# As long as a decision, its effect and a few steps behind take.
_EPOCHS = 3 * LEAD / 62
_FOLLOWERS = {
    "progress:0.5": Strategy(lambda s: sfj.progress(total_steps=s.total_steps, caution=0.3)),
    "static": Strategy(
        lambda s: sfj.static_prefix([(0.2, 0.5)], total_steps=s.total_steps, costs=s.costs), returning="kept"
    ),
    "late": Strategy(lambda s: sfj.static_prefix([(0.99, 1.0)], total_steps=s.total_steps, costs=s.costs)),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    case = Case(ARCHITECTURES["resnet8"], "fashion_mnist", None, _EPOCHS, 32, "sgd", (0.05,), 1, 5e-4, augment=True)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return Bench("tiny", case, state=tmp_path_factory.mktemp("state"), data_dir=None, weights_dir=None)


def _job(name):
    return Job("tiny", name, 1, 0.05)


def _finished(runner):
    assert runner.run()
    state = nnx.to_pure_dict(nnx.state((runner.model, runner.optimizer)))
    return jax.tree.map(np.asarray, state), runner.result()


def _stopped_twice(make):
    for _ in range(2):
        assert not make(deadline=0.0).run()
    return make()


@pytest.fixture(scope="module")
def followed(bench, tmp_path_factory):
    """The folder of a run of never that policies watched, and its results; interrupted after steps 1 and 2."""
    folder = tmp_path_factory.mktemp("followed")

    def make(**options):
        runner = Runner(bench, _job("never"), STRATEGIES["never"], state=folder, **options)
        runner.watch(_FOLLOWERS)
        return runner

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        runner = _stopped_twice(make)
        arrays, row = _finished(runner)
        return folder, arrays, row, runner.rows_of_followers(row)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["progress:0.5", "static"])
def test_a_policy_that_left_never_is_the_policy_run_from_the_start(bench, followed, tmp_path, name):
    folder, *_ = followed
    alone, row = _finished(Runner(bench, _job(name), _FOLLOWERS[name], state=tmp_path))
    branch = _stopped_twice(lambda **o: Runner(bench, _job(name), _FOLLOWERS[name], state=folder, **o))
    branched, branched_row = _finished(branch)
    jax.tree.map(np.testing.assert_array_equal, branched, alone)
    assert branched_row["branched_at"] == row["frozen"][0][0]  # where the first layer freezes
    assert 0 < branched_row["branched_at"] < branched_row["steps"] == row["steps"]
    assert row["branched_at"] is None
    same = ("frozen", "flops", "loss", "accuracy", "curve", "flops_share")
    assert {key: branched_row[key] for key in same} == {key: row[key] for key in same}
    assert [program[:3] for program in branched_row["programs"]] == [program[:3] for program in row["programs"]]
    assert row["flops_share"] < 1


@pytest.mark.parametrize("name", ["simfreeze", "relative_gradient_norm:0.1"])
@pytest.mark.slow
def test_policies_that_measure_are_made_for_a_run(bench, name):
    strategy = STRATEGIES[name]
    policy = strategy.policy(bench.situation(0, 1335, 267, None))
    params = nnx.to_pure_dict(nnx.state(bench.model(0), nnx.Param))
    policy.init(bench.layers, params)
    assert strategy.follows_never
    assert strategy.returning == "kept"


@pytest.mark.slow
def test_layers_that_take_turns_are_frozen_before_the_first_step(bench, tmp_path):
    def make(**options):
        return Runner(bench, _job("badam,kept"), STRATEGIES["badam,kept"], state=tmp_path, **options)

    runner = make(deadline=0.0)
    held = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(runner.optimizer.opt_state)))
    assert held < 0.5 * sum(leaf.size for leaf in jax.tree.leaves(nnx.state(runner.model, nnx.Param)))
    assert not runner.run()
    begun = runner.freezer.events
    assert [(event.step, event.returned) for event in begun] == [(0, ())]
    assert runner.tally.steps == 1
    again = make(deadline=0.0)
    assert not again.run()
    assert again.freezer.events == begun
    assert again.tally.steps == 2


@pytest.mark.slow
def test_interrupted_never_is_never(bench, followed, tmp_path):
    _, arrays, row, _ = followed
    alone, alone_row = _finished(Runner(bench, _job("never"), STRATEGIES["never"], state=tmp_path))
    jax.tree.map(np.testing.assert_array_equal, arrays, alone)
    assert alone_row["curve"] == row["curve"]
    assert (row["steps"], len(row["programs"]), row["frozen"]) == (alone_row["steps"], 1, [])


@pytest.mark.slow
def test_who_begins_to_watch_when_never_is_resumed_is_left_out(tmp_path):
    bench, names = tiny_bench(tmp_path), ("late", "static", "progress:0.5")

    def never(watching, **options):
        runner = Runner(bench, _job("never"), STRATEGIES["never"], state=tmp_path, **options)
        runner.watch({name: _FOLLOWERS[name] for name in watching})
        return runner

    assert not never(names[:1], deadline=0.0).run()
    assert not never(names[:2], deadline=0.0).run()
    runner = never(names)
    assert runner.run()
    assert runner.tally.steps == runner.total_steps
    assert [row["strategy"] for row in runner.rows_of_followers(runner.result())] == ["late"]
    assert not list(tmp_path.glob("*/branch*"))


@pytest.mark.slow
def test_who_never_leaves_has_the_row_of_never(followed):
    *_, row, followers = followed
    assert [one["strategy"] for one in followers] == ["late"]
    assert followers[0]["accuracy"] == row["accuracy"]
    assert followers[0]["decide_seconds"] != row["decide_seconds"]


def test_the_rate_is_chosen_first_then_seed_by_seed():
    case = "resnet20-cifar10"
    rows = []
    tune = [job.rate for job in jobs(rows, [case], range(2))]
    assert tune == list(CASES[case].rates)
    tried = zip(tune, (1, 3, 2, 0), strict=True)
    rows = [{"case": case, "strategy": "tune", "seed": 0, "rate": rate, "accuracy": right} for rate, right in tried]
    assert best_rate(rows, case) == tune[1]
    wanted = list(jobs(rows, [case], range(2)))
    assert wanted[0] == Job(case, "never", 0, tune[1])
    names = [job.name for job in wanted if job.seed == 0]
    assert names == [name for name in NAMES if not (name in STRATEGIES and STRATEGIES[name].reference)]  # with none yet
    assert names[FIRST] == REHEARSAL
    assert [(job.seed, job.name) for job in jobs(rows, [case], range(2), NAMES[:3], first=1)] == [
        (0, NAMES[0]),
        (1, NAMES[0]),
        *((seed, name) for seed in range(2) for name in NAMES[1:3]),
    ]
    assert {job.rate for job in wanted if job.name == "shorter:0.5,2"} == {2 * tune[1]}
    rows.append({"case": case, "strategy": "never", "seed": 1, "rate": tune[1], "accuracy": 1})
    assert Job(case, "similarity_guided", 0, tune[1]) in list(jobs(rows, [case], range(2)))
    assert Job(case, "never", 1, tune[1]) not in list(jobs(rows, [case], range(2)))


def test_runs_of_other_lengths_share_the_rates_that_were_tried():
    rows = [
        {"case": "resnet20-cifar10", "strategy": "tune", "seed": 0, "rate": rate, "accuracy": rate}
        for rate in CASES["resnet20-cifar10"].rates
    ]
    first = Job("resnet20-cifar10-3-epochs", "never", 0, rows[-1]["rate"])
    assert next(jobs(rows, ["resnet20-cifar10-3-epochs"], range(1))) == first
    assert tuned_as("resnet20-cifar10-1-epoch") == "resnet20-cifar10-1-epoch"  # tried in less
    one = list(jobs(rows[1:], ["resnet20-cifar10-3-epochs"], range(1)))
    assert one == [Job("resnet20-cifar10", "tune", 0, rows[0]["rate"])]


def test_results_are_rows_of_known_cases_and_strategies():
    rows = json_lines.read(RESULTS, dict)
    assert {row["case"] for row in rows} <= CASES.keys()
    assert {row["strategy"] for row in rows} <= {*STRATEGIES, *WITHDRAWN, REHEARSAL, "tune"}


def _row(strategy, seed, **fields):
    fields = {"accuracy": 0.9, "flops": 100.0, "train_seconds": 8.0, "wait_seconds": 1.0, **fields}
    costs = {"decide_seconds": 1.0, "train_cpu_seconds": 10.0, "steps": 50, "frozen": []}
    return {"case": "lite0-cifar10", "strategy": strategy, "seed": seed, **costs, **fields}


def test_a_single_rate_is_taken_untried():
    case = "lite0-96-cifar10-1-epoch"
    assert len(CASES[case].rates) == 1
    assert best_rate([], case) == CASES[case].rates[0]
    assert next(jobs([], [case], range(1))) == Job(case, "never", 0, CASES[case].rates[0])
    row = _row("never", 0) | {"case": case, "commit": "c", "versions": "v", "hardware": "h"}
    assert f"Learning rate, untried: {CASES[case].rates[0]:g}." in page([row])


def test_a_line_is_the_mean_of_paired_differences():
    rows = [_row("never", 0), _row("never", 1, accuracy=0.8), _row("static:half", 5)]
    rows += [_row("progress", seed, accuracy=a, flops=60.0, wait_seconds=0.0) for seed, a in ((0, 0.89), (1, 0.81))]
    rows[-1]["frozen"] = [[10, ["a"], []], [20, ["b"], []]]
    never, progress = lines(rows, "lite0-cifar10")
    assert (never.strategy, never.difference) == ("never", 0)
    assert (progress.seeds, progress.flops, progress.time, progress.first) == (2, 0.6, pytest.approx(0.9), 0.2)
    assert progress.difference == pytest.approx(0, abs=1e-9)  # -1 and +1
    assert progress.error == pytest.approx(1)


def test_only_runs_that_start_from_the_same_weights_are_paired():
    starts = {0: ({}, {}), 1: ({"start": 7}, {"start": 7}), 2: ({}, {"start": 7}), 3: ({"start": 7}, {"start": 8})}
    rows = [_row("never", seed, config=before) for seed, (before, _) in starts.items()]
    rows += [_row("progress", seed, accuracy=0.8, config=after) for seed, (_, after) in starts.items()]
    never, progress = lines(rows, "lite0-cifar10")
    assert (never.seeds, progress.seeds) == (4, 2)


def test_the_weights_from_which_other_cases_start_are_those_of_a_trained_network(shared):
    case = CASES[CASES["resnet20-cifar10"].weights]
    data = open_set(case.data, case.architecture, shared / "data/tfds", 1, held_out=slice(1000))
    model = case.architecture.make(num_classes=100, rngs=nnx.Rngs(0))
    weights.load(model, RESULTS.with_name("weights") / f"{CASES['resnet20-cifar10'].weights}.safetensors")
    _, right = losses_on(model, data.held_out)
    assert right.mean() == pytest.approx(0.591, abs=0.04)  # of 10,000; this is two and a half standard errors


def test_labels_of_points_that_coincide_are_apart():
    figure, axis = plt.subplots(figsize=(5, 4))
    points = [(0.5, 0.5)] * 4 + [(0.99, 0.5), (0.5, 0.97)]
    axis.set(xlim=(0, 1), ylim=(0, 1))
    figure.canvas.draw()
    boxes = label(axis, points, ["a strategy:0.5"] * 6, ["black"] * 6)
    frame = axis.get_window_extent()
    plt.close(figure)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and box.y1 <= frame.y1 for box in boxes)


def test_the_time_of_a_run_that_stood_still_is_left_out():
    run = {"case": "minilm-cola", "matthews": 0.3, "flops": 1.0, "decide_seconds": 0.0, "wait_seconds": 0.0,
           "steps": 10, "frozen": [], "train_cpu_seconds": 100.0}  # fmt: skip
    seconds = {("never", 0): 110.0, ("never", 1): 100.0, ("progress", 0): 55.0, ("progress", 1): 140.0}
    rows = [run | {"strategy": name, "seed": seed, "train_seconds": s} for (name, seed), s in seconds.items()]
    rows[2]["train_cpu_seconds"], rows[3]["train_cpu_seconds"] = 50.0, 107.0  # the second stood still
    shares = {line.strategy: (line.time, line.cpu) for line in lines(rows, "minilm-cola")}
    assert shares == {"never": (1.0, 1.0), "progress": (0.5, 0.5)}
    (alone,) = (line for line in lines(rows[1:2] + rows[3:], "minilm-cola") if line.strategy == "progress")
    assert np.isnan(alone.time)
    assert np.isnan(alone.cpu)
    provenance = {"commit": "c", "versions": "v", "hardware": "h"}
    text = page([row | provenance for row in rows[1:2] + rows[3:]])
    assert "| progress | 1 | 1.00 | - | - | 30.00 | +0.00 | - |" in text
    assert "| never | 1 | 1.00 | 1.00 | 1.00 | 30.00 | - | - |" in text


def test_moments_are_compared_within_a_seed():
    figures = {("lisa", 0): (0.30, 0.5), ("lisa,kept", 0): (0.32, 0.4), ("lisa", 1): (0.40, 0.7),
               ("lisa,kept", 1): (0.48, 0.5), ("lisa,kept", 2): (0.9, 0.1), ("badam", 0): (0.1, 0.9)}  # fmt: skip
    rows = [
        {"case": "minilm-cola", "strategy": name, "seed": seed, "matthews": figure, "loss": loss}
        for (name, seed), (figure, loss) in figures.items()
    ]
    *_, found = moments(rows).splitlines()
    assert found == ("| minilm-cola | lisa | 2 | 35.00 | 40.00 | +5.00 ± 3.00 | 0.6000 | 0.4500 | -0.1500 ± 0.0500 |")
    assert not moments(rows[:1])


def test_kept_activations_are_compared_with_the_same_run_without():
    def row(strategy, **values):
        return {"case": "resnet20-cifar10", "strategy": strategy, "seed": 3} | values

    plain = row("static:half", flops=10.0, train_cpu_seconds=4.0, train_seconds=4.0, accuracy=0.5)
    kept = row("static:half,cached:2", flops=8.0, train_cpu_seconds=5.0, train_seconds=5.0, accuracy=0.49)
    *_, found = kept_activations([kept, plain, row("never")]).splitlines()
    assert found == "| resnet20-cifar10 | static:half,cached:2 | 1 | 0.80 | 1.25 | -1.00 |"
    *_, found = kept_activations([kept | {"train_seconds": 7.0}, plain]).splitlines()  # it stood still
    assert found == "| resnet20-cifar10 | static:half,cached:2 | 1 | 0.80 | - | -1.00 |"
    assert not kept_activations([kept])


def test_the_page_is_that_of_the_results():
    assert (RESULTS.parent / "results.md").read_text() == page(json_lines.read_with_commit(RESULTS))
