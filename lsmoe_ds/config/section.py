"""The base class of a recipe's sections."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # of a run, and of prepared data
Positive = Annotated[int, Field(ge=1, lt=2**31)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
KIND = "kind"  # the type of pydantic error for a value of another type than its field


def first_twice(values: Iterable[Hashable]) -> Any:
    """Return the first value that occurs more than once, or None."""
    return next((value for value, times in Counter(values).items() if times > 1), None)


class Section(BaseModel):
    """A mapping of a YAML file. Unknown keys are refused, and so is what pydantic would silently turn into a
    number or a truth value.
    """

    renamed: ClassVar[Mapping[str, str]] = {}  # keys of earlier versions, with their new names

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_coercion(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if value == "None" and isinstance(value, str) and type(None) in get_args(annotation):
            raise PydanticCustomError("none_text", "None is a text")
        if (inner := _find_coerced(annotation, value)) is not None:
            raise PydanticCustomError(KIND, "another kind of value", {"inner": inner})
        return value


def _find_coerced(annotation: Any, value: Any) -> tuple[Any, ...] | None:
    """Return the keys within ``value`` that lead to a value that pydantic would silently convert, or None.

    Such a value is ``yes`` or ``"1"`` for a number, or ``"no"`` or 0 for a boolean. ``1e-4``, which is text
    in YAML, is allowed for a float.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _find_coerced(arguments[0], value)
    if origin in (Union, types.UnionType):
        if any(_takes(member, value) for member in arguments):
            return None
        found = (_find_coerced(member, value) for member in arguments)
        return next((inner for inner in found if inner is not None), None)
    items: Iterable[tuple[Any, Any]] = ()
    if origin in (list, tuple) and isinstance(value, list | tuple):
        items = enumerate(value)
    elif origin is dict and isinstance(value, dict):
        items = value.items()
    for key, item in items:
        if (inner := _find_coerced(arguments[origin is dict], item)) is not None:
            return (key, *inner)
    if isinstance(value, bool):
        return () if annotation in (int, float) else None
    if annotation is bool:
        return () if isinstance(value, int | float | str) else None  # pydantic itself refuses the others
    is_digits = isinstance(value, str) and value.strip().lstrip("+-").isdecimal()
    return () if annotation is int and is_digits else None


def _takes(annotation: Any, value: Any) -> bool:
    """Tell whether ``annotation``, a member of a union, accepts a boolean or text without converting it."""
    if isinstance(value, bool):
        return annotation in (bool, Any)
    return annotation in (str, float, Path, Any) or get_origin(annotation) is Literal


def is_section(annotation: Any) -> type[Section] | None:
    """Return the section class that an annotation allows, perhaps among other types, or None."""
    if isinstance(annotation, type):
        return annotation if issubclass(annotation, Section) else None
    if get_origin(annotation) not in (Annotated, Union, types.UnionType):
        return None
    return next((found for argument in get_args(annotation) if (found := is_section(argument))), None)
