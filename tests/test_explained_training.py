"""Training on labels and explanations: the weights do what they say, and without explanations nothing has changed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finllm.answer import AnswerTokens
from finllm.data.sample import Sample
from finllm.errors import RecipeError, RunError
from finllm.journal import history
from finllm.lengths import OPENING, largest_batch, lengths_of
from finllm.machine import Gpu, Machine
from finllm.methods import Explanations
from finllm.plan import decide
from finllm.prompts import Prompter
from finllm.recipe import Prompt, Recipe, load
from finllm.run import Run
from finllm.shared_prefix import IGNORED, attending
from finllm.training.batches import NO_ROW, Row, Rows, encode, pad, stream
from finllm.training.sft import _sum_of_losses

EXAMPLES = [e for e in Sample(name="sample").read() if e.split == "train"][:12]
WEIGHTS = Explanations(label_weight=2.0, explanation_weight=0.25, max_tokens=60)


def recipe_with(explanations: Explanations | None, **train: Any) -> Recipe:
    spec = {"method": "sft", "explanations": explanations, **train}
    return Recipe.model_validate({"model": "smollm2-135m", "data": "sample", "train": spec})


@pytest.fixture(scope="module")
def prompter(tiny_model: Path) -> Prompter:
    return Prompter(AutoTokenizer.from_pretrained(tiny_model), Prompt())


@pytest.fixture(scope="module")
def rows(prompter: Prompter) -> list[Row]:
    found = encode(EXAMPLES, prompter, recipe_with(WEIGHTS))
    assert {example.explanation is None for example in EXAMPLES} == {True, False}
    return found


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model)


def test_prompt_and_label_are_those_of_training_without_explanations(prompter: Prompter, rows: list[Row]) -> None:
    """So that labels are scored the same; only what follows a label is new, and only where there is an explanation."""
    bare = encode(EXAMPLES, prompter)
    assert encode(EXAMPLES, prompter, recipe_with(None)) == bare
    assert all(row.weights is None for row in bare)
    tokens = AnswerTokens(prompter)
    for example, plain, row in zip(EXAMPLES, bare, rows, strict=True):
        label = list(prompter.answers[example.label])
        assert row.prompt == plain.prompt
        assert row.answer[: len(label)] == label
        assert row.weights is not None
        if example.explanation is None:
            assert (row.answer, row.weights) == (plain.answer, (2.0,) * len(plain.answer))
        else:
            given, words = tokens.openings[example.label], tokens.ending(example.explanation, 60)
            assert row.answer == [*label, *given, *words]
            assert row.weights == (*[2.0] * len(label), *[0.0] * len(given), *[0.25] * len(words))


def by_hand(model: Any, rows: list[Row]) -> torch.Tensor:
    """The weighted sum of losses, one row and one token after the other."""
    total = torch.zeros(())
    for row in rows:
        ids = torch.tensor([[*row.prompt, *row.answer]])
        log_p = model(ids, use_cache=False).logits[0].float().log_softmax(-1)
        for place, (token, weight) in enumerate(zip(row.answer, row.weights or (), strict=True)):
            total = total - weight * log_p[len(row.prompt) + place - 1, token]
    return total


def gradients(model: Any, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_both_forms_of_a_batch_have_the_weighted_loss_and_its_gradients(model: Any, rows: list[Row]) -> None:
    """Padded rows through TRL's head, and a stream through ours: against sums by hand, relative error below 1e-5."""
    from trl.trainer.utils import add_fused_lm_head

    expected = by_hand(model, rows)
    exact = gradients(model, expected)
    original = model.forward
    add_fused_lm_head(model)
    try:
        for make in (pad, stream):
            batch = make(rows)
            meta, weights = batch.pop("meta"), batch["labels"][:, 1:].ne(IGNORED).sum()
            assert len(meta["weights"]) == weights  # a weight for each learnt token, and no token without
            with attending(model, streams=make is stream):
                found = _sum_of_losses(model, dict(batch), meta["weights"])
                assert found.item() == pytest.approx(expected.item(), rel=1e-5)
                error = (gradients(model, found) - exact).norm() / exact.norm()
                assert error < 1e-5
                unweighted = _sum_of_losses(model, dict(batch), None)
                assert unweighted.item() != pytest.approx(expected.item(), rel=1e-2)  # the test would see it
    finally:
        model.forward = original


def test_a_pass_without_rows_and_rows_without_weights_are_as_before(rows: list[Row]) -> None:
    """No weights in their batches, so that today's loss is taken."""
    for make in (pad, stream):
        assert "weights" not in make([None])["meta"]
        assert "weights" not in make([replace(row, weights=None) for row in rows])["meta"]
    assert Rows(rows)[NO_ROW] is None


RECIPE = """
model: {model}
data: {{name: table, path: {data}, split: split, explanation: why, parts: [train]}}
lora: {{rank: 4, alpha: 8}}
train: {{method: sft, epochs: 1, global_batch: 6, learning_rate: 1e-2}}
tracking: {{wandb: disabled}}
"""


@pytest.fixture(scope="module")
def losses(train: Callable[..., Run], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trains on the examples with some settings; returns the loss of each of the two steps."""
    folder = tmp_path_factory.mktemp("weighted")
    kept = [
        {"text": e.text, "label": e.label, "split": "train", "why": e.explanation if i % 2 else None}
        for i, e in enumerate(Sample(name="sample", kind="mixed").read()[:11])
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    path = folder / "weighted.yaml"
    path.write_text(RECIPE.format(model=tiny_model, data=folder / "rows.jsonl"))

    def found(*overrides: str) -> list[float]:
        run = train(path, folder / "runs", *overrides)
        return [row.numbers["train/loss"] for row in history(run) if "train/loss" in row.numbers]

    return found


def test_micro_batches_and_streams_do_not_change_the_weighted_loss(losses: Any) -> None:
    """The weights of the whole step divide its loss, also where a pass has fewer rows or none."""
    explained = "train.explanations={explanation_weight: 0.5}"
    whole = losses(explained, "train.micro_batch=6", "train.shared_prefix=off")
    assert len(whole) == 2
    for size, sharing in ((6, "on"), (3, "on"), (2, "off"), (1, "off")):
        again = losses(explained, f"train.micro_batch={size}", f"train.shared_prefix={sharing}")
        assert again == pytest.approx(whole, rel=1e-4), (size, sharing)


def test_weights_say_what_counts(losses: Any) -> None:
    """Only their ratio matters; the first step's loss lies between that of labels and that of explanations."""
    one = losses("train.explanations={label_weight: 1, explanation_weight: 0.5}")
    assert losses("train.explanations={label_weight: 4, explanation_weight: 2}") == pytest.approx(one, rel=1e-4)
    of_labels = losses("train.explanations={label_weight: 1, explanation_weight: 1e-6}")[0]
    of_words = losses("train.explanations={label_weight: 1e-6, explanation_weight: 1}")[0]
    assert min(of_labels, of_words) < one[0] < max(of_labels, of_words)


def test_explanations_that_nobody_wrote_are_refused(prompter: Prompter) -> None:
    """The message says where there are some."""
    bare = [replace(example, explanation=None) for example in EXAMPLES]
    with pytest.raises(RunError, match="no training example has an explanation"):
        encode(bare, prompter, recipe_with(WEIGHTS))


def test_hand_written_passes_are_off_or_refused_with_their_reason(tmp_path: Path) -> None:
    """They know no weights; without explanations they are on as before."""
    gpu = Machine(gpus=(Gpu("H200", 139.0, 9.0),), cores=8, memory_gib=64.0)

    def planned(recipe: Recipe) -> Any:
        return decide(recipe, here=gpu, rows=None, folder=tmp_path, source="x.yaml")

    plan = planned(recipe_with(WEIGHTS))
    assert not plan.hand_written
    assert any("no weights of tokens" in reason for reason in plan.reasons)
    assert planned(recipe_with(None)).hand_written
    with pytest.raises(RecipeError, match=r"hand_written is on, .* no weights of tokens"):
        planned(recipe_with(WEIGHTS, hand_written="on"))


def test_a_plan_counts_explanations() -> None:
    """About 22 tokens of words and the opening, at most as many as are learnt; rows and their answers grow by them."""
    examples = [e for e in Sample(name="sample").read() if e.explanation]
    bare, known = lengths_of(examples), lengths_of(examples, WEIGHTS)
    assert bare is not None
    assert known is not None
    assert known.mean - bare.mean == pytest.approx(OPENING + 22, abs=8)
    assert known.explanation <= OPENING + WEIGHTS.max_tokens
    assert lengths_of(examples[:0], WEIGHTS) is None
    plain, more = (largest_batch(Prompt(), some, rows=8, shares=True) for some in (bare, known))
    assert more.tokens > plain.tokens
    assert (plain.answers, more.answers) == (16, 16 + 8 * known.explanation)
    unknown = largest_batch(Prompt(), None, rows=8, shares=False, explained=WEIGHTS)
    assert unknown.longest == Prompt().max_tokens + OPENING + WEIGHTS.max_tokens


def test_a_recipe_says_weights_or_nothing(tmp_path: Path) -> None:
    """`{}` takes the usual weights; a weight of 0 or below is refused."""
    path = tmp_path / "x.yaml"
    path.write_text("model: smollm2-135m\ndata: sample\ntrain: {method: sft, explanations: {}}\n")
    assert load(path).explanations == Explanations()
    assert recipe_with(None).explanations is None
    with pytest.raises(RecipeError, match="explanation_weight"):
        load(path, ["train.explanations={explanation_weight: 0}"])
