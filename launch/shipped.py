"""Recipes by name: those that stand beside the code, and a user's own by their path."""

import difflib
from pathlib import Path

from finllm.errors import RecipeError

FOLDER = Path(__file__).parent.parent / "recipes"
FRAGMENTS = "base"
"""Folder of files that are no recipes but stand in `extends`."""


def names(folder: Path = FOLDER) -> list[str]:
    """Every recipe below a folder, such as `demo` and `sft/mistral-7b-v0.1-phrasebank`."""
    found = [path.relative_to(folder) for path in folder.rglob("*.yaml")]
    return sorted(path.with_suffix("").as_posix() for path in found if FRAGMENTS not in path.parts[:-1])


def find(recipe: str) -> Path:
    """The file of a recipe, given its path or the name of a shipped one; raises RecipeError where there is none."""
    if Path(recipe).is_file():
        return Path(recipe)
    shipped = FOLDER / f"{recipe.removesuffix('.yaml')}.yaml"
    if shipped.is_file():
        return shipped
    known = names()
    near = difflib.get_close_matches(
        Path(recipe).with_suffix("").as_posix().removeprefix("recipes/"), known, n=3, cutoff=0.5
    )
    hint = f"did you mean {' or '.join(near)}?" if near else "`finllm recipes` lists those that are shipped"
    raise RecipeError(f"{recipe}: no such file, and no shipped recipe of that name; {hint}")
