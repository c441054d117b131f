"""Every public function of optax and ``optax.contrib`` that makes a gradient transformation, with arguments for it."""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib


@dataclasses.dataclass(frozen=True)
class Case:
    """An optimizer.

    Attributes:
        tx: The optax transformation.
        extra: From the loss of a parameter pytree and that pytree to the further arguments of ``update``.
        per_example: Whether its gradients have a leading axis of examples.
        compiled: Whether to compile ``update``: it has loops and branches, each of which would be compiled at each
            call.
    """

    tx: Any
    extra: Callable[..., dict[str, Any]] = lambda loss, params: {}
    per_example: bool = False
    compiled: bool = False


def with_value(loss, params):
    return {"value": loss(params)}


def of_line_search(loss, params):
    value, grad = jax.value_and_grad(loss)(params)
    return {"value": value, "grad": grad, "value_fn": loss}


def of_hessian(loss, params):
    return {"obj_fn": loss}


def biggest(tree):
    """The same for every partition: a mask or labels that depend on the parameters of a layer alone."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)


def groups(tree):
    """The labels that ``freeze`` uses, too."""
    return jax.tree.map(lambda leaf: "train" if leaf.ndim > 1 else "frozen", tree)


def matrices(tree):
    return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(), tree)


def every_other_step(step, **extra_args):
    return step % 2 == 0


def dpsgd():
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of its only argument for a seed
        return contrib.dpsgd(0.1, 1.0, 0.1, seed=0, momentum=0.9)


SCHEDULE = optax.cosine_decay_schedule(0.1, 10)
TWO = {"train": optax.adam(0.1), "frozen": optax.sgd(0.01, momentum=0.9)}
KEY = jax.random.key(0)

OPTAX = {
    "MultiSteps": Case(optax.MultiSteps(optax.adamw(0.1), every_k_schedule=2), compiled=True),
    "adabelief": Case(optax.adabelief(0.1)),
    "adadelta": Case(optax.adadelta(0.1, weight_decay=0.1)),
    "adafactor": Case(optax.adafactor(0.1, min_dim_size_to_factor=2, weight_decay_rate=0.1, momentum=0.9)),
    "adagrad": Case(optax.adagrad(0.1)),
    "adam": Case(optax.adam(SCHEDULE, nesterov=True)),
    "adamax": Case(optax.adamax(0.1)),
    "adamaxw": Case(optax.adamaxw(0.1, weight_decay=0.1, mask=biggest)),
    "adamw": Case(optax.adamw(0.1, weight_decay=0.1, mask=biggest, mu_dtype=jnp.bfloat16)),
    "adan": Case(optax.adan(0.1, weight_decay=0.1)),
    "adaptive_grad_clip": Case(optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.1))),
    "add_decayed_weights": Case(optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.1), optax.scale(-0.1))),
    "add_noise": Case(optax.chain(optax.add_noise(0.1, 0.5, KEY), optax.sgd(0.1))),
    "amsgrad": Case(optax.amsgrad(0.1)),
    "apply_every": Case(optax.chain(optax.adam(0.1), optax.apply_every(2))),
    "apply_if_finite": Case(optax.apply_if_finite(optax.adam(0.1), max_consecutive_errors=3), compiled=True),
    "centralize": Case(optax.chain(optax.centralize(), optax.adam(0.1))),
    "chain": Case(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1), optax.ema(0.9))),
    "clip": Case(optax.chain(optax.clip(0.5), optax.sgd(0.1, momentum=0.9))),
    "clip_by_block_rms": Case(optax.chain(optax.clip_by_block_rms(0.5), optax.adam(0.1))),
    "clip_by_global_norm": Case(optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1))),
    "conditionally_mask": Case(optax.conditionally_mask(optax.adam(0.1), every_other_step), compiled=True),
    "conditionally_transform": Case(optax.conditionally_transform(optax.adam(0.1), every_other_step), compiled=True),
    "ema": Case(optax.chain(optax.adam(0.1), optax.ema(0.9))),
    "freeze": Case(optax.chain(optax.adam(0.1), optax.freeze(lambda tree: jax.tree.map(lambda w: w.ndim > 1, tree)))),
    "fromage": Case(optax.fromage(0.1)),
    "identity": Case(optax.identity()),
    "inject_hyperparams": Case(optax.inject_hyperparams(optax.adamw)(learning_rate=SCHEDULE, weight_decay=0.1)),
    "keep_params_nonnegative": Case(optax.chain(optax.sgd(0.1), optax.keep_params_nonnegative())),
    "lamb": Case(optax.lamb(0.1, weight_decay=0.1)),
    "lars": Case(optax.lars(0.1, weight_decay=0.1)),
    "lbfgs": Case(optax.lbfgs(memory_size=2), of_line_search, compiled=True),
    "lion": Case(optax.lion(0.1, weight_decay=0.1)),
    "masked": Case(optax.masked(optax.adamw(0.1), biggest)),
    "measure_with_ema": Case(
        optax.chain(optax.monitor({"norm": optax.measure_with_ema(optax.tree.norm, 0.9)}), optax.adam(0.1))
    ),
    "monitor": Case(optax.chain(optax.monitor({"norm": optax.tree.norm}), optax.adam(0.1))),
    "multi_transform": Case(optax.multi_transform(TWO, groups)),
    "nadam": Case(optax.nadam(0.1)),
    "nadamw": Case(optax.nadamw(0.1, weight_decay=0.1)),
    "named_chain": Case(optax.named_chain(("clip", optax.clip_by_global_norm(1.0)), ("adamw", optax.adamw(0.1)))),
    "noisy_sgd": Case(optax.noisy_sgd(0.1, key=KEY)),
    "normalize_by_update_norm": Case(optax.chain(optax.normalize_by_update_norm(), optax.sgd(0.1))),
    "novograd": Case(optax.novograd(0.1, weight_decay=0.1)),
    "optimistic_adam_v2": Case(optax.optimistic_adam_v2(0.1)),
    "optimistic_gradient_descent": Case(optax.optimistic_gradient_descent(0.1)),
    "partition": Case(optax.partition(TWO, groups)),
    "polyak_sgd": Case(optax.polyak_sgd(), with_value),
    "radam": Case(optax.radam(0.1)),
    "rmsprop": Case(optax.rmsprop(0.1, centered=True, momentum=0.9)),
    "rprop": Case(optax.rprop(0.1)),
    "scale": Case(optax.scale(-0.1)),
    "scale_by_adadelta": Case(optax.scale_by_adadelta()),
    "scale_by_adam": Case(optax.scale_by_adam()),
    "scale_by_adamax": Case(optax.scale_by_adamax()),
    "scale_by_adan": Case(optax.scale_by_adan()),
    "scale_by_amsgrad": Case(optax.scale_by_amsgrad()),
    "scale_by_backtracking_linesearch": Case(
        optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(3, store_grad=True)),
        of_line_search,
        compiled=True,
    ),
    "scale_by_belief": Case(optax.scale_by_belief()),
    "scale_by_distance_over_gradients": Case(optax.scale_by_distance_over_gradients()),
    "scale_by_lbfgs": Case(optax.scale_by_lbfgs(memory_size=2), compiled=True),
    "scale_by_factored_rms": Case(optax.scale_by_factored_rms(min_dim_size_to_factor=2)),
    "scale_by_learning_rate": Case(optax.chain(optax.trace(0.9), optax.scale_by_learning_rate(SCHEDULE))),
    "scale_by_lion": Case(optax.scale_by_lion()),
    "scale_by_novograd": Case(optax.scale_by_novograd()),
    "scale_by_optimistic_gradient": Case(optax.scale_by_optimistic_gradient()),
    "scale_by_param_block_norm": Case(optax.scale_by_param_block_norm()),
    "scale_by_param_block_rms": Case(optax.scale_by_param_block_rms()),
    "scale_by_polyak": Case(optax.scale_by_polyak(), with_value),
    "scale_by_radam": Case(optax.scale_by_radam()),
    "scale_by_rms": Case(optax.scale_by_rms()),
    "scale_by_rprop": Case(optax.scale_by_rprop(0.1)),
    "scale_by_rss": Case(optax.scale_by_rss()),
    "scale_by_schedule": Case(optax.scale_by_schedule(SCHEDULE)),
    "scale_by_sign": Case(optax.scale_by_sign()),
    "scale_by_sm3": Case(optax.scale_by_sm3()),
    "scale_by_stddev": Case(optax.scale_by_stddev()),
    "scale_by_trust_ratio": Case(optax.scale_by_trust_ratio()),
    "scale_by_yogi": Case(optax.scale_by_yogi()),
    "scale_by_zoom_linesearch": Case(
        optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(3)), of_line_search, compiled=True
    ),
    "selective_transform": Case(optax.selective_transform(optax.adam(0.1), freeze_mask=biggest)),
    "set_to_zero": Case(optax.set_to_zero()),
    "sgd": Case(optax.sgd(0.1, momentum=0.9, nesterov=True)),
    "sign_sgd": Case(optax.sign_sgd(0.1)),
    "signum": Case(optax.signum(0.1)),
    "sm3": Case(optax.sm3(0.1)),
    "snapshot": Case(optax.chain(optax.snapshot("norm", optax.tree.norm), optax.adam(0.1))),
    "stateless": Case(
        optax.stateless(lambda updates, params: jax.tree.map(lambda g, w: -0.1 * (g + w), updates, params))
    ),
    "stateless_with_tree_map": Case(optax.stateless_with_tree_map(lambda g, w: -0.1 * (g + w))),
    "trace": Case(optax.chain(optax.trace(0.9, nesterov=True), optax.scale(-0.1))),
    "with_extra_args_support": Case(optax.with_extra_args_support(optax.adam(0.1))),
    "yogi": Case(optax.yogi(0.1)),
    "zero_nans": Case(optax.chain(optax.zero_nans(), optax.adam(0.1))),
}

CONTRIB = {
    "acprop": Case(contrib.acprop(0.1, weight_decay=0.1)),
    "ademamix": Case(contrib.ademamix(0.1, weight_decay=0.1)),
    "adopt": Case(contrib.adopt(0.1)),
    "cocob": Case(contrib.cocob(weight_decay=0.1)),
    "dadapt_adamw": Case(contrib.dadapt_adamw(weight_decay=0.1)),
    "differentially_private_aggregate": Case(
        optax.chain(contrib.differentially_private_aggregate(1.0, 0.1, key=KEY), optax.adam(0.1)),
        per_example=True,
        compiled=True,
    ),
    "dog": Case(contrib.dog(weight_decay=0.1)),
    "dowg": Case(contrib.dowg(weight_decay=0.1)),
    "dpsgd": Case(dpsgd(), per_example=True),
    "galore": Case(contrib.galore(0.1, rank=1, update_proj_gap=2), compiled=True),
    "hutchinson_estimator_diag_hessian": Case(
        contrib.hutchinson_estimator_diag_hessian(KEY), of_hessian, compiled=True
    ),
    "madgrad": Case(contrib.madgrad(0.1)),
    "mechanize": Case(contrib.mechanize(optax.adam(1.0)), compiled=True),
    "momo": Case(contrib.momo(), with_value),
    "momo_adam": Case(contrib.momo_adam(), with_value),
    "muon": Case(contrib.muon(0.1, weight_decay=0.1), compiled=True),
    "normalize": Case(optax.chain(contrib.normalize(), optax.sgd(0.1))),
    "prodigy": Case(contrib.prodigy(weight_decay=0.1)),
    "reduce_on_plateau": Case(
        optax.chain(optax.adam(0.1), contrib.reduce_on_plateau(patience=1)), with_value, compiled=True
    ),
    "sam": Case(
        contrib.sam(optax.adam(0.1), optax.chain(contrib.normalize(), optax.sgd(0.1)), opaque_mode=True),
        lambda loss, params: {"grad_fn": lambda params, i: jax.grad(loss)(params)},
    ),
    "scale_by_acprop": Case(contrib.scale_by_acprop()),
    "scale_by_ademamix": Case(contrib.scale_by_ademamix()),
    "scale_by_adopt": Case(contrib.scale_by_adopt()),
    "scale_by_cocob": Case(contrib.scale_by_cocob()),
    "scale_by_galore": Case(contrib.scale_by_galore(rank=1, update_proj_gap=2), compiled=True),
    "scale_by_madgrad": Case(contrib.scale_by_madgrad(0.1)),
    "scale_by_muon": Case(
        optax.masked(contrib.scale_by_muon(weight_dimension_numbers=matrices), biggest), compiled=True
    ),
    "scale_by_simplified_ademamix": Case(contrib.scale_by_simplified_ademamix()),
    "schedule_free": Case(contrib.schedule_free(optax.adam(0.1, b1=0.0), 0.1)),
    "schedule_free_adamw": Case(contrib.schedule_free_adamw(0.1, weight_decay=0.1)),
    "schedule_free_sgd": Case(contrib.schedule_free_sgd(0.1, weight_decay=0.1)),
    "simplified_ademamix": Case(contrib.simplified_ademamix(0.1, weight_decay=0.1)),
    "sophia": Case(contrib.sophia(0.1, weight_decay=0.1, update_interval=2), of_hessian, compiled=True),
    "split_real_and_imaginary": Case(contrib.split_real_and_imaginary(optax.adam(0.1))),
}

CASES = {f"optax.{name}": case for name, case in OPTAX.items()} | {
    f"contrib.{name}": case for name, case in CONTRIB.items()
}

# Public functions that are no cases, and why.
EXCEPTIONS = {
    "optax.GradientTransformation": "the pair that all of them are",
    "optax.GradientTransformationExtraArgs": "the pair that all of them are",
    "optax.flatten": "joins the parameters into one array; see test_optimizers_that_join_the_parameters_are_refused",
    "optax.WrappedSchedule": "makes a schedule",
    "optax.matrix_inverse_pth_root": "computes a matrix",
    "optax.sigmoid_binary_cross_entropy": "computes a loss",
    "optax.update_infinity_moment": "computes moments",
    "optax.update_moment": "computes moments",
    "optax.update_moment_per_elem_norm": "computes moments",
    "contrib.schedule_free_eval_params": "computes parameters",
    "optax.inject_stateful_hyperparams": "deprecated: inject_hyperparams is the same",
    "optax.optimistic_adam": "deprecated: optimistic_adam_v2",
    "optax.lookahead": "takes two sets of parameters, and gradients of one; see test_trees.py",
}


def public_names() -> set[str]:
    """What makes gradient transformations, by its annotations, or has none that says otherwise."""
    return {
        f"{module.__name__.rpartition('.')[2]}.{name}"
        for module in (optax, contrib)
        for name, value in vars(module).items()
        if not name.startswith("_") and _makes_transformations(value)
    }


def _makes_transformations(value: Any) -> bool:
    if inspect.isclass(value):
        return hasattr(value, "init") and hasattr(value, "update")
    function = value.func if isinstance(value, functools.partial) else value
    if not inspect.isfunction(function):  # but a type
        return False
    returned = getattr(function, "__annotations__", {}).get("return", "GradientTransformation")
    return "GradientTransformation" in str(returned)
