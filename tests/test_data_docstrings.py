"""The examples in the docstrings of the data modules run, and give what they say."""

import doctest
import importlib
import pkgutil

import pytest

import train.data

MODULES = sorted(module.name for module in pkgutil.iter_modules(train.data.__path__, "train.data."))


@pytest.mark.parametrize("name", ["train.data", *MODULES])
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
