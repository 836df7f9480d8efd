"""Write README's table of speeds from the rows in benchmarks/results.

python benchmarks/table.py           # between <!-- speed --> and <!-- /speed -->
python benchmarks/table.py --check   # exit 1 if README differs from what would be written
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- speed -->", "<!-- /speed -->"
HEAD = ("where", "what", "examples/s", "peak GiB", "against: its examples/s", "times as fast", "limit")


def share(value: float) -> str:
    """Of the speed that the processor's arithmetic allows."""
    return f"{value:.0%} reached"


def times(value: float) -> str:
    """How often the peer's arithmetic contains ours."""
    return f"{number(value)} times"


FILES: dict[str, tuple[str, Callable[[float], str]]] = {
    "h200_sft.json": ("{gpu}, training", share),
    "h200_dpo.json": ("{gpu}, DPO, pairs", share),
    "h200_scoring.json": ("{gpu}, scoring", share),
    "h200x2.json": ("2 x {gpu}", share),
    "cpu.json": ("CPU", times),
}
"""What was measured, and what a row's `limit_ratio` means there."""


def table(results: Path) -> str:
    """A line for each row of the files that are there, but for systems that failed to run."""
    lines = ["| " + " | ".join(HEAD) + " |", "| --- | --- | ---: | ---: | --- | ---: | ---: |"]
    for name, (where, told) in FILES.items():
        if (results / name).is_file():
            lines += of_file(json.loads((results / name).read_text(encoding="utf-8")), where, told)
    return "\n".join(lines)


def of_file(rows: list[dict[str, Any]], where: str, told: Callable[[float], str]) -> list[str]:
    """Its rows; a peer stands in the row that is compared with it, and a row with `against` in its name for one without."""
    speeds = {row["name"]: speed(row) for row in rows if speed(row)}
    peers = {row.get("peer") for row in rows} | {
        row["name"].partition(" against ")[0] for row in rows if " against " in row["name"]
    }
    return [
        line(row, where, told, speeds) for row in rows if speed(row) and (row["name"] not in peers or row.get("ratio"))
    ]


def speed(row: dict[str, Any]) -> float:
    """Examples or pairs a second; 0 where nothing of the kind was measured."""
    return float(row.get("examples_per_s") or row.get("pairs_per_s") or 0)


def line(row: dict[str, Any], where: str, told: Callable[[float], str], speeds: dict[str, float]) -> str:
    ratio = number(row["ratio"]) if row.get("ratio") else ""
    limit = told(row["limit_ratio"]) if row.get("limit_ratio") else ""
    peak = number(row["peak_gib"]) if row.get("peak_gib") else ""
    peer = row["peer"] if row.get("ratio") else ""
    against = f"{peer}: {number(speeds[peer])}" if peer in speeds else peer
    name = row["name"].partition(" against ")[0]
    return "| " + " | ".join([where.format(gpu=gpu(row)), name, number(speed(row)), peak, against, ratio, limit]) + " |"


def gpu(row: dict[str, Any]) -> str:
    """`H200` of `NVIDIA H200, 580.159.04, 700.00 W`."""
    return str(row.get("hardware", "")).partition(",")[0].removeprefix("NVIDIA ").partition(" ")[0]


def number(value: float) -> str:
    """Three figures."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def rewritten(text: str, made: str) -> str:
    """README with the table between its marks; exits where they are not there once each and in order."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"README has no {BEGIN} followed by {END}")
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    asked = parser.parse_args()
    text = asked.readme.read_text(encoding="utf-8")
    wanted = rewritten(text, table(asked.results))
    if asked.check:
        sys.exit(0 if wanted == text else f"{asked.readme} differs from the results; run benchmarks/table.py")
    asked.readme.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
