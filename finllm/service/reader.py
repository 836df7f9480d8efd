"""What a loaded model does with texts, by name: for the service and for the page."""

from collections.abc import Sequence
from pathlib import Path

from finllm.predictor import Explanation, Prediction, SentimentPredictor


class Reader:
    """A predictor with a name; used by one thread at a time, as models are."""

    def __init__(self, source: str | Path, device: str | None = None) -> None:
        """Load what SentimentPredictor loads; raises RunError as it does."""
        self.name = Path(source).name
        self.predictor = SentimentPredictor(source, device=device)

    @property
    def has_base(self) -> bool:
        """Whether the model is an adapter on a base that can answer beside it."""
        return hasattr(self.predictor.model, "disable_adapter")

    @property
    def base_explains(self) -> bool:
        """Whether explanations are written by the base, since training was on labels alone."""
        return self.predictor.base_explains

    @property
    def on_gpu(self) -> bool:
        """Whether the model is on a GPU."""
        return bool(self.predictor.model.device.type == "cuda")

    def classify(self, texts: list[str], target: str | None = None) -> Sequence[Prediction]:
        """The sentiment of each text."""
        return self.predictor.predict(texts, target)

    def classify_with_base(self, texts: list[str], target: str | None = None) -> Sequence[Prediction]:
        """What the base says with the adapter switched off; only where `has_base`."""
        with self.predictor.model.disable_adapter():
            return self.predictor.predict(texts, target)

    def explain(self, texts: list[str], target: str | None = None) -> Sequence[Explanation]:
        """The sentiment of each text with an explanation."""
        return self.predictor.explain(texts, target)
