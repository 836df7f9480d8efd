"""How a run computes, where the recipe leaves it open; each choice adds its reason. Imports no torch.

What depends on memory is chosen in fitting.py.
"""

from finllm.errors import RecipeError
from finllm.machine import Machine
from finllm.recipe import Recipe, Strategy


def shared_prefix(recipe: Recipe, micro_batch: int, reasons: list[str]) -> bool:
    """Whether what all prompts begin with is computed once."""
    if recipe.train is None or recipe.train.shared_prefix != "auto":
        return recipe.train is not None and recipe.train.shared_prefix == "on"
    why = recipe.prefix_not_shared_because or ("a micro-batch of 1 has nothing to share" if micro_batch == 1 else None)
    reasons.append(f"shared prefix {f'off: {why}' if why else 'on: what all prompts begin with is computed once'}")
    return why is None


def hand_written(recipe: Recipe, here: Machine, gpus: int, strategy: Strategy, dtype: str, reasons: list[str]) -> bool:
    """Whether our own passes train the model, if it has layers that they know."""
    if recipe.train is None or recipe.train.hand_written == "off":
        return False
    why = None
    if not gpus or here.gpus[0].capability < 8.0 or dtype != "bf16":
        why = "they need a GPU, and bf16 on it"
    elif strategy not in {"single", "ddp"}:
        why = f"they need all weights in one place, which {strategy} shares out"
    elif recipe.lora is None or recipe.lora.dropout > 0:
        why = "they train LoRA without dropout"
    elif recipe.model.quantization not in {"none", "nf4"} or not recipe.model.double_quantization:
        why = "they read bf16, or NF4 with double quantisation"
    elif recipe.train.shared_prefix == "off":
        why = "train.shared_prefix is off"
    elif recipe.explanations is not None:
        why = "they know no weights of tokens, which train.explanations has"
    if why is not None and recipe.train.hand_written == "on":
        raise RecipeError(f"train.hand_written is on, but here {why}; write auto")
    reasons.append(f"hand-written passes {f'off: {why}' if why else 'on, if the model has layers that they know'}")
    return why is None
