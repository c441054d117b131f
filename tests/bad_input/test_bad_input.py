"""Whatever a public function is given, it says where it is given: the argument, what was got, what was expected."""

import traceback
from pathlib import Path

import pytest

import smartfrz_jax as sfj
from tests.bad_input import caching, callbacks, costs, doors, learning, nnx_doors, policies, predictors, programs, table

SUBMODULES = ("nnx", "linen", "policies", "cost", "caching", "callbacks", "predictor", "learning")
MODULES = {"": sfj} | {f"{name}.": getattr(sfj, name) for name in SUBMODULES}
AREAS = [caching, callbacks, costs, doors, learning, nnx_doors, policies, predictors, programs]
DOORS = [door for area in AREAS for door in area.DOORS]
CASES = [case for door in DOORS for case in table.wrong_types(door)] + [case for area in AREAS for case in area.CASES]
SLOW = {
    "Predictor", "Predictor.__call__", "Predictor.restore", "learning.encode_examples", "learning.fit",
    "learning.predict", "predictor.freeze_probability",
}  # fmt: skip
# They need packages that may not be here.
ABROAD = {"callbacks.TensorBoard", "callbacks.WandB"}
# Made by the library alone, abstract, or without arguments of their own that could be wrong.
RESULTS = {
    "Account", "FreezeEvent", "Layer", "Policy", "Program", "SavingWarning", "caching.BreakEven", "callbacks.Callback",
    "callbacks.Writer",
    "cost.Finding", "cost.Measured", "cost.Parts", "cost.ProgramCost", "cost.StepFlops", "learning.Evaluation",
    "learning.Fit", "policies.Harm", "policies.Rehearsal", "policies.never", "predictor.Observation",
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_error_names_the_argument(case, jax_defaults):
    with pytest.raises(case.error) as raised:
        case.call()
    message = str(raised.value)
    assert table.says(message, case.argument), message
    for words in ("expected" if not case.words else "", *case.words):
        assert words in message
    last = traceback.extract_tb(raised.value.__traceback__)[-1].filename
    assert Path(last).is_relative_to(Path(sfj.__file__).parent), f"raised in {last}"


@pytest.mark.parametrize(
    "door",
    [
        pytest.param(door, marks=pytest.mark.slow if door.name in SLOW else (), id=door.name)
        for door in DOORS
        if door.name not in ABROAD
    ],
)
def test_good_arguments_are_taken(door, jax_defaults):
    """So that each error is of the one argument that was changed."""
    door.call()


def test_the_table_is_large_and_every_row_has_a_name_of_its_own():
    names = [case.name for case in CASES]
    assert len(names) > 250
    assert len(set(names)) == len(names)


def test_every_public_function_is_in_the_table():
    """Results, which only the library makes, are not."""
    there = {door.name.removesuffix(".__call__").partition(".create")[0] for door in DOORS}
    public: dict[int, str] = {}
    for prefix, module in MODULES.items():
        for name, value in vars(module).items():
            if callable(value) and not name.startswith("_"):
                public.setdefault(id(value), prefix + name)
    assert {name for name in public.values() if not any(of == name or of.startswith(f"{name}.") for of in there)} == (
        RESULTS
    )
