"""Model cards: what a stranger must know of exported weights, from the run folder alone."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from finllm import licences
from finllm.models import Card
from finllm.plan import Plan
from finllm.prompts import Prompter
from finllm.recipe import Model, recipe_yaml
from finllm.run import Run
from finllm.scores import Interval, PartScores, Scores, Slice

EXAMPLE = "Apple beat revenue estimates by 3%"


USE = {
    "merged": """\
```python
from finllm import SentimentPredictor

predictor = SentimentPredictor("this/folder")  # or huggingface_hub.snapshot_download("its/name")
predictor.predict("{example}")
```

Any program that loads a causal language model with Transformers loads it too; it must ask in the words below.""",
    "adapter": """\
```python
from finllm import SentimentPredictor

predictor = SentimentPredictor("this/folder")  # or huggingface_hub.snapshot_download("its/name")
predictor.predict("{example}")
```

The base is loaded beside it, in the form that it was trained on ({form}). PEFT loads the adapter onto any form of the
base, but on another it gives other answers.""",
    "gguf": """\
llama.cpp and what is built on it load the `.gguf` file. FinLLM compares the log-probabilities of the three labels after
the prompt; a program that generates instead should do so greedily, one label, from the words below.""",
}
PAGE = """\
---
{metadata}
---

# {name}

Reads the sentiment of financial text: negative, neutral or positive. {base}, {method}; {content}.

## Use

{use}

The prompt, up to where the label begins:

```text
{prompt}
```

## Data and licences

{licences}

{counts}

## Results

Per cent, with 95 % intervals from {draws} bootstrap draws of whole groups of near twins.
{checked}

{results}

{weakest}

## Intended use

Research on, and tools for, reading financial news, filings and posts, where a person or a further check stands between
the label and a decision. {warning}

## Limits

* English sentences and short posts; longer texts are cut at {tokens} tokens, from the end.
* The label is the sentiment of the text as its annotators saw it. It is no forecast of a price, and no advice.
* One label for the whole text: of two companies in one sentence it does not say which is meant, unless a target is given.
* A probability is the model's own. How far it can be trusted is in the run's report.
* Figures hold for texts like those of the test part. Other markets, years, kinds of text and languages were not measured.

## Training

FinLLM, commit {commit}; {versions}.

```yaml
{recipe}```
"""


def markdown(
    run: Run,
    plan: Plan,
    scores: Scores,
    card: Card,
    form: Literal["merged", "adapter", "gguf"],
    tokenizer: Any,
    checked: str,
) -> str:
    """README.md of an exported model: the hub's metadata, then use, data, results, limits and training.

    `checked` says how the files were compared with the run.
    """
    from huggingface_hub import ModelCardData

    return PAGE.format(
        metadata=ModelCardData(**_metadata(run, plan, scores, card, form)).to_yaml(),
        name=run.name,
        base=licences.shown(card.base),
        method=_method(plan),
        content=_content(card, plan, form),
        use=USE[form].format(example=EXAMPLE, form=_form(card.base)),
        prompt=Prompter(tokenizer, card.prompt).string(EXAMPLE),
        licences=_table(("what", "licence", "source"), licences.rows(plan, card)),
        counts=_counts(plan),
        draws=f"{scores.draws:,}",
        checked=checked,
        results=_table(("texts", "system", "n", "accuracy", "macro-F1", "weighted F1"), _results(scores, card.base)),
        weakest=_weakest(scores),
        warning=licences.warning(plan),
        tokens=card.prompt.max_tokens,
        commit=card.commit or "unknown",
        versions=", ".join(f"{name} {version}" for name, version in plan.versions.items()),
        recipe=_recipe(plan),
    )


def _content(card: Card, plan: Plan, form: str) -> str:
    """What the files hold, in words."""
    if form == "adapter":
        return "the adapter alone"
    if card.trained == "all weights":
        return f"its weights in {plan.dtype}"
    unpacked = "" if card.base.quantization == "none" else f" ({card.base.quantization}, unpacked once)"
    return f"the adapter merged in {plan.dtype} into the base that it was trained on{unpacked}"


def _metadata(run: Run, plan: Plan, scores: Scores, card: Card, form: str) -> dict[str, Any]:
    from huggingface_hub import EvalResult

    figures = [
        EvalResult(
            task_type="text-classification",
            dataset_type=licences.DATA.get(part.dataset, licences.Source(None, "")).hub_id or part.dataset,
            dataset_name=part.dataset,
            dataset_split=part.part,
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for part in scores.parts
        for kind, name, value in (
            ("accuracy", "accuracy", part.systems["tuned"].accuracy.value),
            ("f1", "macro-F1", part.systems["tuned"].macro_f1.value),
        )
    ]
    hub_ids = [
        source.hub_id
        for spec in licences.trained_on(plan)
        if (source := licences.DATA.get(spec.name)) and source.hub_id
    ]
    return {
        "language": "en",
        "base_model": None if Path(card.base.name).is_dir() else licences.base_id(card.base),
        "datasets": hub_ids or None,
        "library_name": {"merged": "transformers", "adapter": "peft", "gguf": "gguf"}[form],
        "pipeline_tag": "text-classification",
        "tags": ["finance", "sentiment-analysis", "finllm", *(["lora"] if form == "adapter" else [])],
        "model_name": run.name,
        "eval_results": figures,
        **licences.licence(plan, card),
    }


def _counts(plan: Plan) -> str:
    if plan.rows is None:
        return "The number of texts was not counted."
    return f"{plan.rows.train:,} texts for training, {plan.rows.validation:,} for validation, {plan.rows.test:,} for the test."


def _results(scores: Scores, base: Model) -> Iterable[tuple[str, ...]]:
    for part in scores.parts:
        for system in (one for one in scores.systems if one.key in part.systems):
            found = part.systems[system.key]
            figures = (_percent(found.accuracy), _percent(found.macro_f1), _percent(found.weighted_f1))
            name = system.name.replace(base.name, licences.shown(base))
            yield f"{part.dataset}, {part.part}", name, f"{part.rows:,}", *figures


def _weakest(scores: Scores) -> str:
    """In which kinds of text it is least often right."""
    lines = []
    for part in scores.parts:
        if part.slices:
            worst = min(part.slices, key=lambda one: one.systems["tuned"].accuracy.value)
            lines.append(f"{_where(part)}, it is least often right where {_kind(worst)}.")
    return "\n".join(lines) or "No kinds of text were told apart."


def _where(part: PartScores) -> str:
    return f"In {part.dataset}, {part.part}"


def _kind(one: Slice) -> str:
    unit = " %" if one.by == "agreement" else ""
    return f"{one.by} is {one.value}{unit}: {_percent(one.systems['tuned'].accuracy)} accuracy, {one.rows:,} texts"


def _method(plan: Plan) -> str:
    assert plan.recipe.train is not None, "only trained runs are exported"
    lora, method = plan.recipe.lora, plan.recipe.train.method.upper()
    if lora is None:
        return f"all weights fine-tuned ({method})"
    return f"fine-tuned by LoRA of rank {lora.rank} ({method})"


def _form(base: Model) -> str:
    return "not quantised" if base.quantization == "none" else base.quantization


def _recipe(plan: Plan) -> str:
    """The recipe without the folders of the machine that it ran on."""
    text = recipe_yaml(plan.recipe)
    places = [plan.recipe.model.name, *(str(getattr(spec, "path", None)) for spec in plan.recipe.data)]
    for place in places:
        if Path(place).is_absolute():
            text = text.replace(place, Path(place).name)
    return text


def _percent(figure: Interval) -> str:
    return f"{100 * figure.value:.1f} [{100 * figure.low:.1f}, {100 * figure.high:.1f}]"


def _table(head: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    rows = [head, tuple("---" for _ in head), *lines]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows
    )
