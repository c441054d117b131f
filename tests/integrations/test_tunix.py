"""Tunix's own trainer, with and without a policy."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax.pytrees import paths
from tests.docs.test_snippets import ROOT
from tests.docs.test_snippets import test_page as run_page

REASON = "needs google-tunix: `make test-tunix` installs it"
tunix_models = pytest.importorskip("tests.clients.tunix_models", reason=REASON)
qwix = pytest.importorskip("qwix", reason=REASON)
peft_trainer = tunix_models.peft_trainer

from smartfrz_jax.integrations import tunix  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("jax_defaults"),
    pytest.mark.filterwarnings("ignore"),  # theirs
]
STEPS = 6


def batches(number=STEPS):
    for seed in range(number):
        tokens = jax.random.randint(jax.random.key(seed), (2, 6), 1, 13)
        yield tunix_models.BATCH | {"input_tokens": tokens}


class Losses:
    """A training hook of the user's that notes the losses, as Tunix hands them on."""

    def __init__(self):
        self.values = {}

    def on_train_step_end(self, trainer, step, loss):
        self.values[step] = float(loss)

    def __getattr__(self, name):
        if name.startswith("on_"):
            return lambda *args, **kwargs: None
        raise AttributeError(name)


def adapted(model):
    provider = qwix.LoraProvider(module_path=".*(q_proj|gate_proj|up_proj|down_proj)", rank=2, alpha=2.0)
    batch = tunix_models.BATCH
    arguments = batch["input_tokens"], batch["positions"], None, batch["attention_mask"]
    return qwix.apply_lora_to_model(model, provider, *arguments, rngs=nnx.Rngs(1))


def trainer_of(*, lora=False, accumulate=None, folder=None, max_steps=STEPS, save_every=1):
    model = tunix_models.make_llama3()
    options = None
    if folder is not None:
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(save_interval_steps=save_every, max_to_keep=2)
    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=100,
        max_steps=max_steps,
        gradient_accumulation_steps=accumulate,
        checkpoint_root_directory=None if folder is None else str(folder),
        checkpointing_options=options,
        pbar_description=None,
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    trainer = peft_trainer.PeftTrainer(adapted(model) if lora else model, tx, config)
    hook = Losses()
    trainer.with_training_hooks(hook)
    return trainer, hook


def freezing(trainer, at=2, **options):
    """Freezes the first of two blocks after a step."""

    def update(state, layers, *, step, params, **signals):
        names = [name for name in layers.names if name.startswith("layers/0/")] if step >= at else []
        return frozenset(names), state

    policy = sfj.Policy(lambda layers, params: np.zeros(1), update, options={"name": "first block"})
    return tunix.freeze_layers(trainer, policy, next(batches()), **options)


def arrays(model):
    return {name: np.asarray(leaf) for name, leaf in paths.flatten(nnx.as_pure(nnx.state(model))).items()}


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.parametrize(("lora", "accumulate"), [(False, None), (True, None), (False, 2)])
def test_with_nothing_frozen_all_is_as_in_the_trainer_alone(lora, accumulate):
    number = STEPS * (accumulate or 1)
    stock, its = trainer_of(lora=lora, accumulate=accumulate)
    stock.train(batches(number))
    ours, mine = trainer_of(lora=lora, accumulate=accumulate)
    freezer = tunix.freeze_layers(ours, sfj.policies.never(), next(batches()))
    ours.train(batches(number))
    assert len(mine.values) >= STEPS - 1
    assert mine.values == its.values
    assert_equal(arrays(ours.model), arrays(stock.model))
    assert freezer.steps == ours.train_steps == stock.train_steps == STEPS


@pytest.mark.parametrize("lora", [False, True])
def test_frozen_layers_hold_still_and_flops_fall_as_predicted(lora):
    trainer, _ = trainer_of(lora=lora, max_steps=2)
    freezer = freezing(trainer)
    trainer.config.max_steps = 2
    trainer.train(batches(2))
    held = list(freezer.frozen.params)
    assert held
    before = arrays(trainer.model)
    trainer, _ = trainer_of(lora=lora)
    freezer = freezing(trainer)
    trainer.train(batches())
    after = arrays(trainer.model)
    assert_equal({name: after[name] for name in held}, {name: before[name] for name in held})
    moving = [name for name in freezer.layers.owner if name not in held]
    assert not [name for name in moving if np.array_equal(after[name], before[name])]

    whole, part = trainer.jit_train_and_eval_step()[0].programs
    account = freezer._account
    predicted = account.flops(part.frozen).total / account.flops(whole.frozen).total
    assert part.cost.flops / whole.cost.flops == pytest.approx(predicted, abs=0.05)
    assert predicted < 0.95


def test_the_norm_of_the_gradients_is_of_the_active_layers():
    trainer, _ = trainer_of()
    freezer = freezing(trainer, at=1)
    step, _ = trainer.jit_train_and_eval_step()
    batch = next(batches())
    step(batch)
    grads = nnx.grad(tunix_models.loss_fn, argnums=nnx.DiffState(0, nnx.Param))(trainer.model, **batch)
    active = [leaf for name, leaf in paths.flatten(nnx.as_pure(grads)).items() if name not in freezer.frozen.params]
    _, _, norm = step(batch)
    assert float(norm) == pytest.approx(float(optax.global_norm(active)), rel=1e-5)


def test_a_run_goes_on_where_it_stopped_and_without_the_library(tmp_path):
    straight, _ = trainer_of()
    freezing(straight, at=3)
    straight.train(batches())

    first, _ = trainer_of(folder=tmp_path / "run", max_steps=4)
    freezing(first, at=3)
    first.train(batches())
    again, _ = trainer_of(folder=tmp_path / "run")
    freezer = freezing(again, at=3)
    assert len(freezer.frozen.names) > 0
    assert freezer.steps == again.train_steps == 4
    again.train(batches())
    assert_equal(arrays(again.model), arrays(straight.model))
    assert sorted(path.name for path in (tmp_path / "run-freezing").iterdir()) == ["5", "6"]

    plain, hook = trainer_of(folder=tmp_path / "run", max_steps=8)
    assert plain.train_steps == 6
    assert_equal(arrays(plain.model), arrays(straight.model))
    plain.train(batches(8))
    assert all(np.isfinite(value) for value in hook.values.values())


def test_a_run_begun_without_a_policy_goes_on_with_one(tmp_path):
    stock, _ = trainer_of()
    stock.train(batches())
    begun, _ = trainer_of(folder=tmp_path / "run", max_steps=3)
    begun.train(batches())
    again, _ = trainer_of(folder=tmp_path / "run")
    assert tunix.freeze_layers(again, sfj.policies.never(), next(batches())).steps == 3
    again.train(batches())
    assert_equal(arrays(again.model), arrays(stock.model))


def test_the_page(capsys, tmp_path, monkeypatch):
    run_page(ROOT / "docs" / "guides" / "tunix.md", capsys, tmp_path, monkeypatch)


class TestRefused:
    def test_no_trainer(self):
        with pytest.raises(TypeError, match=r"trainer: got .*, expected a PeftTrainer"):
            tunix.freeze_layers(object(), sfj.policies.never(), next(batches()))

    def test_twice(self):
        trainer, _ = trainer_of()
        freezing(trainer)
        with pytest.raises(ValueError, match="trainer: a policy freezes its layers already"):
            freezing(trainer)

    def test_another_train_step(self):
        class Other(peft_trainer.PeftTrainer):
            def _train_step(self, model, optimizer, inputs):
                return None

        trainer, _ = trainer_of()
        trainer.__class__ = Other
        with pytest.raises(TypeError, match="got a Other, which has a train step of its own"):
            freezing(trainer)

    def test_a_step_that_is_not_compiled(self):
        trainer, _ = trainer_of()
        freezing(trainer)
        with pytest.raises(ValueError, match="skip_jit: got True, expected False"):
            trainer.train(batches(), skip_jit=True)
