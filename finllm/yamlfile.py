"""Strict YAML 1.2: where every value came from, `extends`, `key=value` overrides, all faults at once.

Used for recipes and for cluster profiles alike, so that both are refused in the same words.
"""

import difflib
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML, MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from finllm.errors import RecipeError

Key = tuple[str | int, ...]
S = TypeVar("S", bound="Spec")


class Spec(BaseModel):
    """A part of a file people write: unknown keys are refused, and nothing changes after reading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )


@dataclass
class Document:
    """Plain values of one file (and of what it extends), and where each of them stands."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, str] = field(default_factory=dict)
    """`file:line` of each key and list item."""
    faults: list[str] = field(default_factory=list)

    def place(self, key: Key) -> str:
        """`file:line` of a key, or of the nearest enclosing one."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, self.name)


def read(path: Path, overrides: Sequence[str] = ()) -> Document:
    """The document at `path` with everything it extends, changed by `key=value` overrides.

    Raises RecipeError where a file is missing or is not YAML; other faults wait in the document for `parse`.
    """
    document = _read_with_bases(path, ())
    for override in overrides:
        _override(document, override)
    return document


def parse(model: type[S], document: Document) -> S:
    """The document as `model`; raises one RecipeError that lists every fault with its place."""
    faults = list(document.faults)
    try:
        value = model.model_validate(document.values)
    except ValidationError as error:
        faults += [_fault(model, document, dict(e)) for e in error.errors(include_url=False)]
    else:
        if not faults:
            return value
    noun = "fault" if len(faults) == 1 else "faults"
    raise RecipeError("\n".join([f"{document.name}: {len(faults)} {noun}", *(f"  {fault}" for fault in faults)]))


def _read_with_bases(path: Path, chain: tuple[Path, ...]) -> Document:
    path = path.resolve() if chain else path
    if path.resolve() in chain:
        raise RecipeError(f"{path}: extends itself, by way of {' -> '.join(p.name for p in chain)}; break the circle")
    own = _read_one(path)
    bases = own.values.pop("extends", None)
    if bases is None:
        return own
    place = own.places.pop(("extends",))
    document = Document(own.name)
    for base in [bases] if isinstance(bases, str) else bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str):
            raise RecipeError(f"{place}: extends is {base!r}; write a path, or a list of paths, relative to this file")
        target = path.parent / base
        if not target.is_file():
            raise RecipeError(f"{place}: extends {base}, but there is no file {target}")
        _merge(document, _read_with_bases(target, (*chain, path.resolve())))
    _merge(document, own)
    return document


def _read_one(path: Path) -> Document:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error}); give the path of a YAML file in UTF-8") from error
    document = Document(str(path))
    try:
        root = _yaml().compose(text)
    except YAMLError as error:
        raise RecipeError(f"{path}: is not YAML: {_yaml_problem(error)}") from error
    if not isinstance(root, MappingNode):
        raise RecipeError(f"{path}: holds no keys; a recipe is a YAML mapping such as `model: smollm2-135m`")
    document.values = _value(root, (), document)
    return document


def _yaml() -> YAML:
    return YAML(typ="safe", pure=True)  # the pure reader resolves scalars by YAML 1.2: 2e-4 is a number, no is a word


def _yaml_problem(error: YAMLError) -> str:
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return str(error)


def _value(node: Any, key: Key, document: Document) -> Any:
    """The node as plain values; notes the place of each, and each repeated key as a fault."""
    document.places.setdefault(key, f"{document.name}:{node.start_mark.line + 1}")
    if isinstance(node, SequenceNode):
        return [_value(item, (*key, i), document) for i, item in enumerate(node.value)]
    if not isinstance(node, MappingNode):
        return _scalar(node)
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        name = str(_scalar(key_node))
        place = f"{document.name}:{key_node.start_mark.line + 1}"
        inner = (*key, name)
        if name in values:
            document.faults.append(f"{place}: {_dotted(inner)} is given twice, first at {document.places[inner]}")
            continue
        document.places[inner] = place
        values[name] = _value(value_node, inner, document)
    return values


def _scalar(node: ScalarNode) -> Any:
    yaml = _yaml()
    return yaml.constructor.construct_object(node, deep=True)


def _merge(document: Document, other: Document) -> None:
    """Lay `other` over `document`: mappings key by key, everything else replaced whole."""
    document.faults += other.faults
    _merge_values(document, document.values, other, other.values, ())


def _merge_values(document: Document, old: dict[str, Any], other: Document, new: dict[str, Any], key: Key) -> None:
    for name, value in new.items():
        inner = (*key, name)
        if isinstance(value, dict) and isinstance(old.get(name), dict):
            document.places[inner] = other.places[inner]
            _merge_values(document, old[name], other, value, inner)
            continue
        for stale in [place for place in document.places if place[: len(inner)] == inner]:
            del document.places[stale]
        old[name] = value
        document.places.update({k: p for k, p in other.places.items() if k[: len(inner)] == inner})


def _override(document: Document, text: str) -> None:
    """Set one value from `dotted.key=value`, the value read as YAML."""
    dotted, equals, value_text = text.partition("=")
    parts: list[str | int] = [int(p) if p.isdigit() else p for p in dotted.strip().split(".")]
    if not equals or "" in parts:
        raise RecipeError(f"{text!r} is no override; write key=value, such as train.epochs=1")
    try:
        node = _yaml().compose(value_text)
    except YAMLError as error:
        raise RecipeError(f"{text!r}: the value is not YAML: {_yaml_problem(error)}") from error
    source = Document("command line")
    value = None if node is None else _value(node, (), source)
    document.faults += [f"{fault} in {text!r}" for fault in source.faults]
    holder: Any = document.values
    for part in parts[:-1]:
        if isinstance(holder, list) and isinstance(part, int) and part < len(holder):
            holder = holder[part]
        elif isinstance(holder, dict):
            if not isinstance(holder.get(str(part)), dict | list):
                holder[str(part)] = {}
            holder = holder[str(part)]
        else:
            raise RecipeError(f"{text!r}: there is no {dotted} to set; the list has {len(holder)} item(s), from 0")
    last = parts[-1]
    if isinstance(holder, list):
        if not isinstance(last, int) or last >= len(holder):
            raise RecipeError(f"{text!r}: there is no {dotted} to set; the list has {len(holder)} item(s), from 0")
        holder[last] = value
    else:
        last = str(last)
        holder[last] = value
    path = (*(str(p) if isinstance(p, str) else p for p in parts[:-1]), last)
    for stale in [place for place in document.places if place[: len(path)] == path]:
        del document.places[stale]
    document.places[path] = f"command line ({text})"


def _fault(model: type[BaseModel], document: Document, error: dict[str, Any]) -> str:
    """One fault in words: place, key, what was found, what is allowed, the nearest known key."""
    spec, key = _locate(model, document.values, error["loc"])
    place, dotted = document.place(key), _dotted(key)
    if error["type"] == "extra_forbidden":
        known = sorted(_names(spec))
        near = difflib.get_close_matches(str(key[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"{place}: {dotted} is not a known key; {hint}"
    if error["type"] == "missing":
        return f"{place}: {dotted} is missing; {_hint(spec, key)}"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{place}: {dotted + ': ' if dotted else ''}{message}"
    found = error["input"]
    shown = "null" if found is None else repr(found) if not isinstance(found, dict | list) else type(found).__name__
    return f"{place}: {dotted} is {shown}; {message[0].lower()}{message[1:]}"


def _hint(spec: type[BaseModel], key: Key) -> str:
    info = spec.model_fields.get(str(key[-1]))
    return (info.description or "").split("\n")[0] if info and info.description else "write it"


def _dotted(key: Iterable[str | int]) -> str:
    return ".".join(str(part) for part in key)


def _names(spec: type[BaseModel]) -> set[str]:
    return set(spec.model_fields)


def _locate(model: type[BaseModel], values: Any, loc: Sequence[str | int]) -> tuple[type[BaseModel], Key]:
    """The spec that a pydantic location falls in, and the location without union tags."""
    key: list[str | int] = []
    spec, options = model, [model]
    for step, part in enumerate(loc):
        fields = {name: info.annotation for option in options for name, info in option.model_fields.items()}
        here = isinstance(values, dict) and part in values
        item = isinstance(values, list) and isinstance(part, int)
        tagged = [o for o in options if _tag(o) == part or o.__name__ == part]
        if tagged and not (here and part in fields):
            spec, options = tagged[0], tagged
            continue
        if not (here or item or part in fields or step == len(loc) - 1):
            continue  # a union branch or a validator's name, not a key of the file
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
        if get_origin(info.annotation) is not None and str(get_origin(info.annotation)).endswith("Literal"):
            choices = get_args(info.annotation)
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
