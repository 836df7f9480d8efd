"""The sizes of a model, known before its weights are loaded: from its config.json, or from a table."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finllm import embedded
from finllm.recipe import Model


@dataclass(frozen=True)
class Shape:
    """A decoder of Llama's kind; biases and the norms of single heads, far below 0.1 % of the weights, are left out."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    """Whether embeddings and head are the same weights."""
    kind: str = "llama"
    """Its type in Transformers, such as `mistral`."""

    @property
    def queries(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.kv_heads * self.head_size

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the linear layers of one block."""
        return {
            "q_proj": (self.hidden, self.queries),
            "k_proj": (self.hidden, self.keys),
            "v_proj": (self.hidden, self.keys),
            "o_proj": (self.queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers of all blocks: those that are quantised."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embeddings and the head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def norm_parameters(self) -> int:
        """Weights of the norms."""
        return (2 * self.layers + 1) * self.hidden

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.linear_parameters + self.embedding_parameters + self.norm_parameters


_MISTRAL = Shape(4096, 14336, 32, 32, 8, 128, 32000, tied=False, kind="mistral")
_MISTRAL_V3 = Shape(4096, 14336, 32, 32, 8, 128, 32768, tied=False, kind="mistral")
_LLAMA_3 = Shape(4096, 14336, 32, 32, 8, 128, 128256, tied=False)
_LLAMA_3_70B = Shape(8192, 28672, 80, 64, 8, 128, 128256, tied=False)
_SMOLLM2_135M = Shape(576, 1536, 30, 9, 3, 64, 49152, tied=True)
_KNOWN = {
    "mistralai/mistral-7b-v0.1": _MISTRAL,
    "mistralai/mistral-7b-v0.3": _MISTRAL_V3,
    "meta-llama/meta-llama-3-8b": _LLAMA_3,
    "meta-llama/meta-llama-3.1-8b": _LLAMA_3,
    "meta-llama/llama-3.1-8b": _LLAMA_3,
    "meta-llama/meta-llama-3-70b": _LLAMA_3_70B,
    "meta-llama/meta-llama-3.1-70b": _LLAMA_3_70B,
    "meta-llama/llama-3.1-70b": _LLAMA_3_70B,
    "meta-llama/llama-3.3-70b": _LLAMA_3_70B,
    "huggingfacetb/smollm2-135m": _SMOLLM2_135M,
    "huggingfacetb/smollm2-360m": Shape(960, 2560, 32, 15, 5, 64, 49152, tied=True),
    "huggingfacetb/smollm2-1.7b": Shape(2048, 8192, 24, 32, 32, 64, 49152, tied=True),
    "qwen/qwen2.5-0.5b": Shape(896, 4864, 24, 14, 2, 64, 151936, tied=True, kind="qwen2"),
    "qwen/qwen2.5-1.5b": Shape(1536, 8960, 28, 12, 2, 128, 151936, tied=True, kind="qwen2"),
    "qwen/qwen2.5-7b": Shape(3584, 18944, 28, 28, 4, 128, 152064, tied=False, kind="qwen2"),
    "google/gemma-3-270m": Shape(640, 2048, 18, 4, 1, 256, 262144, tied=True, kind="gemma3_text"),
    "google/gemma-3-1b": Shape(1152, 6912, 26, 4, 1, 256, 262144, tied=True, kind="gemma3_text"),
}
"""From the models' config.json; an instruct variant has the shape of its base."""
_VARIANTS = ("-instruct", "-it", "-pt")
_OTHER_SHAPES = ("num_experts", "num_local_experts", "n_routed_experts")
"""Keys of configurations whose blocks hold several feed-forward layers: not of Llama's kind."""


def shape_of(model: Model) -> Shape | None:
    """The shape of a recipe's model without any download; None where it is not known."""
    if model.name == embedded.NAME:
        return _SMOLLM2_135M
    config = _config(model)
    return _known(model.name) if config is None else from_config(config)


def from_config(config: dict[str, Any]) -> Shape | None:
    """The shape in a config.json; None where the model is of another kind."""
    text = config.get("text_config", config)
    if any(text.get(key) for key in _OTHER_SHAPES):
        return None
    try:
        heads, hidden = int(text["num_attention_heads"]), int(text["hidden_size"])
        return Shape(
            hidden=hidden,
            intermediate=int(text["intermediate_size"]),
            layers=int(text["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(text.get("num_key_value_heads") or heads),
            head_size=int(text.get("head_dim") or hidden // heads),
            vocabulary=int(text["vocab_size"]),
            # config.json names only what differs from the architecture's default, which is True for Gemma
            tied=bool(text.get("tie_word_embeddings", str(text.get("model_type", "")).startswith("gemma"))),
            kind=str(text.get("model_type", "")),
        )
    except (KeyError, TypeError, ValueError):
        return None


def _known(name: str) -> Shape | None:
    short = name.lower()
    for variant in _VARIANTS:
        short = short.removesuffix(variant)
    if short.startswith("mistralai/mistral-7b-instruct-"):
        short = short.replace("-instruct", "")
    return _KNOWN.get("mistralai/mistral-7b-v0.1" if short == "mistralai/mistral-7b-v0.2" else short)


def _config(model: Model) -> dict[str, Any] | None:
    """The configuration of a local folder, or of a snapshot in Hugging Face's cache."""
    folder = Path(model.name)
    for path in [folder / "config.json"] if folder.is_dir() else _cached(model):
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # the trainer will say what is wrong with it
            continue
        if isinstance(config, dict):
            return config
    return None


def _cached(model: Model) -> list[Path]:
    """Where Hugging Face's cache would hold the configuration (huggingface_hub, "Understand caching")."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    repository = cache / f"models--{model.name.replace('/', '--')}"
    revision = model.revision or "main"
    reference = repository / "refs" / revision
    named = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    return [repository / "snapshots" / named / "config.json"]
