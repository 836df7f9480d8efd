"""Two GPUs of one machine: every strategy against one GPU, against TRL under the same strategy, and against the plan.

    python benchmarks/h200x2.py --weights /dev/shm/mistral --tokenizer FOLDER      # a 7B shape with random weights
    python benchmarks/h200x2.py --tiny --weights /tmp/tiny-x2 --timeout 600        # two CPU processes, to try it out

Data are PhraseBank's training texts; LoRA has rank 16 on all linear layers, and each GPU 32 examples a step. Measured are
examples/s of all GPUs in the steady state, the first GPU's peak beside the plan's estimate of it (without `other`), the
seconds of an evaluation by one and by two processes (PhraseBank and TFNS, all but the training parts), and the losses of a
small model under every strategy. Each system runs in processes of its own; what an earlier call has measured stays, and
`--systems` does some of it again.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conditions import SHAPE, conditions, make_tiny, make_weights, results, write
from micro_batches import largest

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes/sft/mistral-7b-v0.1-phrasebank.yaml"
EACH = 32
"""Examples of a GPU in a step."""
SEED = 1
"""The first from 0 under which a run's largest micro-batch is among the first 24 steps, so that peaks are a whole run's."""
ONE_B = {**SHAPE, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
         "num_key_value_heads": 8}  # fmt: skip
"""Llama-3.2-1B's layers."""
BF16, NF4 = ("model.quantization=none",), ("train.gradient_checkpointing=true",)
OFFLOADED = ("distributed.offload=true",)
ALL = ("model.quantization=none", "lora=null", "train.learning_rate=1e-5", "train.gradient_checkpointing=false")


@dataclass(frozen=True)
class System:
    """A way to train; the name of the strategy stands first in its own."""

    gpus: int
    strategy: str
    overrides: tuple[str, ...] = ()
    trl: bool = False
    small: bool = False
    """On the 1B shape."""
    by_hosts: bool = False
    """Weights are read into the hosts' memory, as those of a model that no GPU holds."""
    steps: int = 24
    """The faster the system, the more of them, since the first ones are not its pace."""


SYSTEMS = {
    "one GPU": System(1, "single", steps=120),
    "ddp": System(2, "ddp", steps=120),
    "TRL ddp": System(2, "ddp", BF16, trl=True),
    "fsdp, bf16": System(2, "fsdp", BF16),
    "TRL fsdp, bf16": System(2, "fsdp", BF16, trl=True),
    "zero2, bf16": System(2, "zero2", BF16),
    "TRL zero2, bf16": System(2, "zero2", BF16, trl=True),
    "zero3, bf16": System(2, "zero3", BF16),
    "TRL zero3, bf16": System(2, "zero3", BF16, trl=True),
    "fsdp, bf16, read by hosts": System(2, "fsdp", BF16, by_hosts=True),
    "zero3, bf16, read by hosts": System(2, "zero3", BF16, by_hosts=True),
    "ddp, NF4": System(2, "ddp", NF4),
    "fsdp, NF4": System(2, "fsdp", NF4),
    "zero2, NF4": System(2, "zero2", NF4),
    "zero3, NF4": System(2, "zero3", NF4),
    "zero2, bf16, offloaded": System(2, "zero2", (*BF16, *OFFLOADED)),
    "fsdp, bf16, offloaded": System(2, "fsdp", (*BF16, *OFFLOADED)),
    "zero3, bf16, offloaded": System(2, "zero3", (*BF16, *OFFLOADED)),
    "zero2, 1B, all weights": System(2, "zero2", ALL, small=True),
    "fsdp, 1B, all weights": System(2, "fsdp", ALL, small=True),
    "zero2, 1B, all weights, offloaded": System(2, "zero2", (*ALL, *OFFLOADED), small=True),
    "fsdp, 1B, all weights, offloaded": System(2, "fsdp", (*ALL, *OFFLOADED), small=True),
}
EVALUATIONS = {"evaluation, one GPU": 1, "evaluation, two GPUs": 2}
CURVES = {"losses, one GPU": (1, "single"), **{f"losses, {s}": (2, s) for s in ("ddp", "fsdp", "zero2", "zero3")}}
"""The small model on real data, so that its losses fall."""
PEERS = {
    "ddp": ("one GPU", "TRL ddp"),
    "evaluation, two GPUs": ("evaluation, one GPU",),
    **{name.removeprefix("TRL "): (name,) for name in SYSTEMS if name.startswith("TRL ") and "," in name},
}
"""What each is compared with."""


@dataclass(frozen=True)
class Bench:
    """Where things are, and how long they may take."""

    weights: Path
    small: Path
    real: str
    runs: Path
    timeout: int
    tiny: bool

    def prepared(self, name: str, model: str, gpus: int, strategy: str, overrides: Sequence[str]) -> Any:
        """A run with its plan, for so many GPUs of this machine (or CPU processes)."""
        from launch import planning

        shutil.rmtree(self.runs / name, ignore_errors=True)
        where = ("resources.gpus=0", f"resources.cpu_processes={gpus}") if self.tiny else (f"resources.gpus={gpus}",)
        usual = ("train.optimizer=adamw", "tracking.wandb=disabled", f"train.global_batch={EACH * gpus}")
        given = (f"model.name={model}", f"distributed.strategy={strategy}", *where, *usual, *overrides)
        quantized = ("model.quantization=none",) if self.tiny else ()
        return planning.prepare(str(RECIPE), (*given, *quantized), name, self.runs)

    def run(self, command: Sequence[str], gpus: int) -> str:
        """What a command prints; raises RuntimeError with it where it fails or takes too long."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        if not self.tiny:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[:gpus])
        else:
            environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        try:
            done = subprocess.run(
                command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=self.timeout
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"over {self.timeout} s: {str(error.stdout)[-1500:]}") from error
        if done.returncode:
            raise RuntimeError((done.stdout + done.stderr)[-3500:])
        return done.stdout


def trained(bench: Bench, name: str, system: System) -> dict[str, Any]:
    """One of our own systems, or TRL under our configuration of Accelerate."""
    from finllm.plan import Plan

    model = str(bench.small if system.small else bench.weights)
    steps = f"train.max_steps={min(system.steps, 4) if bench.tiny else system.steps}"
    slug = "".join(c if c.isalnum() else "-" for c in name)
    overrides = (*system.overrides, steps, f"train.seed={SEED}")
    run = bench.prepared(slug, model, system.gpus, system.strategy, overrides)
    plan = Plan.of(run)
    if system.by_hosts:
        plan = plan.model_copy(update={"loads_on_host": True})
        plan.save(run)
    if system.trl:
        command = list(plan.commands["train"])
        at = command.index("-m", command.index("--config_file"))
        child = [*command[:at], str(Path(__file__).with_name("h200x2_trl.py")), str(run.folder)]
        answer = bench.run(child, system.gpus)
        return json.loads(next(line for line in answer.splitlines() if line.startswith("RESULT "))[7:])
    bench.run(plan.commands["train"], system.gpus)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    paces = [line["train/examples_per_s"] for line in lines if "train/examples_per_s" in line]
    peak = max(line.get("train/memory_gib", 0) for line in lines)
    said = None if system.by_hosts else plan.memory  # those were planned for GPUs that read them
    tokens = largest(plan)
    return {
        "strategy": plan.strategy,
        "examples_per_s": round(statistics.median(paces[2:] or paces), 1),
        "peak_gib": round(peak, 2),
        "estimate_gib": said and round(said.allocated, 2),
        "tokens_planned": said and said.tokens,
        "tokens_of_run": tokens.of_run,
        "tokens_here": tokens.of_steps,
        "micro_batch": plan.micro_batch,
        "gradient_checkpointing": plan.gradient_checkpointing,
        "hand_written": plan.hand_written,
        "expected_examples_per_s": plan.pace and round(plan.pace.examples_per_s, 1),
    }


def evaluated(bench: Bench, gpus: int) -> dict[str, Any]:
    """Seconds in which so many processes answer validation and test part, and how far the answers lie from the others'."""
    from finllm.plan import Plan
    from finllm.predictions import of_run

    zero_shot = (
        "train=null",
        "data=[phrasebank, tfns]",
        "evaluation.baselines=[]",
        "evaluation.batch_calibration=false",
    )
    run = bench.prepared(f"evaluation-{gpus}", str(bench.weights), gpus, "auto", zero_shot)
    Plan.of(run).evaluated_by(gpus, run).save(run)
    bench.run(Plan.of(run).commands["evaluate"], gpus)
    answers = of_run(run)
    rows = {p.id: list(p.probabilities) for p in answers.predictions}
    assert len(rows) == len(answers.predictions), "a row was answered twice"
    (bench.runs / f"answers-{gpus}.json").write_text(json.dumps(rows))
    pace = round(len(rows) / answers.seconds, 1)
    found = {"seconds": round(answers.seconds, 3), "rows": len(rows), "examples_per_s": pace}
    other = bench.runs / f"answers-{3 - gpus}.json"
    if other.is_file():
        theirs = json.loads(other.read_text())
        assert theirs.keys() == rows.keys(), "not the same rows"
        pairs = (zip(rows[row], theirs[row], strict=True) for row in rows)
        found["largest_difference"] = max(abs(a - b) for pair in pairs for a, b in pair)
    return found


def curve(bench: Bench, gpus: int, strategy: str) -> dict[str, Any]:
    """The losses of each of the first steps on real data, at one global batch."""
    from finllm.plan import Plan

    steps = 4 if bench.tiny else 40
    more = ("train.global_batch=32", f"train.max_steps={steps}", "model.quantization=none", "train.learning_rate=4e-4")
    name = f"losses-{strategy}"
    run = bench.prepared(name, bench.real, gpus, strategy, more)
    bench.run(Plan.of(run).commands["train"], gpus)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return {"losses": {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}}


def with_ratios(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The measurements, each with its ratio to what it is to be compared with."""
    rows = []
    for name, row in found.items():
        told = False
        for peer in PEERS.get(name, ()):
            speed, other = row.get("examples_per_s"), found.get(peer, {}).get("examples_per_s")
            if speed and other:
                shown = f"{name} against {peer}" if told else name
                rows.append({"name": shown, "peer": peer, "ratio": round(speed / other, 2), **row})
                told = True
        if not told:
            rows.append({"name": name, "peer": None, "ratio": None, **row})
    return rows


def measure(bench: Bench, name: str) -> dict[str, Any]:
    if name in SYSTEMS:
        return trained(bench, name, SYSTEMS[name])
    return evaluated(bench, EVALUATIONS[name]) if name in EVALUATIONS else curve(bench, *CURVES[name])


def main() -> None:
    names = [*SYSTEMS, *EVALUATIONS, *CURVES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="folder of the 7B shape; made if it is not there")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer, for models that must be made")
    parser.add_argument("--real", default="smollm2-135m", help="model for the losses: a folder, or the embedded one")
    parser.add_argument("--runs", type=Path, default=Path("/tmp/h200x2"))  # noqa: S108
    parser.add_argument("--results", type=Path, help="else benchmarks/results/h200x2.json; with --tiny nothing")
    parser.add_argument("--systems", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--timeout", type=int, default=110, help="seconds for one system")
    parser.add_argument(
        "--tiny", action="store_true", help="two layers, on two CPU processes; writes no results by itself"
    )
    asked = parser.parse_args()
    to = results(asked.results, "h200x2.json", tiny=asked.tiny)
    small = asked.weights.with_name(f"{asked.weights.name}-1b")
    for folder, shape in ((asked.weights, SHAPE), (small, ONE_B)):
        if asked.tiny:
            make_tiny(folder, asked.tokenizer)
        else:
            make_weights(folder, asked.tokenizer, shape)
    real = str(asked.weights) if asked.tiny else asked.real
    bench = Bench(asked.weights.absolute(), small.absolute(), real, asked.runs, asked.timeout, asked.tiny)
    earlier = json.loads(to.read_text()) if to and to.is_file() else []
    derived = {"name", "peer", "ratio"}
    found = {
        row["name"]: {key: value for key, value in row.items() if key not in derived}
        for row in earlier
        if row["name"] in names
    }
    common = conditions(
        note=f"random weights but for the losses; {EACH} examples a GPU and step; validation at the end"
    )
    for name in asked.systems:
        began = time.monotonic()
        try:
            found[name] = {**measure(bench, name), **common}
        except Exception as error:  # noqa: BLE001 -- the others are worth measuring, and the row says why
            found[name] = {"failed": f"{type(error).__name__}: {error}"[-3000:], **common}
        said = {key: value for key, value in found[name].items() if key not in common}
        print(json.dumps({"name": name, "took_s": round(time.monotonic() - began), **said}), flush=True)
        write(to, with_ratios(found))
    if to is None:
        print(json.dumps(with_ratios(found)[-1]))


if __name__ == "__main__":
    main()
