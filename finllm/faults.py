"""Faults of a document in words: place, key, what was found, what is allowed, the nearest known key."""

import difflib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

Key = tuple[str | int, ...]
OURS = "Value error, "
"""How pydantic begins what a validator of ours has said."""
WORDS = (
    ("Input should be a valid dictionary or instance of ", "it must be a mapping of keys: "),
    ("Input should be a valid tuple", "it must be a list"),
    ("Input should be a valid ", "it must be a "),
    ("Input should be ", "it must be "),
    ("a integer", "an integer"),
    (", unable to parse string as a number", ""),
    (", unable to parse string as an integer", ""),
)
"""Pydantic speaks to those who write models; these are for those who write the file."""


def described(
    model: type[BaseModel], values: Any, errors: Iterable[ErrorDetails], place: Callable[[Key], str]
) -> list[str]:
    """One line for each key that is wrong; `place` gives `file:line` of a key."""
    located = [(*_locate(model, values, error), error) for error in errors]
    keys = list(dict.fromkeys(key for _, key, _ in located))
    lines = []
    for key in keys:
        here = [(spec, error) for spec, other, error in located if other == key]
        below = any(len(other) > len(key) and other[: len(key)] == key for other in keys)
        if below and all(error["type"] == "too_short" for _, error in here):
            continue  # pydantic counts only the items that are right
        lines.append(f"{place(_subject(key, here[0][1]))}: {_fault(key, here)}")
    return lines


def _subject(key: Key, error: ErrorDetails) -> Key:
    """The key that is to be changed: our own faults begin with it, counted from the spec that found them."""
    if error["type"] != "value_error":
        return key
    return (*key, *error["msg"].removeprefix(OURS).split(maxsplit=1)[0].split("."))


def dotted(key: Iterable[str | int]) -> str:
    """The key as it is written on the command line."""
    return ".".join(str(part) for part in key)


def _fault(key: Key, here: Sequence[tuple[type[BaseModel], ErrorDetails]]) -> str:
    spec, error = here[0]
    kind, name, context = error["type"], dotted(key), error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{name} is not a known key; {_instead(spec, str(key[-1]))}"
    if kind == "missing":
        return f"{name} is missing; {_hint(spec, str(key[-1]))}"
    if kind == "value_error":
        return f"{name + ': ' if name else ''}{error['msg'].removeprefix(OURS)}"
    if kind == "union_tag_invalid":
        known = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
        kind_key = context["discriminator"].strip("'")
        near = difflib.get_close_matches(str(context["tag"]), known, n=1)
        meant = f"did you mean {near[0]}? It" if near else "it"
        return f"{name}.{kind_key} is {context['tag']!r}; {meant} must be one of {', '.join(known)}"
    if kind == "union_tag_not_found":
        return f"{name}.{context['discriminator'].strip(chr(39))} is missing; it says which kind this is"
    allowed = list(dict.fromkeys(_allowed(error) for _, error in here))
    return f"{name} is {_shown(error['input'])}; {', or '.join(allowed)}"


def _allowed(error: ErrorDetails) -> str:
    if error["type"] == "too_short":
        return f"it needs at least {error['ctx']['min_length']} item(s)"
    text = error["msg"]
    for theirs, ours in WORDS:
        text = text.replace(theirs, ours)
    return text


def _shown(found: Any) -> str:
    if found is None:
        return "null"
    if isinstance(found, Mapping) and found:
        return "a mapping"
    if isinstance(found, list | tuple) and found:
        return "a list"
    return repr(found)


def _instead(spec: type[BaseModel], word: str) -> str:
    """What may have been meant by a key that `spec` does not know."""
    first, _, rest = word.partition(".")
    if rest and first in spec.model_fields:
        return (
            f"in a file, write {rest.rpartition('.')[2]} below {word.rpartition('.')[0]}: dots are for the command line"
        )
    known = sorted(spec.model_fields)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"


def _hint(spec: type[BaseModel], name: str) -> str:
    field = spec.model_fields.get(name)
    if field is not None and field.description:
        return field.description.split("\n")[0]
    choices = get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()
    return f"write {name}: {' or '.join(map(str, choices))}" if choices else "write it"


def _locate(model: type[BaseModel], values: Any, error: ErrorDetails) -> tuple[type[BaseModel], Key]:
    """The spec that an error falls in, and its place in the file: pydantic's location without the names of unions."""
    key: list[str | int] = []
    spec, options = model, [model]
    for step, part in enumerate(error["loc"]):
        fields = {name: info.annotation for option in options for name, info in option.model_fields.items()}
        here = isinstance(values, dict) and part in values
        item = isinstance(values, list) and isinstance(part, int)
        absent = error["type"] == "missing" and step == len(error["loc"]) - 1
        tagged = [option for option in options if _tag(option) == part or option.__name__ == part]
        if tagged and not (here and part in fields):
            spec, options = tagged[0], tagged
            continue
        if not (here or item or absent):
            continue  # a union's branch or a validator's name, not a key of the file
        if len(options) == 1:
            spec = options[0]
        key.append(part)
        values = values[part] if here or (item and int(part) < len(values)) else None
        if not item:
            options = list(_specs(fields.get(str(part)))) or options
    return spec, tuple(key)


def _tag(option: type[BaseModel]) -> str | None:
    """The literal value that picks this option in a union (`name: fiqa`, `method: sft`)."""
    for info in option.model_fields.values():
        choices = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
        if len(choices) == 1:
            return str(choices[0])
    return None


def _specs(annotation: Any) -> Iterable[type[BaseModel]]:
    """Every spec inside a type: through unions, lists and annotations."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType, list, tuple, Annotated, dict):
        for argument in get_args(annotation):
            yield from _specs(argument)
