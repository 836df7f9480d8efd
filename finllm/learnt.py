"""What a recipe learns from: examples with labels, or pairs of answers. Imports no torch."""

import json
from collections.abc import Sequence
from pathlib import Path

from finllm.answer import opening
from finllm.data import preferences
from finllm.data.parts import Parts
from finllm.data.preferences import Preference
from finllm.errors import RunError
from finllm.example import LABELS, Example
from finllm.lengths import Lengths, lengths_of
from finllm.methods import Dpo
from finllm.models import Card
from finllm.plan import Rows
from finllm.recipe import Recipe


def learnt(recipe: Recipe, parts: Parts) -> Sequence[Example] | Sequence[Preference]:
    """The examples, or the pairs, that training goes over; `parts` are those of the recipe's data."""
    if isinstance(recipe.train, Dpo):
        return preferences.read(recipe.train.pairs, parts, recipe.data)
    return parts.train


def counted(recipe: Recipe, parts: Parts) -> tuple[Rows, Lengths | None]:
    """Rows of each part, where pairs are the training rows, and the estimated lengths of what is learnt, or else scored.

    Raises FinllmError where pairs, or the run that training goes on from, cannot be had.
    """
    initial_adapter(recipe)
    items = learnt(recipe, parts)
    rows = Rows(train=len(items), validation=len(parts.validation), test=len(parts.test))
    texts = [item if isinstance(item, Example) else _as_text(item) for item in items or parts.test]
    return rows, lengths_of(texts, recipe.explanations)


def _as_text(pair: Preference) -> Example:
    """As long as what a stream holds of the pair."""
    around = [opening(label) for label in LABELS[:2]] if pair.reasons else []
    text = " ".join([pair.text, *pair.answers, *around])
    return Example(pair.id, pair.source, text, LABELS[0], "train", target=pair.target)


def initial_adapter(recipe: Recipe) -> Path | None:
    """The folder of the adapter that training goes on from, or None for a new one; raises RunError if it does not fit."""
    if not isinstance(recipe.train, Dpo) or recipe.train.init is None:
        return None
    run = recipe.train.init
    if not run.is_dir():
        raise RunError(f"train.init is {run}, which is no folder; `finllm launch` an SFT recipe with that name first")
    folder = run / "adapter" if (run / "plan.json").is_file() else run
    card = Card.of(folder)
    if recipe.lora is None or card.trained != "adapter":
        raise RunError(f"train.init is {run}: DPO goes on from a LoRA adapter, so keep `lora`, and train SFT with it")
    if (card.base.name, card.base.revision) != (recipe.model.name, recipe.model.revision):
        raise RunError(f"train.init is {run}, an adapter of {card.base.name}, but model.name is {recipe.model.name}")
    if card.prompt != recipe.prompt:
        raise RunError(f"train.init is {run}, which was trained with another `prompt`; copy that of its recipe.yaml")
    made = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if (made["r"], made["lora_alpha"]) != (recipe.lora.rank, recipe.lora.alpha):
        raise RunError(
            f"train.init is {run}, an adapter of rank {made['r']} and alpha {made['lora_alpha']:g}, but lora says "
            f"{recipe.lora.rank} and {recipe.lora.alpha:g}; write the adapter's"
        )
    return folder
