"""Explanations under constraint: does every answer parse, does its label stay the scorer's, and what does it cost.

    python benchmarks/explain.py                                  # CPU: SmolLM2-135M, and a tiny model for 1,000 answers
    python benchmarks/explain.py --model runs/NAME                # any run, adapter or model
    python benchmarks/explain.py --model /tmp/7b --tokenizer ~/.cache/finllm/smollm2-135m   # GPU: a 7B shape

Texts are PhraseBank's validation part (and its training part, where that is too small); none of the test part. All
systems take turns in one process at the same token limit, the first turn uncounted; on a CPU their processor time counts:

    ours            finllm's explain behind the labels: prefix once, batched, constrained, rows that are done taken out
    generate        Transformers' generate on the same prompts, left-padded, in the same batches, no constraint
    one by one      the same for each prompt alone: the usual loop; on fewer texts, since it is slow

`overhead` is 1 - ours / generate in written tokens a second: at most 0.15 is wanted. `constraint_share` is the part of
our seconds that went into masks and bookkeeping (on a GPU part of it passes while the device computes). Writes
benchmarks/results/explain_DEVICE.json.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import conditions
import torch

from finllm import SentimentPredictor, explaining, scoring
from finllm.answer import AnswerTokens
from finllm.data.phrasebank import PhraseBank
from finllm.example import LABELS
from finllm.explaining import Explainer, greedy, padded
from finllm.models import quiet_libraries

HERE = Path(__file__).parent
MOST_OVERHEAD = 0.15
PACKAGES = ("torch", "transformers", "peft", "llguidance")


def texts_of(count: int) -> list[str]:
    """The first validation texts of PhraseBank, then training texts."""
    examples = PhraseBank(name="phrasebank").read()
    found = [e.text for part in ("validation", "train") for e in examples if e.split == part]
    return found[:count]


class Timed:
    """Seconds spent in calls of a function."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def calls(self, owner: Any) -> Iterator[None]:
        """While open, calls of the class's instances are counted."""
        plain, clock = owner.__call__, time.perf_counter if torch.cuda.is_available() else time.process_time

        def counted(*given: Any, **named: Any) -> Any:
            began = clock()
            answer = plain(*given, **named)
            self.seconds += clock() - began
            return answer

        owner.__call__ = counted
        try:
            yield
        finally:
            owner.__call__ = plain


class Bench:
    """One model, its texts, and what stands before each explanation's own words."""

    def __init__(self, predictor: SentimentPredictor, texts: Sequence[str], tokens: int, batch: int) -> None:
        self.predictor, self.tokens, self.batch = predictor, tokens, batch
        self.model = scoring.base_of(predictor.model)
        self.explainer = Explainer(predictor.model, predictor.prompter)
        self.prompts = [prompt.ids for prompt in predictor.prompter.render(texts)]
        self.labels = [answer["sentiment"] for answer in predictor.predict(texts)]
        openings, answers = AnswerTokens(predictor.prompter).openings, predictor.prompter.answers
        self.begun = [[*p, *answers[y], *openings[y]] for p, y in zip(self.prompts, self.labels, strict=True)]
        order = sorted(range(len(texts)), key=lambda i: len(self.begun[i]))
        self.batches = [order[start : start + batch] for start in range(0, len(order), batch)]

    def ours(self) -> int:
        """Tokens written."""
        written = 0
        for batch in self.batches:
            prompts, labels = [self.prompts[i] for i in batch], [self.labels[i] for i in batch]
            answers = self.explainer.explain(prompts, labels, max_tokens=self.tokens, batch_tokens=10**9)
            written += sum(one.tokens for one in answers)
        return written

    def generate(self) -> int:
        """Tokens written, up to and with the end of sequence."""
        return sum(self._plain(batch) for batch in self.batches)

    def one_by_one(self) -> int:
        """Tokens written."""
        return sum(self._plain([i]) for batch in self.batches for i in batch)

    def _plain(self, batch: Sequence[int]) -> int:
        ids, mask = padded([self.begun[i] for i in batch], 0, self.model.device)
        end = self.predictor.prompter.end
        with torch.inference_mode(), scoring.autocast(self.model):
            found = self.model.generate(ids, attention_mask=mask, generation_config=greedy(self.tokens, end))
        rows = found[:, ids.shape[1] :].tolist()
        return sum(row.index(end) + 1 if end in row else len(row) for row in rows)


def clocked(work: Callable[[], int]) -> tuple[float, int]:
    """Seconds and tokens: of the processor on a CPU, which others may use too; by the wall on a GPU, waited for."""
    on_gpu = torch.cuda.is_available()
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    began = clock()
    tokens = work()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - began, tokens


def speeds(bench: Bench, alone: Bench, repetitions: int) -> list[dict[str, Any]]:
    """A row for each system: medians over turns that alternate; the first of each is a warm-up."""
    timed = Timed()
    systems = {
        "ours": (bench, bench.ours),
        "generate": (bench, bench.generate),
        "one by one": (alone, alone.one_by_one),
    }
    turns: dict[str, list[tuple[float, int]]] = {name: [] for name in systems}
    for repetition in range(repetitions + 1):
        for name, (_, work) in systems.items():
            with timed.calls(explaining.Allowed), timed.calls(explaining.Done):
                turns[name].append(clocked(work))
            seconds, tokens = turns[name][-1]
            print(f"{repetition or 'warm-up'}: {name} {tokens} tokens, {seconds:.2f} s", flush=True)
    rows: list[dict[str, Any]] = []
    for name, (on, _) in systems.items():
        counted = turns[name][1:]
        seconds = statistics.median(second for second, _ in counted)
        rows.append({
            "system": name, "batch": 1 if name == "one by one" else on.batch, "texts": len(on.prompts),
            "max_tokens": on.tokens, "seconds": round(seconds, 3), "written": counted[0][1],
            "answers_per_s": round(len(on.prompts) / seconds, 3), "tokens_per_s": round(counted[0][1] / seconds, 1),
        })  # fmt: skip
    ours, generate, loop = rows
    every = sum(seconds for seconds, _ in turns["ours"])
    ours["constraint_share"] = round(timed.seconds / every, 4)
    ours["overhead"] = round(1 - ours["tokens_per_s"] / generate["tokens_per_s"], 4)
    ours["answers_against_generate"] = round(ours["answers_per_s"] / generate["answers_per_s"], 2)
    ours["answers_against_one_by_one"] = round(ours["answers_per_s"] / loop["answers_per_s"], 2)
    print("overhead", ours["overhead"], "wanted", MOST_OVERHEAD)
    return rows


def parsed(predictor: SentimentPredictor, texts: Sequence[str], tokens: int) -> dict[str, Any]:
    """How many answers are not an object of the two fields by Python's own reader, and whose label is the scorer's.

    The scorer is also asked again, each prompt by itself: in bf16 that is another rounding, and so another label where
    two are about as likely, as under random weights.
    """
    prompts = [prompt.ids for prompt in predictor.prompter.render(texts)]
    labels = [answer["sentiment"] for answer in predictor.predict(texts)]
    explainer = Explainer(predictor.model, predictor.prompter)
    raw = explainer.explain(prompts, labels, max_tokens=tokens, batch_tokens=predictor.batch_tokens)
    read = [whole(one.json) for one in raw]
    choices = [predictor.prompter.answers[label] for label in LABELS]
    alone = [int(scoring.score(predictor.model, [p], choices, batch_tokens=1).argmax()) for p in prompts]
    said = [one["sentiment"] if one is not None else None for one in read]
    return {
        "answers": len(read),
        "max_tokens": tokens,
        "unparsed": sum(one is None for one in read),
        "cut_at_the_limit": sum(one.truncated for one in raw),
        "labels_that_agree": sum(one == label for one, label in zip(said, labels, strict=True)),
        "labels_that_agree_alone": sum(one == LABELS[best] for one, best in zip(said, alone, strict=True)),
    }


def whole(text: str) -> dict[str, str] | None:
    """The answer, or None where it is not JSON with a label and words."""
    try:
        answer = json.loads(text)
    except ValueError:
        return None
    if not isinstance(answer, dict) or answer.keys() != {"sentiment", "explanation"} or not answer["explanation"]:
        return None
    return answer


def tiny(folder: Path, like: SentimentPredictor) -> SentimentPredictor:
    """A two-layer model of random weights with the same tokenizer: it writes nonsense, so that every rule binds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(like.prompter.tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    like.prompter.tokenizer.save_pretrained(folder)
    return SentimentPredictor(folder, device=like.model.device.type)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a run, an adapter's folder, or a model")
    parser.add_argument(
        "--tokenizer", type=Path, help="makes --model, a 7B shape of random weights, if it is not there"
    )
    parser.add_argument("--texts", type=int, default=0, help="that are timed (CPU 32, GPU 1024)")
    parser.add_argument("--alone", type=int, default=0, help="that are timed one by one (CPU 8, GPU 32)")
    parser.add_argument("--batch", type=int, default=0, help="rows (CPU 16, GPU 64)")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--parsed", type=int, default=1000, help="answers that must parse")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--results", type=Path, help="else results/explain_cpu.json or explain_h200.json")
    parser.add_argument("--note", default="")
    asked = parser.parse_args()
    quiet_libraries()
    on_gpu = torch.cuda.is_available()
    if asked.tokenizer is not None:
        conditions.make_weights(Path(asked.model), asked.tokenizer)
    predictor = SentimentPredictor(asked.model)
    count, alone = asked.texts or (1024 if on_gpu else 32), asked.alone or (32 if on_gpu else 8)
    batch = asked.batch or (64 if on_gpu else 16)
    texts = texts_of(max(count, asked.parsed))
    path = asked.results or HERE / "results" / f"explain_{'h200' if on_gpu else 'cpu'}.json"
    result: dict[str, Any] = {"model": asked.model, "device": "cuda" if on_gpu else "cpu"}
    result["conditions"] = conditions.conditions(asked.note) if on_gpu else on_cpu(asked.note)
    some = asked.parsed if on_gpu else count
    short = texts[:: max(1, len(texts) // alone)][:alone]  # of the same mixture of lengths
    bench = Bench(predictor, texts[:count], asked.max_tokens, batch)
    steps: dict[str, Callable[[], Any]] = {
        "speed": lambda: speeds(bench, Bench(predictor, short, asked.max_tokens, 1), asked.repetitions),
        "parsed": lambda: parsed(predictor, texts[:some], asked.max_tokens),
        "parsed, tiny model": lambda: parsed_by_tiny(predictor, texts[: asked.parsed], asked.max_tokens),
    }
    for name, step in steps.items():
        result[name] = step()
        print(json.dumps({name: result[name]}), flush=True)
        conditions.write(path, [result])


def parsed_by_tiny(like: SentimentPredictor, texts: Sequence[str], tokens: int) -> dict[str, Any]:
    """As `parsed`, of a model that writes nonsense."""
    with tempfile.TemporaryDirectory() as folder:
        return parsed(tiny(Path(folder), like), texts, tokens)


def on_cpu(note: str) -> dict[str, Any]:
    """Hardware, versions and date of a measurement without a GPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "hardware": f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "clock": "processor",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "date": datetime.now(UTC).date().isoformat(),
        "note": note,
    }


if __name__ == "__main__":
    main()
