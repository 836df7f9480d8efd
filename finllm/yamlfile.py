"""Strict YAML 1.2: where every value came from, `extends`, `key=value` overrides, all faults at once.

Used for recipes and for cluster profiles alike, so that both are refused in the same words.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML, MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from finllm import faults
from finllm.errors import RecipeError
from finllm.faults import Key, dotted

S = TypeVar("S", bound="Spec")


class Spec(BaseModel):
    """A part of a file people write: unknown keys are refused, and nothing changes after reading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )


def named(value: Any) -> Any:
    """`smollm2-135m` is short for `{name: smollm2-135m}`."""
    return {"name": value} if isinstance(value, str) else value


def listed(value: Any) -> Any:
    """One data set is short for a list of one; a name is short for its defaults."""
    return [named(item) for item in (value if isinstance(value, list) else [value])]


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
    for text in overrides:
        override(document, text)
    return document


def parse(model: type[S], document: Document) -> S:
    """The document as `model`; raises one RecipeError that lists every fault with its place."""
    found = list(document.faults)
    try:
        value = model.model_validate(document.values)
    except ValidationError as error:
        found += faults.described(model, document.values, error.errors(include_url=False), document.place)
    else:
        if not found:
            return value
    noun = "fault" if len(found) == 1 else "faults"
    raise RecipeError("\n".join([f"{document.name}: {len(found)} {noun}", *(f"  {fault}" for fault in found)]))


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
        if not isinstance(root, MappingNode):
            raise RecipeError(f"{path}: holds no keys; write a YAML mapping such as `model: smollm2-135m`")
        document.values = _value(root, (), document)
    except YAMLError as error:
        raise RecipeError(f"{path}{_line(error)}: is not YAML: {_yaml_problem(error)}") from error
    except RecursionError as error:
        raise RecipeError(f"{path}: an anchor stands inside itself; write the values out") from error
    return document


def _yaml() -> YAML:
    return YAML(typ="safe", pure=True)  # the pure reader resolves scalars by YAML 1.2: 2e-4 is a number, no is a word


def _line(error: YAMLError) -> str:
    """`:line`, where it is known."""
    mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
    return "" if mark is None else f":{mark.line + 1}"


def _yaml_problem(error: YAMLError) -> str:
    problem = str(error.problem if isinstance(error, MarkedYAMLError) and error.problem is not None else error)
    return f"{problem}; YAML 1.2 has no merge keys, use `extends`" if "2002:merge" in problem else problem


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
            document.faults.append(f"{place}: {dotted(inner)} is given twice, first at {document.places[inner]}")
            continue
        document.places[inner] = place
        values[name] = _value(value_node, inner, document)
    return values


def _scalar(node: ScalarNode) -> Any:
    try:
        return _yaml().constructor.construct_object(node, deep=True)
    except ValueError as error:  # `!!float x`
        raise MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from error


def _merge(document: Document, other: Document) -> None:
    """Lay `other` over `document`: mappings key by key, everything else replaced whole."""
    document.faults += other.faults
    _merge_values(document, document.values, other, other.values, ())


def _merge_values(document: Document, old: dict[str, Any], other: Document, new: dict[str, Any], key: Key) -> None:
    for name, value in new.items():
        inner = (*key, name)
        if isinstance(value, dict) and isinstance(old.get(name), str):
            old[name] = _opened(old[name])
        if isinstance(value, dict) and isinstance(old.get(name), dict):
            document.places[inner] = other.places[inner]
            _merge_values(document, old[name], other, value, inner)
            continue
        for stale in [place for place in document.places if place[: len(inner)] == inner]:
            del document.places[stale]
        old[name] = value
        document.places.update({k: p for k, p in other.places.items() if k[: len(inner)] == inner})


def override(document: Document, text: str) -> None:
    """Set one value from `dotted.key=value`, the value read as YAML."""
    name, equals, value_text = text.partition("=")
    parts: list[str | int] = [int(part) if part.isdigit() else part for part in name.strip().split(".")]
    if not equals or "" in parts:
        raise RecipeError(f"{text!r} is no override; write key=value, such as train.epochs=1")
    source = Document("command line")
    try:
        node = _yaml().compose(value_text)
        value = None if node is None else _value(node, (), source)
    except YAMLError as error:
        raise RecipeError(f"{text!r}: the value is not YAML: {_yaml_problem(error)}") from error
    document.faults += [f"{fault} in {text!r}" for fault in source.faults]
    holder: Any = document.values
    key: Key = ()
    for part, after in zip(parts, [*parts[1:], None], strict=True):
        at = _index(holder, part, text)
        key = (*key, at)
        old = holder.get(at) if isinstance(holder, dict) else holder[at]
        new = value if after is None else _opened(old, after)
        if new is not old:
            for stale in [place for place in document.places if place[: len(key)] == key]:
                del document.places[stale]
            document.places[key] = f"command line ({text})"
        holder[at] = new
        holder = new


def _index(holder: Any, part: str | int, text: str) -> str | int:
    """The part as a key of the mapping, or as an index of the list, that it is looked for in."""
    if not isinstance(holder, list):
        return str(part)
    if isinstance(part, str) or part >= len(holder):
        raise RecipeError(f"{text!r}: there is no item {part} to set; the list has {len(holder)} item(s), from 0")
    return part


def _opened(old: Any, after: str | int = "") -> Any:
    """A value as something that `after` can be set in: `smollm2-135m` is short for `{name: smollm2-135m}`."""
    if isinstance(old, list):
        return old
    if isinstance(after, int) and old is not None:
        return [old]  # one data set is short for a list of one
    if isinstance(old, dict):
        return old
    return {"name": old} if isinstance(old, str) else {}
