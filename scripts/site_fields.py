"""Fields of the configurations in the API reference, whose help is in `metadata`."""

from __future__ import annotations

from dataclasses import is_dataclass
from pydoc import locate
from typing import Any

import griffe


class FieldHelp(griffe.Extension):
    """Takes a dataclass field's text and default out of `field(default=..., metadata=...)`."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        if not (str(attr.value).startswith("field(") and "metadata" in str(attr.value)):
            return
        assert attr.parent is not None
        owner = locate(attr.parent.path)
        assert is_dataclass(owner)
        field = owner.__dataclass_fields__[attr.name]
        attr.value = repr(field.default)
        attr.docstring = griffe.Docstring(field.metadata["help"], parent=attr)
