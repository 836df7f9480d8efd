"""FinLLM: fine-tune open LLMs to read the sentiment of financial text."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finllm.library import Evaluate, Train
    from finllm.predictor import SentimentPredictor
    from finllm.recipe import Recipe
    from finllm.run import Run
    from finllm.scores import Scores

    train: Train
    evaluate: Evaluate

__all__ = ["Recipe", "Run", "Scores", "SentimentPredictor", "evaluate", "train"]

_HOMES = {"Recipe": "recipe", "Run": "run", "Scores": "scores", "SentimentPredictor": "predictor"}


def __getattr__(name: str) -> Any:
    """Load what is asked for only then, so that `import finllm` costs nothing."""
    if name in _HOMES:
        return getattr(import_module(f"finllm.{_HOMES[name]}"), name)
    if name in __all__:
        return import_module(f"finllm.{name}")  # a module that can be called: see finllm.library
    raise AttributeError(f"module 'finllm' has no attribute {name!r}")
