"""`finllm schema`: every key of a recipe, as JSON schema for editors or as tables for people."""

import json
from collections.abc import Iterator
from typing import Any

from finllm.recipe import Recipe
from launch.endings import DONE

Json = dict[str, Any]
HEAD = """\
# Every key of a recipe

Written by `finllm schema --markdown`, from the types that recipes are read with. `finllm check my.yaml` names every
fault of a recipe; `finllm schema > recipe.schema.json` is the same for an editor.

A recipe must name a model and data; every other key has the default that stands here. Unknown and repeated keys are
refused. `extends` takes another file as the beginning: what stands in the recipe wins, key by key. On the command line
any key can be changed: `finllm launch my.yaml train.epochs=1 data.0.train_rows=500`.
"""
BOUNDS = {"minimum": "from {}", "exclusiveMinimum": "above {}", "maximum": "to {}", "exclusiveMaximum": "below {}"}
KINDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false", "null": "null"}
CHOICES = ("name", "method")
"""Keys whose value says which of several kinds a part is."""


def schema(*, as_markdown: bool) -> int:
    """Print the JSON schema of a recipe, or its keys in tables."""
    print(markdown() if as_markdown else json.dumps(json_schema(), indent=1))
    return DONE


def json_schema() -> Json:
    """The JSON schema of a recipe file, `extends` included."""
    described = Recipe.model_json_schema()
    needed = described.pop("required")
    for part in described["$defs"].values():
        part.pop("required", None)  # it may stand in a file that this one extends
    described["properties"]["extends"] = {
        "description": "Files that this one adds to and changes, relative to it.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    described |= {"if": {"not": {"required": ["extends"]}}, "then": {"required": needed}}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **described}


def markdown() -> str:
    """A section with a table for the recipe and for each of its parts."""
    whole = Recipe.model_json_schema()
    parts: Json = whole["$defs"]
    sections = dict(_sections("", whole, parts))
    titles = {name: title for title, name in sections.items() if name}
    bodies = [_section(title, parts[name] if name else whole, titles, parts) for title, name in sections.items()]
    return "\n".join([HEAD, *bodies]).rstrip("\n")


def _sections(place: str, part: Json, parts: Json) -> Iterator[tuple[str, str]]:
    """Title and definition of each section, from the outside in; the recipe itself has no definition."""
    if not place:
        yield "recipe", ""
    for key, described in part["properties"].items():
        names = list(dict.fromkeys(_references(described)))
        for name in names:
            title = f"{place}{key}" if len(names) == 1 else f"{place}{key}, {_kind(parts[name])}"
            yield title, name
            yield from _sections(f"{place}{key}.", parts[name], parts)


def _references(described: Any) -> Iterator[str]:
    if isinstance(described, list):
        for one in described:
            yield from _references(one)
    elif isinstance(described, dict):
        if "$ref" in described:
            yield described["$ref"].removeprefix("#/$defs/")
        for key, one in described.items():
            if key != "discriminator":  # it names the same parts again
                yield from _references(one)


def _kind(part: Json) -> str:
    """The value that chooses this part among its like."""
    return next(str(part["properties"][key]["const"]) for key in CHOICES if "const" in part["properties"].get(key, {}))


def _section(title: str, part: Json, titles: dict[str, str], parts: Json) -> str:
    rows = [
        (
            f"`{key}`",
            _type(described, titles),
            _default(key, described, part),
            _folded(_meaning(described, parts)),
        )
        for key, described in part["properties"].items()
    ]
    lines = [("key", "value", "default", "meaning"), ("---", "---", "---", "---"), *rows]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"## {title}\n\n{_folded(part.get('description', ''))}\n\n{table}\n"


def _meaning(described: Json, parts: Json) -> str:
    """What a key is for; of a part without words of its own, what the part is."""
    if "const" in described and "description" not in described:
        return "Chooses this kind."
    words = described.get("description") or parts.get(next(_references(described), ""), {}).get("description", "")
    return str(words)


def _type(described: Json, titles: dict[str, str]) -> str:
    """What may stand there, in words."""
    if "$ref" in described:
        title = titles[described["$ref"].removeprefix("#/$defs/")]
        anchor = title.lower().replace(" ", "-").replace(",", "").replace(".", "")  # as GitHub makes them
        return f"[{title.rpartition(', ')[2]}](#{anchor})"
    for several in ("anyOf", "oneOf"):
        if several in described:
            return _either(list(dict.fromkeys(_type(one, titles) for one in described[several])))
    if "const" in described:
        return f"`{described['const']}`"
    if "enum" in described:
        return ", ".join(f"`{value}`" for value in described["enum"])
    if described.get("type") == "array":
        return f"list of {_type(described['items'], titles)}" if "items" in described else "list"
    if "additionalProperties" in described:
        return f"mapping to {_type(described['additionalProperties'], titles)}"
    bounds = [words.format(described[key]) for key, words in BOUNDS.items() if key in described]
    return " ".join([KINDS[described["type"]], *bounds])


def _either(kinds: list[str]) -> str:
    """One of several; a list of what may also stand alone is said in short."""
    alone = " or ".join(kinds[:-1])
    if len(kinds) > 1 and kinds[-1] == f"list of {alone}":
        return f"{alone}; or a list of these"
    return " or ".join(kinds)


def _default(key: str, described: Json, part: Json) -> str:
    if "default" not in described:
        return "needed" if key in part.get("required", []) else ""
    value = described["default"]
    return "see there" if isinstance(value, dict) else f"`{json.dumps(value, ensure_ascii=False)}`"


def _folded(text: str) -> str:
    return " ".join(text.split())
