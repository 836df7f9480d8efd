"""Draw the losses of a small model under every strategy, as h200x2.py has measured them.

python benchmarks/h200x2_figure.py       # results/h200x2.json -> docs/figures/h200x2_losses.svg
"""

import argparse
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")  # Okabe and Ito: told apart without colour vision
STYLES = ("-", "--", "-.", ":", (0, (1, 2)))
HEAD = "losses, "


def draw(curves: dict[str, dict[str, float]], target: Path) -> None:
    """A curve for each strategy (nats a token), and below the distance of each from one GPU."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "finllm"  # the same figure is the same file
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(
        2, 1, sharex=True, figsize=(7, 5.2), height_ratios=[3, 2], layout="constrained"
    )
    alone = curves["one GPU"]
    for (name, losses), colour, style in zip(curves.items(), COLOURS, STYLES, strict=False):
        steps = [int(step) for step in losses]
        look = {"color": colour, "linestyle": style, "linewidth": 1.5}
        above.plot(steps, list(losses.values()), label=name, **look)
        if losses is not alone:
            below.plot(steps, [loss - alone[step] for step, loss in losses.items()], **look)
    above.set_yscale("log")
    above.set_yticks([0.2, 0.5, 1, 2, 5], labels=["0.2", "0.5", "1", "2", "5"])
    above.minorticks_off()
    above.set_ylabel("training loss (nats a token)")
    above.legend(frameon=False)
    below.axhline(0, color="#555555", linewidth=0.8)
    below.set_ylabel("less one GPU's")
    below.set_xlabel("optimizer step of 32 sentences")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "h200x2.json")
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "figures" / "h200x2_losses.svg")
    asked = parser.parse_args()
    rows = json.loads(asked.results.read_text(encoding="utf-8"))
    draw({row["name"].removeprefix(HEAD): row["losses"] for row in rows if row["name"].startswith(HEAD)}, asked.to)


if __name__ == "__main__":
    main()
