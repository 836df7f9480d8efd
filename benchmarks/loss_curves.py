"""Train SmolLM2-135M twice in the same order, with FinLLM's streams and with TRL's own trainer, and draw both losses.

    python benchmarks/loss_curves.py

fp32 on CPU, LoRA of rank 16, steps of 16 sentences of the shipped sample. Writes docs/figures/loss_curves.svg and
benchmarks/results/loss_curves.json, and prints the largest difference. About 15 minutes on one core.
"""

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import panels

ROOT = Path(__file__).parent.parent
BLUE, ORANGE = "#0072B2", "#E69F00"  # Okabe and Ito: told apart without colour vision


def losses(steps: int, sentences: int) -> dict[str, list[float]]:
    """The training loss of every step (nats a token), of both."""
    import same_training

    from finllm import models, shared_prefix
    from finllm.recipe import Model

    def loaded() -> Any:
        return models.load(Model(name="smollm2-135m"), dtype="fp32", device="cpu")

    given = same_training.examples(sentences)
    found = {}
    mine = same_training.ours(loaded(), given, steps, [])
    with shared_prefix.attending(mine.model):
        mine.train()
    found["finllm"] = logged(mine)
    theirs = same_training.trls(
        loaded(), given, steps, [], micro_batch=same_training.STEP, gradient_checkpointing=False
    )
    theirs.train()
    found["trl"] = logged(theirs)
    return found


def logged(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def draw(found: dict[str, list[float]], target: Path) -> None:
    """Both curves, and below them their difference."""
    steps = range(1, len(found["trl"]) + 1)
    with panels.losses(target, size=(7, 4.6), heights=(3, 1), steps_of="16 sentences") as (above, below):
        above.plot(steps, found["trl"], color=ORANGE, linewidth=5, alpha=0.6, label="TRL's trainer and collator")
        above.plot(steps, found["finllm"], color=BLUE, linewidth=1.5, linestyle="--", label="FinLLM, shared prefix")
        above.set_ylim(bottom=0)
        differences = [ours - trl for ours, trl in zip(found["finllm"], found["trl"], strict=True)]
        below.plot(steps, differences, color=BLUE, marker=".", linewidth=1)
        below.set_ylabel("FinLLM - TRL")
        below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--sentences", type=int, default=384, help="a multiple of 16, at most 390")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--redraw", action="store_true", help="only draw the recorded losses again")
    asked = parser.parse_args()
    record = ROOT / "benchmarks" / "results" / "loss_curves.json"
    if not asked.redraw:
        import torch

        torch.set_num_threads(asked.threads)
        found = losses(asked.steps, asked.sentences)
        record.parent.mkdir(exist_ok=True)
        date = datetime.now(UTC).date().isoformat()
        record.write_text(json.dumps({"date": date, "sentences": asked.sentences, **found}, indent=1) + "\n")
    found = json.loads(record.read_text())
    draw(found, ROOT / "docs" / "figures" / "loss_curves.svg")
    pairs = list(zip(found["finllm"], found["trl"], strict=True))
    worst = max(pairs, key=lambda pair: abs(pair[0] - pair[1]))
    print(f"{len(pairs)} steps, loss {pairs[0][1]:.4f} -> {pairs[-1][1]:.4f}")
    print(f"largest difference {abs(worst[0] - worst[1]):.1e}, at a loss of {worst[1]:.4f}")


if __name__ == "__main__":
    main()
