"""Docstrings have roles and formulas as Sphinx does; here they become code and MathML."""

from __future__ import annotations

import re
from typing import Any

import griffe
from latex2mathml.converter import convert

_FORMULA = re.compile(r"^ *\.\. math:: (.*(?:\n.*\S)*)", flags=re.M)  # up to an empty line
_INLINE = re.compile(r":math:`([^`]*)`")
_ROLE = re.compile(r":(?:func|meth|class|mod|attr|data|exc):`~?([^`]*)`")
_EXAMPLE = re.compile(r"^( *)Example:$", flags=re.M)


class Roles(griffe.Extension):
    """Rewrites the text of every docstring."""

    def on_object(self, *, obj: griffe.Object, **rest: Any) -> None:
        """Called with every object that is read."""
        if obj.docstring is None:
            return
        text = _FORMULA.sub(lambda found: convert(found[1], display="block"), obj.docstring.value)
        text = _INLINE.sub(lambda found: convert(found[1]), text)
        text = _ROLE.sub(r"`\1`", text)
        obj.docstring.value = _EXAMPLE.sub(r"\1Examples:", text)  # the name that is read as code
