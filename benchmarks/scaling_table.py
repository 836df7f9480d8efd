"""Writes the table of docs/scaling.md: what the plan expects of 8, 64 and 512 GPUs, as `finllm launch --dry-run` does.

python benchmarks/scaling_table.py            # prints it
python benchmarks/scaling_table.py --write    # puts it into docs/scaling.md
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from finllm.errors import RecipeError
from finllm.plan import Plan
from launch import cluster, planning
from launch.cluster import Cluster

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- scaling -->", "<!-- /scaling -->"
EACH = 32
"""Examples of a GPU in a step."""
NODES = (1, 8, 64)
ETHERNET_GBIT = 100.0
SEVEN, SEVENTY = "sft/mistral-7b-v0.1-phrasebank", "sft/llama-3.1-8b-phrasebank model.name=meta-llama/Llama-3.1-70B"


@dataclass(frozen=True)
class Case:
    """A model, and how it is trained."""

    name: str
    recipe: str


CASES = (
    Case("7B, QLoRA", SEVEN),
    Case("7B, all weights", f"{SEVEN} lora=null model.quantization=none train.learning_rate=1e-5"),
    Case("70B, QLoRA", SEVENTY),
    Case("70B, LoRA on bf16", f"{SEVENTY} model.quantization=none"),
    Case("70B, all weights", f"{SEVENTY} lora=null model.quantization=none train.learning_rate=1e-5"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put it into docs/scaling.md")
    table = "\n".join(lines())
    if not parser.parse_args().write:
        print(table)
        return
    text = PAGE.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def lines() -> list[str]:
    """The table, in Markdown."""
    head = [
        "model",
        "GPUs",
        "strategy",
        "GiB each",
        "a step",
        "examples/s",
        "bound by",
        f"by {ETHERNET_GBIT:.0f} Gbit/s",
    ]
    found = [f"| {' | '.join(head)} |", "| --- | ---: | --- | ---: | ---: | ---: | --- | ---: |"]
    for case in CASES:
        for nodes in NODES:
            profile = cluster.load(ROOT / "slurm" / f"h100-{nodes}-nodes.yaml") if nodes > 1 else _one_node()
            cells = _cells(case, profile)
            found.append(
                f"| {case.name if nodes == NODES[0] else ''} | {nodes * profile.gpus_per_node} | {' | '.join(cells)} |"
            )
    return found


def _one_node() -> Cluster:
    return cluster.load(ROOT / "slurm" / "h100-8-nodes.yaml").model_copy(update={"nodes": 1})


def _cells(case: Case, profile: Cluster) -> list[str]:
    try:
        plan = plan_of(case, profile)
    except RecipeError as error:
        return ["", "", "", "", str(error).split(";")[0].split(" (")[0], ""]
    slow = plan_of(case, profile.model_copy(update={"network_gbit": ETHERNET_GBIT})).pace if profile.nodes > 1 else None
    assert plan.pace is not None
    assert plan.memory is not None
    return [
        f"{plan.strategy}{', checkpointing' if plan.gradient_checkpointing else ''}",
        f"{plan.memory.total:.0f}",
        f"{1000 * plan.pace.step_seconds:,.0f} ms",
        f"{plan.pace.examples_per_s:,.0f}",
        plan.pace.bound,
        f"{slow.examples_per_s:,.0f}" if slow else "",
    ]


def plan_of(case: Case, profile: Cluster) -> Plan:
    """The plan of a launch on the cluster, with as many examples a step as suit its size."""
    recipe, *overrides = case.recipe.split()
    batch = EACH * profile.nodes * profile.gpus_per_node
    usual = (f"train.global_batch={batch}", "train.optimizer=adamw")
    return planning.preview(recipe, (*overrides, *usual), None, Path("runs"), profile)


if __name__ == "__main__":
    main()
