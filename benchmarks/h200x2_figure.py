"""Draw the losses of a small model under every strategy, as h200x2.py has measured them.

python benchmarks/h200x2_figure.py       # results/h200x2.json -> docs/figures/h200x2_losses.svg
"""

import argparse
import json
from pathlib import Path

import panels

ROOT = Path(__file__).parent.parent
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")  # Okabe and Ito: told apart without colour vision
STYLES = ("-", "--", "-.", ":", (0, (1, 2)))
HEAD = "losses, "


def draw(curves: dict[str, dict[str, float]], target: Path) -> None:
    """A curve for each strategy (nats a token), and below the distance of each from one GPU."""
    alone = curves["one GPU"]
    with panels.losses(target, size=(7, 5.2), heights=(3, 2), steps_of="32 sentences") as (above, below):
        for (name, losses), colour, style in zip(curves.items(), COLOURS, STYLES, strict=False):
            steps = [int(step) for step in losses]
            look = {"color": colour, "linestyle": style, "linewidth": 1.5}
            above.plot(steps, list(losses.values()), label=name, **look)
            if losses is not alone:
                below.plot(steps, [loss - alone[step] for step, loss in losses.items()], **look)
        above.set_yscale("log")
        above.set_yticks([0.2, 0.5, 1, 2, 5], labels=["0.2", "0.5", "1", "2", "5"])
        above.minorticks_off()
        below.set_ylabel("less one GPU's")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "h200x2.json")
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "figures" / "h200x2_losses.svg")
    asked = parser.parse_args()
    rows = json.loads(asked.results.read_text(encoding="utf-8"))
    draw({row["name"].removeprefix(HEAD): row["losses"] for row in rows if row["name"].startswith(HEAD)}, asked.to)


if __name__ == "__main__":
    main()
