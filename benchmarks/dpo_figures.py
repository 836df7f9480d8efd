"""What the test part says of the systems of `dpo_phrasebank.py`: figures of each, and paired differences, by kind of text."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from finllm import calibration, metrics, predictions, seeds
from finllm.assessment import gold_of, groups, predicted_of, probabilities_of
from finllm.metrics import interval_of
from finllm.predictions import Prediction
from finllm.run import Run

DRAWS, SEED = 2000, 0
SLICES: dict[str, Callable[[Prediction], bool]] = {
    "50Agree": lambda p: p.dataset == "phrasebank",
    "band 100": lambda p: p.agreement == "100",
    "band 75-99": lambda p: p.agreement == "75-99",
    "band 66-75": lambda p: p.agreement == "66-75",
    "band 50-66": lambda p: p.agreement == "50-66",
    "mixed signals": lambda p: p.dataset == "sample",
}
BySeed = Mapping[str, Run]
"""The runs of a system by their training seed."""
Answered = list[list[Prediction]]
"""Answers to the same rows, of each seed's run."""


def answers(run: Run) -> list[Prediction]:
    """All test answers of a run."""
    paths = sorted(run.predictions.glob("*.test.tuned.jsonl"))
    return [prediction for path in paths for prediction in predictions.read(path)]


def figures(rows: Sequence[Prediction]) -> dict[str, float]:
    """What is reported of one run on one kind of text: shares, and NLL in nats."""
    gold, shares, predicted = gold_of(rows), probabilities_of(rows), predicted_of(rows)
    return {
        "accuracy": metrics.accuracy(gold, predicted),
        "macro_f1": metrics.macro_f1(gold, predicted),
        "nll": float(calibration.nll(shares, gold).mean()),
        "ece": calibration.ece(shares, gold),
    }


def differences(first: Answered, second: Answered) -> dict[str, Any]:
    """The first system less the second: means over seeds, 95 % intervals over seeds and groups of near twins.

    Both have the same rows in each draw, and the same seeds are paired in `by_seed`.
    """
    ids = [[p.id for p in run] for run in (*first, *second)]
    assert all(one == ids[0] for one in ids), "the runs answered other rows"
    gold, twins = gold_of(first[0]), groups(first[0])
    mine, others = ([predicted_of(run) for run in system] for system in (first, second))
    found = seeds.difference(gold, mine, others, twins, DRAWS, SEED)
    told: dict[str, Any] = {
        name: {"value": found[name].value, "low": found[name].low, "high": found[name].high}
        for name in ("accuracy", "macro_f1")
    }
    each = [[figures(run) for run in system] for system in (first, second)]
    for name in ("nll", "ece"):
        drawn = [_drawn(system, name) for system in (first, second)]
        low, high = interval_of(drawn[0] - drawn[1])
        means = [statistics.fmean(run[name] for run in system) for system in each]
        told[name] = {"value": means[0] - means[1], "low": low, "high": high}
    told["by_seed"] = {name: [one[name] - other[name] for one, other in zip(*each, strict=True)] for name in each[0][0]}
    return {"n": len(gold), "seeds": len(first), **told}


def _drawn(system: Answered, name: str) -> Any:
    """A figure's mean over seeds in each draw."""
    drawn = [calibration.drawn(probabilities_of(run), gold_of(run), groups(run), DRAWS, SEED)[name] for run in system]
    return seeds.redrawn(np.stack(drawn, axis=1), SEED)


def rows(systems: Mapping[str, BySeed], pairs: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Each system on each kind of text, then the differences of those pairs, on the seeds that both have."""
    found = {name: {seed: answers(run) for seed, run in runs.items()} for name, runs in systems.items()}
    for title, wanted in SLICES.items():
        cut = {
            name: {seed: [p for p in run if wanted(p)] for seed, run in runs.items()} for name, runs in found.items()
        }
        for name, runs in cut.items():
            if not any(runs.values()):
                continue
            each = [figures(run) for run in runs.values()]
            spread = {key: statistics.stdev(f[key] for f in each) if len(each) > 1 else 0.0 for key in each[0]}
            mean = {key: statistics.fmean(f[key] for f in each) for key in each[0]}
            count = len(next(iter(runs.values())))
            yield {"kind": "test", "slice": title, "system": name, "n": count, "seeds": [*runs], "mean": mean,
                   "deviation": spread}  # fmt: skip
        for one, other in pairs:
            both = [seed for seed, found_ in cut.get(one, {}).items() if found_ and seed in cut.get(other, {})]
            if both:
                apart = differences([cut[one][seed] for seed in both], [cut[other][seed] for seed in both])
                yield {"kind": "difference", "slice": title, "system": one, "less": other, **apart}
