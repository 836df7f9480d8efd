"""Speed on CPU: FinLLM against TRL's trainer, and against lm-evaluation-harness's HF backend, taking turns.

    pip install -e '.[bench]' --constraint constraints.txt
    python benchmarks/cpu.py

Every system has a process of its own, which lives through all repetitions; they take turns (ours, peer, peer, ours, ...)
while the others wait. The first turn of each is a warm-up and is not counted. All compute the same in fp32: losses and
log-probabilities are compared. Writes benchmarks/results/cpu.json; ratios are of medians.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PACKAGES = ("finllm", "torch", "transformers", "trl", "peft", "lm_eval")
MODELS = ("llama-6x512", "smollm2-135m")
STEPS = {"llama-6x512": 6, "smollm2-135m": 1}
"""Optimizer steps of 16 sentences in one repetition of training."""
TRL = {
    "TRL, 4 x 4, checkpointing": {"micro_batch": 4},
    "TRL, batch 16, no checkpointing": {"micro_batch": 16, "gradient_checkpointing": False},
}
LM_EVAL = {"lm-eval, batch 1": {"batch_size": 1}, "lm-eval, batch 16": {"batch_size": 16}}
PEERS: dict[str, dict[str, dict[str, Any]]] = {"train": TRL, "score": LM_EVAL}
WITHIN = {"train": 1e-3, "score": 1e-4}
"""Largest difference of a step's loss (nats a token), and of a label's log-probability (nats)."""


class Contestant:
    """A system in its own process."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "contestants.py"), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if not spec["verbose"] else None,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(spec["threads"]), "OMP_WAIT_POLICY": "PASSIVE"},
        )

    def turn(self) -> dict[str, float]:
        """Do one repetition; returns its seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line that it says."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"a system ended with status {self._process.wait()}; run again with --verbose")
        said: dict[str, Any] = json.loads(line)
        return said


def contest(task: str, model: str, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the result file, one for each peer."""
    specs = {"finllm": {"system": "finllm"}}
    specs |= {name: {"system": "peer", "settings": own} for name, own in PEERS[task].items()}
    common = {
        "task": task,
        "model": model,
        "sentences": asked.sentences,
        "steps": STEPS[model],
        "repetitions": asked.repetitions + 1,
        "threads": asked.threads,
        "verbose": asked.verbose,
    }
    systems = {name: Contestant({**common, **own}) for name, own in specs.items()}
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    for repetition in range(asked.repetitions + 1):
        for name, system in systems.items():
            turns[name].append(system.turn())
            seconds = {key: round(value, 2) for key, value in turns[name][-1].items()}
            print(f"{task} {model} {repetition or 'warm-up'}: {name} {seconds}", flush=True)
    ends = {name: system.answer() for name, system in systems.items()}
    rows = []
    for name in PEERS[task]:
        apart = max(abs(a - b) for a, b in zip(ends["finllm"]["found"], ends[name]["found"], strict=True))
        if not apart <= WITHIN[task]:
            sys.exit(f"{task} {model}: {name} and FinLLM differ by {apart:.1e} nats; at most {WITHIN[task]} is allowed")
        work = _work(task, model, asked.sentences, PEERS[task][name])
        counted = {who: turns[who][1:] for who in ("finllm", name)}
        rows.append(_row(task, model, name, counted, ends, asked) | work | {"largest_difference": apart})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _row(
    task: str,
    model: str,
    peer: str,
    turns: dict[str, list[dict[str, float]]],
    ends: dict[str, dict[str, Any]],
    asked: argparse.Namespace,
) -> dict[str, Any]:
    """Speeds by the chosen clock, and the ratio by both clocks with its extremes over the pairs of turns."""
    import same_training

    count = STEPS[model] * same_training.STEP if task == "train" else asked.sentences
    seconds = {who: [turn[asked.clock] for turn in own] for who, own in turns.items()}
    ratios = {
        clock: statistics.median(t[clock] for t in turns[peer]) / statistics.median(t[clock] for t in turns["finllm"])
        for clock in ("cpu_seconds", "seconds")
    }
    pairs = [theirs / ours for ours, theirs in zip(seconds["finllm"], seconds[peer], strict=True)]
    return {
        "name": f"{task} {model}",
        "examples_per_s": round(count / statistics.median(seconds["finllm"]), 2),
        "peak_gib": round(ends["finllm"]["peak_gib"], 2),
        "peer": peer,
        "peer_examples_per_s": round(count / statistics.median(seconds[peer]), 2),
        "peer_peak_gib": round(ends[peer]["peak_gib"], 2),
        "ratio": round(ratios[asked.clock], 2),
        "ratio_least": round(min(pairs), 2),
        "ratio_most": round(max(pairs), 2),
        "ratio_cpu_time": round(ratios["cpu_seconds"], 2),
        "ratio_wall_time": round(ratios["seconds"], 2),
        "repetitions": asked.repetitions,
        "examples_a_repetition": count,
        "seconds": {who: [round(s, 3) for s in own] for who, own in seconds.items()},
    }


def _work(task: str, model: str, sentences: int, peer: dict[str, Any]) -> dict[str, Any]:
    """Tokens that both put through the layers, and the ratio of their multiplications, which speed cannot exceed alone.

    A pass multiplies a token with every weight: 2 passes in training (3 where the peer computes activations again). We
    apply the head, and the last layer but for keys and values, where an answer is predicted; TRL on a CPU applies the
    head everywhere in 3 passes, lm-eval everywhere.
    """
    import contestants
    import same_training
    from torch import nn

    from finllm.prompts import Prompter
    from finllm.recipe import Prompt
    from finllm.scoring import MOST_ON_CPU, batches_of
    from finllm.shared_prefix import shared_length
    from finllm.training.batches import encode, stream

    loaded = contestants.model(model)
    weights = {n: m.weight.numel() for n, m in loaded.model.named_modules() if isinstance(m, nn.Linear)}
    layers = sum(count for name, count in weights.items() if ".layers." in name)
    last = f".layers.{loaded.model.config.num_hidden_layers - 1}."
    read = sum(n for name, n in weights.items() if last in name and not name.endswith(("k_proj", "v_proj")))
    head = loaded.model.get_output_embeddings().weight.numel()
    rows = encode(same_training.examples(sentences), Prompter(loaded.tokenizer, Prompt()))
    if task == "train":
        rows = same_training.in_order(rows, len(rows) // same_training.STEP)
        steps = _cut(rows, same_training.STEP)
        tokens = sum(stream(step)["input_ids"].numel() for step in steps)
        padded = _padded([len(r.prompt) + len(r.answer) for r in rows], peer["micro_batch"])
        answers = sum(len(row.answer) for row in rows)
        ours = 2 * (tokens * (layers - read) + answers * (read + head))
        passes = 3 if peer.get("gradient_checkpointing", True) else 2
        theirs = padded * layers * passes + (padded - len(rows)) * head * 3
    else:
        shared = shared_length([row.prompt for row in rows])
        own = [len(row.prompt) - shared for row in rows]
        batches = list(batches_of(own, 0, MOST_ON_CPU))
        tokens = shared + sum(len(batch) * max(own[i] for i in batch) for batch in batches)
        padded = _padded(sorted((len(row.prompt) for row in rows), reverse=True), peer["batch_size"])
        ours = tokens * (layers - read) + len(rows) * (read + head)
        theirs = padded * (layers + head)
    return {"tokens": tokens, "peer_tokens": padded, "limit_ratio": round(theirs / ours, 2)}


def _cut(rows: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _padded(lengths: Sequence[int], size: int) -> int:
    return sum(len(batch) * max(batch) for batch in _cut(lengths, size))


def _machine() -> str:
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
    return f"{cpu}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--tasks", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--sentences", type=int, default=96, help="of the shipped sample; a multiple of 16")
    parser.add_argument("--repetitions", type=int, default=5, help="that count, after one that does not")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock",
        choices=["cpu_seconds", "seconds"],
        default="cpu_seconds",
        help="processor time (default; others may use the machine) or wall time, for speeds and the ratio",
    )
    parser.add_argument("--output", type=Path, default=HERE / "results" / "cpu.json")
    parser.add_argument("--verbose", action="store_true", help="show what the systems print")
    asked = parser.parse_args()
    facts = {
        "clock": {"cpu_seconds": "processor", "seconds": "wall"}[asked.clock],
        "threads": asked.threads,
        "hardware": _machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "date": datetime.now(UTC).date().isoformat(),
    }
    contests = [(task, model) for model in asked.models for task in asked.tasks]
    before = json.loads(asked.output.read_text()) if asked.output.is_file() else []
    names = {f"{task} {model}" for task, model in contests}
    rows = [row for row in before if row["name"] not in names]  # a part of the contests may be run again alone
    for task, model in contests:
        rows += [row | facts for row in contest(task, model, asked)]
        asked.output.parent.mkdir(exist_ok=True)
        asked.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
