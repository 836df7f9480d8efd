"""FinLLM: fine-tune open LLMs to read the sentiment of financial text."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finllm.predictor import SentimentPredictor

__all__ = ["SentimentPredictor"]


def __getattr__(name: str) -> Any:
    """Load the predictor, and with it torch, only when it is asked for."""
    if name == "SentimentPredictor":
        from finllm.predictor import SentimentPredictor

        return SentimentPredictor
    raise AttributeError(f"module 'finllm' has no attribute {name!r}")
