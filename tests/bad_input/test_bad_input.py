"""Whatever a public function is given, it says where it is given: the argument, what was got, what was expected."""

import traceback
from pathlib import Path

import pytest

import smartfrz_jax as sfj
from tests.bad_input import doors, learning, policies, predictors, table

AREAS = [doors, learning, policies, predictors]
DOORS = [door for area in AREAS for door in area.DOORS]
CASES = [case for door in DOORS for case in table.wrong_types(door)] + [case for area in AREAS for case in area.CASES]


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
