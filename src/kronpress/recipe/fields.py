"""Fields of a recipe before they are one: laid over one another, and what is wrong with them in one sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from kronpress.errors import RequestError, unknown_name

Fields = dict[str, Any]


def merge(below: Fields, above: Fields, place: str = "") -> Fields:
    """`below` with what `above` says in its stead, section by section; neither is changed.

    What is in a list is named by its number, from 0:

    >>> merge({"stages": [{"share": 1}]}, {"stages": {"0": {"targets": "mlp"}}})
    {'stages': [{'share': 1, 'targets': 'mlp'}]}

    Raises:
        RequestError: a list has nothing of such a number.
    """
    merged = dict(below)
    for key, value in above.items():
        inner, path = merged.get(key), f"{place}{key}"
        if isinstance(inner, list) and _is_numbered(value):
            if unknown := [number for number in value if int(number) >= len(inner)]:
                there = f"{key} are numbered from 0 to {len(inner) - 1}" if inner else f"the recipe has no {key}"
                raise RequestError(f"recipe field {path}.{unknown[0]}: {there}")
            numbered = {str(number): item for number, item in enumerate(inner)}
            merged[key] = list(merge(numbered, value, f"{path}.").values())
        elif isinstance(inner, dict) and isinstance(value, dict):
            merged[key] = merge(inner, value, f"{path}.")
        else:
            merged[key] = value
    return merged


def _is_numbered(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(key, str) and key.isdecimal() for key in value)


def leaves(fields: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The path of every value that is no section.

    >>> list(leaves({"seed": 1, "budget": {"params": 5}}))
    [('seed',), ('budget', 'params')]
    """
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            yield from ((name, *path) for path in leaves(value))
        else:
            yield (name,)


def checked_values(section: str, kind: str, given: Any, allowed: Mapping[str, FieldInfo]) -> Fields:
    """The named values as JSON has them, each checked as the structure itself would."""
    if not isinstance(given, dict):
        raise RequestError(f"recipe field {section}: expected {kind} by name; given {given!r}")
    checked = {}
    for name, value in given.items():
        if not allowed:
            raise RequestError(f"recipe field {section}.{name}: there is no {kind}")
        if name not in allowed:
            raise unknown_name(kind, str(name), allowed)
        field = allowed[name]
        adapter: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]
        try:
            checked[name] = adapter.dump_python(adapter.validate_python(value), mode="json")
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise RequestError(f"recipe field {section}.{name}: {reason}; given {value!r}") from error
    return checked


def explain(error: ValidationError, recipe: type[BaseModel]) -> RequestError:
    """One sentence for the first thing that is wrong with a recipe."""
    first = error.errors()[0]
    path = _field_path(first["loc"], recipe)
    if first["type"] == "extra_forbidden":
        section: Any = recipe
        for part in first["loc"][:-1]:
            section = section.model_fields[part].annotation
        return unknown_name("recipe field", path, _paths(section, first["loc"][:-1]))
    where = f"recipe field {path}" if path else "recipe"
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RequestError):
        return cause
    if isinstance(cause, ValueError):
        return RequestError(f"{where}: {cause}")
    return RequestError(f"{where}: {first['msg']}; given {first['input']!r}"[:600])


def _field_path(location: tuple[int | str, ...], recipe: type[BaseModel]) -> str:
    """The dotted name of a field; pydantic also names the alternatives of a union."""
    section: Any = recipe
    names = []
    for part in location:
        names.append(str(part))
        field = section.model_fields.get(part)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            break
        section = field.annotation
    return ".".join(names)


def _paths(section: type[BaseModel], prefix: tuple[Any, ...]) -> list[str]:
    return [".".join([*map(str, prefix), name]) for name in section.model_fields]
