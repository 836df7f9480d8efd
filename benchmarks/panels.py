"""Two panels of losses, one above the other, as a figure of the documentation."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def losses(
    target: Path, *, size: tuple[float, float], heights: tuple[int, int], steps_of: str
) -> Iterator[tuple[Any, Any]]:
    """Axes for losses (nats a token) and for differences of them; the figure is written when they are drawn."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "finllm"  # the same figure is the same file
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=size, height_ratios=heights, layout="constrained")
    below.axhline(0, color="#555555", linewidth=0.8)
    yield above, below
    above.set_ylabel("training loss (nats a token)")
    above.legend(frameon=False)
    below.set_xlabel(f"optimizer step of {steps_of}")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None})
