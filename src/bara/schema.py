"""Values held against their types, and one line for what does not fit."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from pydantic_core import PydanticSerializationError, to_json
from typing_extensions import TypedDict

from bara.errors import BaraError, first_line

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
"""No unknown names, no text for numbers, no numbers that JSON does not have."""
LONGEST_SHOWN = 80
"""Characters of a value that a message shows."""
MAX_DRAWS = 10_000
SEEDS = 2**32
"""NumPy, which `Trainer` seeds too, takes seeds from 0 to one below this."""

Seed = Annotated[int, Field(ge=0, lt=SEEDS)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]

WHAT = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "dataclass_type": "a mapping",
    "list_type": "a list",
    "tuple_type": "a list",
    "none_required": "null",
    "finite_number": "a finite number",
    "greater_than": "above {gt:.12g}",
    "greater_than_equal": "at least {ge:.12g}",
    "less_than": "below {lt:.12g}",
    "less_than_equal": "at most {le:.12g}",
    "string_too_short": "text that is not empty",
    "too_short": "a list of {min_length} or more",
    "literal_error": "{expected}",
    "enum": "{expected}",
}
"""What a value must be, by pydantic's type of the error."""


def mapping_of(types: Mapping[str, Any]) -> Any:
    """The schema of a mapping with any of these names, each with its type."""
    schema = TypedDict("schema", dict(types), total=False)  # type: ignore[misc]  # noqa: UP013
    return with_config(STRICT)(schema)


def field_types(*classes: type) -> dict[str, Any]:
    """Names and types of the fields of dataclasses."""
    types: dict[str, Any] = {}
    for cls in classes:
        hints = get_type_hints(cls, include_extras=True)
        types |= {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    return types


def check(schema: Any, value: Any, where: str, *, flags: Mapping[str, str] | None = None) -> None:
    """Refuses a value that does not fit a schema.

    Args:
        schema: of `mapping_of`.
        value: what JSON and YAML know; anything else a library may have made of them.
        where: begins the message, and the names of `flags`.
        flags: what the user typed for a name, such as `--epochs` for `training.num_train_epochs`.

    Raises:
        BaraError: it does not fit; the message names the field.
    """
    try:
        _adapter(schema).validate_json(to_json(value, inf_nan_mode="constants"))
    except ValidationError as error:
        name, problem = _problem(error, value)
        full = f"{where}.{name}" if name else where
        raise BaraError(f"{(flags or {}).get(full, full)} {problem}") from error
    except (PydanticSerializationError, ValueError, RecursionError) as error:
        raise BaraError(f"{where} cannot be written as JSON: {first_line(error)}") from error


def read_json(path: Path, schema: Any, mend: str) -> Any:
    """The value of a JSON file, of the type of its schema.

    Args:
        path: the file.
        schema: of `mapping_of`, or a dataclass with `__pydantic_config__ = STRICT`.
        mend: what to do about a file that does not fit.

    Raises:
        BaraError: the file is missing or does not fit; the message names the field.
    """
    try:
        return _adapter(schema).validate_json(path.read_bytes())
    except OSError as error:
        raise BaraError(f"cannot read {path} ({error.strerror}); {mend}") from error
    except ValidationError as error:
        name, problem = _problem(error)
        raise BaraError(f"{path}: {f'{name} ' if name else ''}{problem}; {mend}") from error


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        BaraError: it is none, names a field twice, is nested too deep, or has a number too long.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repetition)
    except json.JSONDecodeError as error:
        raise BaraError(f"not JSON ({error.msg})") from error
    except RecursionError as error:
        raise BaraError("not JSON that can be read (nested too deep)") from error
    except UnicodeDecodeError as error:
        raise BaraError("not UTF-8 text; convert it first") from error
    except ValueError as error:  # a repetition, or a number of thousands of digits
        reason = first_line(error).partition(";")[0]
        raise BaraError(f"not JSON that can be read ({reason})") from error


def json_text(value: Any, **options: Any) -> str:
    """JSON, with null for numbers that it does not have: NaN and infinity."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def refuse_unknown(names: Mapping[str, Any] | list[str], known: Any, where: str) -> None:
    """Raise `BaraError` for the first name that is not known, with the nearest that is."""
    for name in names:
        if name not in known:
            near = get_close_matches(str(name)[:LONGEST_SHOWN], known, n=1)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else f"known: {', '.join(sorted(known)) or 'none'}"
            )
            raise BaraError(f"{where}: there is no {shown(name)}; {hint}")


def shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a list in itself
        return "a value that is too long to show"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


@cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def _problem(error: ValidationError, given: Any = None) -> tuple[str, str]:
    """The first field that does not fit, and what is wrong with it."""
    errors = error.errors(include_url=False)
    first = errors[0]
    if not first["loc"]:
        what = WHAT.get(first["type"])
        return "", f"must be {what}" if what else f"is {first['msg']}".replace("Invalid", "invalid")
    name = first["loc"][0]
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return str(name), "is not a field that this version knows"
    if first["type"] == "missing":
        return str(name), "is missing"
    value = given[name] if isinstance(given, Mapping) and name in given else first["input"]
    wanted = []
    for other in errors:
        if other["loc"][:1] == first["loc"][:1]:
            what = WHAT.get(other["type"])
            context: Any = other.get("ctx", {})
            wanted.append(what.format(**context) if what else f"valid ({other['msg']})")
    return str(name), f"must be {' or '.join(sorted(set(wanted)))}, not {shown(value)}"


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{shown(twice)} is there twice")
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
