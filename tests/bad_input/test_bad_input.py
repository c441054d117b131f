"""Whatever a public function is given, it says where it is given: the argument, what was got, what was expected."""

import traceback
from pathlib import Path

import pytest

import smartfrz_jax as sfj
from tests.bad_input import costs, doors, learning, policies, predictors, table

AREAS = [costs, doors, learning, policies, predictors]
DOORS = [door for area in AREAS for door in area.DOORS]
CASES = [case for door in DOORS for case in table.wrong_types(door)] + [case for area in AREAS for case in area.CASES]
# Made by the library alone, or without arguments of their own that could be wrong.
RESULTS = {
    "Account", "BreakEven", "Evaluation", "Finding", "Fit", "FreezeEvent", "Harm", "Layer", "Measured", "Observation",
    "Parts", "Policy", "Program", "ProgramCost", "Rehearsal", "SavingWarning", "StepFlops", "never",
}  # fmt: skip
# Tested where they are, with some of their arguments alone; whoever adds them here takes the name out.
MISSING = {
    "ActivationCache", "PrefixCache", "SavingCheck", "TrainStep", "break_even", "check_saving", "jaxpr_of",
    "keep_programs", "linen.hold", "nnx.CachedStep", "nnx.PrefixCache", "nnx.gradient_probe",
    "program_cost",
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


def test_the_table_is_large_and_every_row_has_a_name_of_its_own():
    names = [case.name for case in CASES]
    assert len(names) > 250
    assert len(set(names)) == len(names)


def test_every_public_function_is_in_the_table():
    """Results, which only the library makes, are not; what is listed as missing has yet to be added."""
    there = {door.name.removesuffix(".__call__").partition(".create")[0] for door in DOORS}
    public = {
        prefix + name
        for prefix, module in (("", sfj), ("nnx.", sfj.nnx), ("linen.", sfj.linen))
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_")
    }
    assert {name for name in public if not any(of == name or of.startswith(f"{name}.") for of in there)} == (
        RESULTS | MISSING
    )
