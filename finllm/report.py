"""The report of one run: a pure function of its scores, its plan, and what happened on the way."""

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from finllm.example import LABELS, SPLITS
from finllm.memory import described
from finllm.plan import Plan, Rows
from finllm.recipe import Recipe
from finllm.scores import Interval, Metrics, Paired, PartScores, Scores, Slice, System

if TYPE_CHECKING:
    from rich.table import Table

HOW_TO_READ = (
    "Brackets hold 95 % intervals: percentiles of {draws:,} bootstrap draws (seed {seed}) of whole groups of near twins. "
    "Macro-F1 is the mean F1 of the classes that occur, weighted F1 the mean weighted by their texts. A difference is measured on the same rows and the same draws for both systems, and is "
    "*not decided* where its interval holds 0. Intervals are not corrected for the number of comparisons, and say "
    "nothing about other training seeds or other data."
)
NO_WIDTH = (
    "An interval without width belongs to a system that was right, or wrong, on every row: the draws cannot differ "
    "then, and the interval understates what is not known."
)

SHORTEST_SECONDS = 0.05
"""Below this a pace means nothing."""


@dataclass(frozen=True)
class Facts:
    """What neither the plan nor the scores know."""

    rows: Mapping[str, Rows] = field(default_factory=dict)
    """Examples of each data set in each part, as they were used."""
    training: Mapping[str, str] = field(default_factory=dict)
    """What happened in training, by name, in words: `steps: 120 of 120`."""
    notes: Sequence[str] = ()
    """Sentences about the data, such as which rows were left out."""


def markdown(scores: Scores, plan: Plan, facts: Facts) -> str:
    """The text of report.md; its links are relative to the run folder."""
    blocks = [
        f"# {plan.name}",
        *([plan.recipe.purpose] if plan.recipe.purpose else []),
        *_verdicts(scores),
        "## Results",
        "Per cent, with 95 % intervals in brackets ([how to read them](#how-to-read-the-figures)).",
        *(block for part in scores.parts for block in _part(part, scores)),
        "## Speed",
        _rows(("system", "texts", "seconds", "texts a second"), [_speed(s) for s in scores.systems]),
        "## Settings",
        _rows(("setting", "value"), _settings(plan).items()),
        "## Data",
        _data(plan, facts.rows),
        *facts.notes,
        *(["## Training", _rows(("what", "value"), facts.training.items())] if facts.training else []),
        "## To repeat it",
        _repeat(plan),
        "## How to read the figures",
        HOW_TO_READ.format(draws=scores.draws, seed=scores.seed),
        *([NO_WIDTH] if _without_width(scores) else []),
    ]
    return "\n\n".join(blocks) + "\n"


def table(scores: Scores) -> "Table":
    """Every system on every part, for a terminal of 80 columns."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(
        box=None, pad_edge=False, header_style="bold", caption="per cent [95 % interval]", caption_justify="left"
    )
    for column in ("", "accuracy", "macro-F1", "weighted F1"):
        shown.add_column(column, overflow="fold")
    for part in scores.parts:
        shown.add_row(Text(f"{part.dataset} {part.part} ({part.rows:,})"), style="bold")
        for key, m in part.systems.items():
            figures = (_share(figure).replace(", ", ",") for figure in (m.accuracy, m.macro_f1, m.weighted_f1))
            shown.add_row(*map(Text, (f"  {key}", *figures)))
    return shown


def verdict(part: PartScores, names: Mapping[str, str]) -> str:
    """How the first system compares in accuracy with every other one on a part, in one sentence."""
    first, figures = next(iter(part.systems.items()))
    said = f"{part.dataset}, {part.part} ({_texts(part.rows)}): {names[first]} has {_with(figures.accuracy, ' % accuracy')}"
    return f"{said}; it {'; '.join(_compared(p, names) for p in part.paired)}." if part.paired else f"{said}."


def _verdicts(scores: Scores) -> list[str]:
    names = {system.key: system.name for system in scores.systems}
    sentences = [verdict(part, names) for part in scores.parts]
    return [f"**{s}**" for s in sentences] if len(sentences) == 1 else ["\n".join(f"- **{s}**" for s in sentences)]


def _compared(pair: Paired, names: Mapping[str, str]) -> str:
    other, by = names[pair.second], pair.accuracy
    if not by.decided:
        return f"is not decided against {other} ({_points(by, ' points')})"
    if by.value > 0:
        return f"beats {other} by {_with(by, ' points')}"
    return f"is worse than {other} by {_with(Interval(value=-by.value, low=-by.high, high=-by.low), ' points')}"


def _part(part: PartScores, scores: Scores) -> Iterable[str]:
    names = {system.key: f"{system.key}: {system.name}" for system in scores.systems}
    groups = "" if part.clusters == part.rows else f" in {part.clusters:,} independent groups"
    yield f"### {part.dataset}, {part.part}: {_texts(part.rows)}{groups}"
    yield _rows(
        ("system", "accuracy", "macro-F1", "weighted F1"),
        [
            (names[key], _share(m.accuracy), _share(m.macro_f1), _share(m.weighted_f1))
            for key, m in part.systems.items()
        ],
    )
    if part.paired:
        columns = (f"{part.paired[0].first} less ...", "accuracy, points", "", "macro-F1, points", "")
        yield _rows(columns, [_difference(pair) for pair in part.paired])
    cut = {key: m.truncated for key, m in part.systems.items() if m.truncated}
    if cut:
        yield "Texts cut to fit the model: " + ", ".join(f"{name} {count}" for name, count in cut.items()) + "."
    if part.slices:
        yield from _slices(part.slices)
    yield "Per class, F1 (precision / recall):"
    yield _rows(("class", "texts", *part.systems), _classes(part))
    yield "Confusion, texts by gold label and answer:"
    yield _rows(("system", "gold", *LABELS), _confusion(part))


def _difference(pair: Paired) -> tuple[str, ...]:
    figures = (pair.accuracy, pair.macro_f1)
    return (pair.second, *(cell for figure in figures for cell in (_points(figure), _decision(figure))))


def _decision(difference: Interval) -> str:
    if not difference.decided:
        return "not decided"
    return "better" if difference.value > 0 else "worse"


def _slices(slices: Sequence[Slice]) -> Iterable[str]:
    """Two tables: accuracy and macro-F1 of every system on every slice."""
    figures: dict[str, Callable[[Metrics], Interval]] = {
        "Accuracy": lambda m: m.accuracy,
        "Macro-F1": lambda m: m.macro_f1,
    }
    for title, figure in figures.items():
        yield f"{title} by kind of text:"
        lines = [(_slice_name(s), f"{s.rows:,}", *(_share(figure(m)) for m in s.systems.values())) for s in slices]
        yield _rows(("kind", "texts", *slices[0].systems), lines)


def _slice_name(one: Slice) -> str:
    if one.by == "agreement":
        return f"agreement {one.value} %" + (" (AllAgree)" if one.value == "100" else "")
    return f"{one.value} signals" if one.by == "signals" else f"{one.by} {one.value}"


def _classes(part: PartScores) -> Iterable[tuple[str, ...]]:
    some = next(iter(part.systems.values()))
    for label in LABELS:
        each = [m.per_class[label] for m in part.systems.values()]
        cells = (f"{_percent(c.f1)} ({_percent(c.precision)} / {_percent(c.recall)})" for c in each)
        yield (label, f"{some.per_class[label].support:,}", *cells)


def _confusion(part: PartScores) -> Iterable[tuple[str, ...]]:
    for key, metrics in part.systems.items():
        for number, (label, line) in enumerate(zip(LABELS, metrics.confusion, strict=True)):
            yield (key if number == 0 else "", label, *map(str, line))


def _speed(system: System) -> tuple[str, ...]:
    pace = f"{system.texts_per_second:,.0f}" if system.seconds >= SHORTEST_SECONDS else ""
    return system.key, f"{system.texts:,}", f"{system.seconds:.1f}", pace


def _settings(plan: Plan) -> dict[str, str]:
    """What was asked for and what was decided, in words."""
    recipe = plan.recipe
    model = recipe.model
    revision = f" at {model.revision}" if model.revision else ""
    quantized = "" if model.quantization == "none" else f", {model.quantization}"
    unpacked = f", dequantised once to {plan.dtype}" if plan.dequantize else ""
    return {
        "model": f"{model.name}{revision}{quantized}{unpacked}",
        "prompt": f"{recipe.prompt.template}, at most {recipe.prompt.max_tokens} tokens: {recipe.prompt.instruction}",
        **_method(plan, recipe),
        "device": f"{plan.gpu or plan.device}, {_processes(plan)}, {plan.dtype}",
        "memory, estimated": "not known before loading" if plan.memory is None else described(plan.memory, plan.device),
    }


def _method(plan: Plan, recipe: Recipe) -> dict[str, str]:
    train, lora = recipe.train, recipe.lora
    if train is None:
        return {"method": "none: the model as it is"}
    scale = "sqrt(rank)" if lora and lora.rank_stabilized else "rank"
    return {
        "method": train.method,
        "trained": "all weights"
        if lora is None
        else f"LoRA, rank {lora.rank}, alpha {lora.alpha:g} over {scale}, dropout {lora.dropout:g}, on "
        + (lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets)),
        "length": f"{plan.steps if plan.steps is not None else '?'} steps" + f", {train.epochs:g} epochs",
        "batch": f"{train.global_batch} = {_processes(plan)} x {plan.micro_batch} x {plan.accumulation} accumulated; "
        f"gradient checkpointing {'on' if plan.gradient_checkpointing else 'off'}; "
        f"shared prefix {'on' if plan.shared_prefix else 'off'}",
        "learning rate": f"{train.learning_rate:g}, {train.schedule}, warm-up {100 * train.warmup_share:g} %",
        "optimizer": f"{train.optimizer}, weight decay {train.weight_decay:g}, gradient norm at most {train.max_grad_norm:g}",
        "seed": str(train.seed),
    }


def _processes(plan: Plan) -> str:
    return f"{plan.processes} process{'' if plan.processes == 1 else 'es'}"


def _data(plan: Plan, rows: Mapping[str, Rows]) -> str:
    """Each data set as it was asked for, and its examples where they were counted."""
    lines = []
    for spec in plan.recipe.data:
        asked = spec.model_dump(mode="json", exclude={"alias"}, exclude_none=True)
        told = "; ".join(f"{key} {', '.join(v) if isinstance(v, list) else v}" for key, v in asked.items())
        counted = rows[spec.title].model_dump() if spec.title in rows else {}
        lines.append((spec.title, *(f"{counted[part]:,}" if counted else "" for part in SPLITS), told))
    return _rows(("data set", *SPLITS, "as asked"), lines)


def _repeat(plan: Plan) -> str:
    command = shlex.join(["finllm", "launch", plan.source, *plan.overrides])
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    return (
        f"```\n{command}\n```\n\n"
        f"Commit {plan.commit or 'unknown'}; planned {plan.created}; {versions}.\n\n"
        "Every answer with its probabilities stands in [predictions/](predictions/), every figure in "
        "[scores.json](scores.json), the resolved recipe in [recipe.yaml](recipe.yaml)."
    )


def _without_width(scores: Scores) -> bool:
    return any(m.accuracy.low == m.accuracy.high for part in scores.parts for m in part.systems.values())


def _texts(count: int) -> str:
    return f"{count:,} text{'' if count == 1 else 's'}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _share(figure: Interval) -> str:
    """A share in per cent with its interval."""
    return _with(figure, "")


def _with(figure: Interval, unit: str) -> str:
    return f"{_percent(figure.value)}{unit} [{_percent(figure.low)}, {_percent(figure.high)}]"


def _points(difference: Interval, unit: str = "") -> str:
    """A difference of shares in percentage points with its interval."""
    return f"{100 * difference.value:+.1f}{unit} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def _rows(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns of figures are aligned to the right."""
    body = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    right = [all(line[i][:1] in "0123456789+-" for line in body if line[i]) for i in range(len(head))]
    rule = ["---:" if is_right else "---" for is_right in right]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *body])
