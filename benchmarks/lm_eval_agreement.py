"""Compare our label log-probabilities with lm-evaluation-harness: a task of its own over the same prompts, its HF backend.

    pip install -e '.[bench]' && python benchmarks/lm_eval_agreement.py      # 300 texts, fp32, CPU; exit 1 above 1e-4

The harness encodes, batches, pads and scores by itself; it is given the prompts as strings and the labels as choices.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parent.parent
TOLERANCE = 1e-4
"""Nats; fp32 sums of some thirty layers in another order differ by a tenth of that."""
PACKAGES = ("torch", "transformers", "lm_eval")


def examples(data: str, count: int) -> list[Any]:
    """The first test rows of a data set."""
    from finllm.recipe import Recipe

    recipe = Recipe.model_validate({"model": "smollm2-135m", "data": data})
    return [example for example in recipe.data[0].read() if example.split == "test"][:count]


def theirs(loaded: Any, prompts: list[str], gold: list[int], batch: int) -> tuple[NDArray[np.float64], float]:
    """Log-probabilities (prompts, labels) of the harness, and the accuracy that it reports."""
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    from finllm.example import LABELS

    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text(
            "".join(json.dumps({"prompt": p, "gold": g}) + "\n" for p, g in zip(prompts, gold, strict=True))
        )
        config = {
            "task": "finllm_prompts",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": folder},
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "{{prompt}}",
            "doc_to_choice": list(LABELS),
            "doc_to_target": "gold",
            "target_delimiter": " ",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        backend = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch, backend="causal")
        found = lm_eval.simple_evaluate(
            model=backend,
            tasks=[ConfigurableTask(config=config)],
            log_samples=True,
            bootstrap_iters=0,
            verbosity="ERROR",
        )
    samples = sorted(found["samples"]["finllm_prompts"], key=lambda sample: sample["doc_id"])
    scores = np.array([[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples])
    return scores, float(found["results"]["finllm_prompts"]["acc,none"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="phrasebank")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16, help="of the harness")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "lm_eval_agreement.json")
    asked = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    from finllm import metrics, models, scoring
    from finllm.example import LABELS
    from finllm.prompts import Prompter
    from finllm.recipe import Model, Prompt

    chosen = examples(asked.data, asked.rows)
    loaded = models.load(Model(name=asked.model), dtype="fp32", device="cpu")
    prompter = Prompter(loaded.tokenizer, Prompt())
    ids = [rendered.ids for rendered in prompter.render([e.text for e in chosen], [e.target for e in chosen])]
    ours = scoring.score(loaded.model, ids, [prompter.answers[label] for label in LABELS], batch_tokens=16_384)
    gold = [LABELS.index(e.label) for e in chosen]
    peer, accuracy = theirs(loaded, [prompter.string(e.text, e.target) for e in chosen], gold, asked.batch)
    apart = float(np.abs(ours - peer).max())
    own = metrics.accuracy(np.array(gold), ours.argmax(axis=1))
    row = {
        "model": asked.model,
        "data": asked.data,
        "rows": len(chosen),
        "largest_difference_nats": apart,
        "same_answers": int((ours.argmax(axis=1) == peer.argmax(axis=1)).sum()),
        "accuracy": own,
        "lm_eval_accuracy": accuracy,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "date": datetime.now(UTC).date().isoformat(),
    }
    print(json.dumps(row))
    asked.output.write_text(json.dumps(row, indent=1) + "\n")
    if apart > TOLERANCE or abs(own - accuracy) > 1e-9:
        sys.exit(f"differs by {apart:.2e} nats, {TOLERANCE:g} allowed; accuracy {own} and {accuracy}")


if __name__ == "__main__":
    main()
