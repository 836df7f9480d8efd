"""Strict YAML: where values come from, what is refused, and in which words."""

from pathlib import Path
from typing import Literal

import pytest

from finllm.errors import RecipeError
from finllm.yamlfile import Spec, parse, read


class Engine(Spec):
    """A part with a name, for which the name alone is short."""

    name: str
    power: float = 1.0
    """In kilowatts."""
    fuels: tuple[Literal["gas", "wood"], ...] = ("gas",)


class Car(Spec):
    """A document."""

    engine: Engine
    seats: int | Literal["auto"] = "auto"
    plate: str | None = None


def car(folder: Path, text: str, *overrides: str, **others: str) -> Car:
    """The car in `text`; `others` are files beside it."""
    for name, content in others.items():
        (folder / f"{name}.yaml").write_text(content)
    (folder / "car.yaml").write_text(text)
    return parse(Car, read(folder / "car.yaml", overrides))


def faults(folder: Path, text: str, *overrides: str, **others: str) -> str:
    """What is said of a wrong car, with the folder left out."""
    with pytest.raises(RecipeError) as caught:
        car(folder, text, *overrides, **others)
    return str(caught.value).replace(f"{folder}/", "")


@pytest.mark.parametrize(
    ("written", "read_as"), [("2e-4", 2e-4), ("1E3", 1000.0), ("3", 3.0), (".5", 0.5), ("+1.5", 1.5)]
)
def test_numbers_are_numbers(tmp_path: Path, written: str, read_as: float) -> None:
    """PyYAML reads 2e-4 as a string."""
    assert car(tmp_path, f"engine: {{name: a, power: {written}}}").engine.power == read_as


@pytest.mark.parametrize("word", ["no", "off", "yes", "on", "y", "NO", "1:30", "012x"])
def test_words_are_words(tmp_path: Path, word: str) -> None:
    """PyYAML reads no as false, and 1:30 as 90."""
    assert car(tmp_path, f"engine: {{name: a}}\nplate: {word}").plate == word


def test_every_fault_is_named_at_once_with_its_line(tmp_path: Path) -> None:
    """Where, what was found, what is allowed, and the nearest known key."""
    text = "engine:\n  name: a\n  powr: 3\n  fuels: [gas, coal]\nseats: many\nwheels: 4\n"
    assert faults(tmp_path, text).splitlines() == [
        "car.yaml: 4 faults",
        "  car.yaml:4: engine.fuels.1 is 'coal'; it must be 'gas' or 'wood'",
        "  car.yaml:3: engine.powr is not a known key; did you mean power?",
        "  car.yaml:5: seats is 'many'; it must be an integer, or it must be 'auto'",
        "  car.yaml:6: wheels is not a known key; known here: engine, plate, seats",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("engine: {name: a}\nseats: 1\nseats: 2", "car.yaml:3: seats is given twice, first at car.yaml:2"),
        ("engine:\n  name: a\n  name: b", "car.yaml:3: engine.name is given twice, first at car.yaml:2"),
        ("engine: {name: a, fuels: [{x: 1, x: 2}]}", "car.yaml:1: engine.fuels.0.x is given twice"),
    ],
    ids=["at the top", "nested", "in a list"],
)
def test_a_repeated_key_is_refused(tmp_path: Path, text: str, said: str) -> None:
    """PyYAML silently takes the second."""
    assert said in faults(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no keys"),
        ("- a", "holds no keys"),
        ("engine: [a", "car.yaml:1: is not YAML: expected ',' or ']'"),
        ("engine: {name: a}\n---\nseats: 1", "car.yaml:2: is not YAML: but found another document"),
        ("engine: !!python/name:os.system a", "car.yaml:1: is not YAML: could not determine a constructor"),
        ("engine: {<<: {name: a}}", "YAML 1.2 has no merge keys, use `extends`"),
        ("engine: {name: null}", "engine.name is null; it must be a string"),
        ("engine: {name: a, power: .inf}", "engine.power is inf; it must be a finite number"),
        ("engine: {name: &x [*x]}", "an anchor stands inside itself"),
        ("engine: 3", "engine is 3; it must be a mapping of keys"),
        ("seats: 1", "engine is missing"),
        ("engine: {}", "engine.name is missing; write it"),
    ],
    ids=lambda text: text[:25].replace("\n", " ") or "empty",
)
def test_what_is_no_document_is_refused(tmp_path: Path, text: str, said: str) -> None:
    """Never with a traceback of the parser."""
    assert said in faults(tmp_path, text)


def test_files_that_are_not_there_or_not_text_are_refused(tmp_path: Path) -> None:
    """With the path, and what it should be."""
    with pytest.raises(RecipeError, match=r"none.yaml: cannot be read .* YAML file in UTF-8"):
        read(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("plate: Zürich".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin.yaml: cannot be read"):
        read(tmp_path / "latin.yaml")


def test_a_file_extends_others_key_by_key(tmp_path: Path) -> None:
    """The nearer file wins, mappings are laid over each other, lists are replaced whole."""
    base = "engine: {name: a, power: 1, fuels: [gas, wood]}\nseats: 2\n"
    middle = "extends: base.yaml\nengine: {power: 2}\n"
    found = car(tmp_path, "extends: middle.yaml\nengine: {fuels: [wood]}\n", base=base, middle=middle)
    assert found == Car(engine=Engine(name="a", power=2, fuels=("wood",)), seats=2)


def test_a_file_extends_several_the_later_wins(tmp_path: Path) -> None:
    """And one may stand in another folder, relative to the file that names it."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "two.yaml").write_text("extends: ../three.yaml\nseats: 5\n")
    (tmp_path / "three.yaml").write_text("plate: three\n")
    found = car(tmp_path, "extends: [one.yaml, deep/two.yaml]\n", one="engine: {name: one}\nseats: 1\nplate: one\n")
    assert (found.engine.name, found.seats, found.plate) == ("one", 5, "three")


def test_a_short_name_is_opened_when_a_file_adds_to_it(tmp_path: Path) -> None:
    """`engine: a` is `engine: {name: a}`."""
    assert car(tmp_path, "extends: base.yaml\nengine: {power: 2}", base="engine: a").engine == Engine(name="a", power=2)


def test_a_fault_in_an_extended_file_names_that_file(tmp_path: Path) -> None:
    """And one in a value that another file has replaced is none."""
    base = "seats: 2\nengine:\n  name: a\n  power: lots\n  fuel: gas\n"
    said = faults(tmp_path, "extends: base.yaml\nseats: 4\nengine: {power: 3}\n", base=base)
    assert said.splitlines()[1:] == ["  base.yaml:5: engine.fuel is not a known key; did you mean fuels?"]
    assert "base.yaml:2: seats is given twice" in faults(tmp_path, "extends: base.yaml", base="seats: 2\nseats: 3\n")


@pytest.mark.parametrize(
    ("text", "others", "said"),
    [
        ("extends: car.yaml", {}, "car.yaml: extends itself, by way of car.yaml"),
        ("extends: b.yaml", {"b": "extends: car.yaml"}, "by way of car.yaml -> b.yaml; break the circle"),
        ("seats: 1\nextends: none.yaml", {}, "car.yaml:2: extends none.yaml, but there is no file none.yaml"),
        ("extends: 3", {}, "car.yaml:1: extends is 3; write a path"),
        ("extends: [[a]]", {}, "car.yaml:1: extends is ['a']; write a path"),
    ],
    ids=["itself", "a circle", "nothing", "a number", "a list in a list"],
)
def test_wrong_extensions_are_refused(tmp_path: Path, text: str, others: dict[str, str], said: str) -> None:
    """A circle is shown, a missing file is named with the line that wants it."""
    assert said in faults(tmp_path, text, **others)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seats=4", Car(engine=Engine(name="a"), seats=4)),
        ("engine.power=2e-4", Car(engine=Engine(name="a", power=2e-4))),
        ("engine.name=no", Car(engine=Engine(name="no"))),
        ("engine.fuels=[wood, gas]", Car(engine=Engine(name="a", fuels=("wood", "gas")))),
        ("plate=", Car(engine=Engine(name="a"))),
        ("plate=a=b", Car(engine=Engine(name="a"), plate="a=b")),
        ("plate='7'", Car(engine=Engine(name="a"), plate="7")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_overrides_are_read_by_the_same_types(tmp_path: Path, override: str, expected: Car) -> None:
    """As if they stood in the file."""
    assert car(tmp_path, "engine: a", "engine.name=a", override) == expected


def test_an_item_of_a_list_can_be_overridden(tmp_path: Path) -> None:
    """By its number from 0."""
    assert car(tmp_path, "engine: {name: a, fuels: [gas, gas]}", "engine.fuels.1=wood").engine.fuels == ("gas", "wood")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seats=many", "command line (seats=many): seats is 'many'; it must be an integer"),
        ("engine.powr=3", "command line (engine.powr=3): engine.powr is not a known key; did you mean power?"),
        ("motor.power=3", "command line (motor.power=3): motor is not a known key"),
        ("seats.front=3", "command line (seats.front=3): seats is a mapping"),
        ("seats", "'seats' is no override; write key=value"),
        ("=3", "'=3' is no override"),
        ("engine..power=3", "'engine..power=3' is no override"),
        ("engine.fuels.2=gas", "there is no item 2 to set; the list has 2 item(s), from 0"),
        ("engine.fuels.first=gas", "there is no item first to set"),
        ("seats=[1", "'seats=[1': the value is not YAML"),
        ("engine={name: a, name: b}", "name is given twice"),
        ("engine.name=!!float x", "the value is not YAML"),
    ],
)
def test_wrong_overrides_are_refused_by_name(tmp_path: Path, override: str, said: str) -> None:
    """The message says that the command line is at fault, not the file."""
    text = "engine:\n  name: a\n  fuels: [gas, wood]\nseats: 2\n"
    assert said in faults(tmp_path, text, override)
