"""Which bf16 is nearer to fp32: our passes' label scores or Transformers', on real prompts.

    python benchmarks/h200_agreement.py --weights /dev/shm/mistral --tokenizer FOLDER --model ~/.cache/finllm/smollm2-135m
    python benchmarks/h200_agreement.py --tiny --prompts 8 --results /tmp/agreement.json   # also on a CPU, to try it out

Prompts are PhraseBank's validation texts; a score is the log-probability of each of the three labels. All three compute
from the same bf16 weights and the same random fp32 adapter, on and off: Transformers in fp32 without TF32 (29 GB for 7 G
parameters), Transformers in bf16, prompt by prompt, and finllm's passes in bf16, as they score everywhere.
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from conditions import conditions, make_tiny, make_weights, results, write
from numpy.typing import NDArray

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes/sft/mistral-7b-v0.1-phrasebank.yaml"
Scores = dict[str, NDArray[np.float64]]


def plain(model: Any, prompts: list[list[int]], answers: Sequence[tuple[int, ...]], kind: str) -> NDArray[np.float64]:
    """Log-probabilities, (prompts, answers) in nats, by Transformers' forward on one row at a time."""
    import torch

    device = model.device
    table = np.zeros((len(prompts), len(answers)))
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=kind == "bf16")
    with torch.inference_mode(), autocast:
        for i, prompt in enumerate(prompts):
            for begin in {answer[:-1] for answer in answers}:
                ids = torch.tensor([[*prompt, *begin]], device=device)
                log_p = model(ids, use_cache=False).logits[0].double().log_softmax(-1).cpu()
                for j, answer in enumerate(answers):
                    if answer[:-1] == begin:
                        at = range(len(prompt) - 1, len(prompt) - 1 + len(answer))
                        table[i, j] = sum(float(log_p[place, token]) for place, token in zip(at, answer, strict=True))
    return table


def adapted(model: Any, factors: dict[str, Any] | None) -> Any:
    """The model with an adapter that does something: random factors, or those given."""
    import torch

    from finllm import models
    from finllm.recipe import load

    lora = load(RECIPE, []).lora
    assert lora is not None, "the recipe trains LoRA"
    made = models.with_adapter(model, lora, 0).eval()
    for name, parameter in made.named_parameters():
        if "lora_" not in name:
            continue
        if factors is not None:
            parameter.data.copy_(factors[name])
        elif "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return made


def scores(folder: Path, count: int) -> dict[str, Scores]:
    """Log-probabilities of each of the three, with the adapter on and off."""
    import torch

    from finllm import data, models, scoring
    from finllm.example import LABELS
    from finllm.fast.engine import Engine
    from finllm.prompts import Prompter
    from finllm.recipe import load

    models.quiet_libraries()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    recipe = load(RECIPE, [f"model.name={folder}", "model.quantization=none"])
    examples = data.read_parts(recipe.data).validation[:count]
    found: dict[str, Scores] = {"adapter on": {}, "adapter off": {}}
    factors = None
    for kind in ("fp32", "bf16"):
        loaded = models.load(recipe.model, dtype="bf16", device=device)
        model = adapted(loaded.model.float() if kind == "fp32" else loaded.model, factors)
        factors = {name: value.detach().cpu() for name, value in model.named_parameters() if "lora_" in name}
        prompter = Prompter(loaded.tokenizer, recipe.prompt)
        prompts = [p.ids for p in prompter.render([e.text for e in examples], [e.target for e in examples])]
        answers = [prompter.answers[label] for label in LABELS]
        for name, own in found.items():
            with model.disable_adapter() if name == "adapter off" else nullcontext():
                own[f"transformers {kind}"] = plain(model, prompts, answers, kind)
        if kind == "bf16":
            engine = Engine(model)
            for name, own in found.items():
                with model.disable_adapter() if name == "adapter off" else nullcontext():
                    own["finllm bf16"] = scoring.score(model, prompts, answers, batch_tokens=16_384, engine=engine)
        del model, loaded
        if device != "cpu":
            torch.cuda.empty_cache()
    return found


def compared(name: str, adapter: str, own: Scores) -> list[dict[str, Any]]:
    """For each pair: share of equal labels, differences of the log-probabilities in nats."""
    rows = []
    for one, other in itertools.combinations(own, 2):
        apart = np.abs(own[one] - own[other])
        ranked = np.sort(own[one], axis=1)
        rows.append({
            "name": name, "adapter": adapter, "pair": f"{one} / {other}", "prompts": len(apart),
            "same_argmax": round(float((own[one].argmax(1) == own[other].argmax(1)).mean()), 4),
            "mean_difference_nats": float(f"{apart.mean():.3g}"), "largest_difference_nats": float(f"{apart.max():.3g}"),
            "median_margin_nats": float(f"{np.median(ranked[:, -1] - ranked[:, -2]):.3g}"),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="folder of the model of random weights; made if it is not there")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer for a model that must be made")
    parser.add_argument("--model", type=Path, nargs="*", default=[], help="folders of real models, such as SmolLM2")
    parser.add_argument("--tiny", action="store_true", help="random weights of two layers, also without a GPU")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--results", type=Path, help="else results/h200_agreement.json, of --tiny none")
    asked = parser.parse_args()
    asked.results = results(asked.results, "h200_agreement.json", tiny=asked.tiny)
    if asked.tiny:
        asked.weights = asked.weights or Path(tempfile.gettempdir()) / "finllm-tiny-mistral"
        make_tiny(asked.weights, asked.tokenizer)
    elif asked.weights is not None:
        make_weights(asked.weights, asked.tokenizer)
    elif not asked.model:
        parser.error("give --weights, --model, or --tiny")
    common = conditions(note="PhraseBank split_s42, validation; the same bf16 weights and fp32 adapter in all")
    rows: list[dict[str, Any]] = []
    for folder in [*([asked.weights] if asked.weights else []), *asked.model]:
        name = "random weights" if folder == asked.weights else folder.name
        for adapter, own in scores(folder, asked.prompts).items():
            rows += compared(name, adapter, own)
        for row in rows[-6:]:
            print(json.dumps(row), flush=True)
        write(asked.results, [{**row, **common} for row in rows])


if __name__ == "__main__":
    main()
