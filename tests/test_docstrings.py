"""The examples in docstrings run, and give what they say."""

import doctest
import importlib
import pkgutil

import pytest

import models
import smartfrz_jax
import train.data

MODULES = sorted(
    module.name
    for package in (smartfrz_jax, models, train.data)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
)


@pytest.mark.usefixtures("jax_defaults")
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.slow
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_public_names_have_docstrings():
    missing = [
        name
        for name in dir(smartfrz_jax)
        if not name.startswith("_") and not (getattr(smartfrz_jax, name).__doc__ or "").strip()
    ]
    assert not missing
