"""One system in a process of its own, which takes turns with others: `benchmarks/cpu.py` starts it.

It reads what to be from its argument (JSON), prepares, and then does one repetition for each line it reads. It answers
each with a line of JSON: seconds on the clock and of the processor. Last comes what it found and how much memory it took.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from finllm import embedded, models, scoring, shared_prefix
from finllm.example import LABELS, Example
from finllm.models import Loaded
from finllm.prompts import Prompter
from finllm.recipe import Model, Prompt

VOCABULARY = 9_216
"""Of the small Llama: so many tokens of SmolLM2's that each label is one, which is the peers' best case."""
SMALL = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=1024,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
    tie_word_embeddings=False,
)


def model(name: str) -> Loaded:
    """SmolLM2-135M, or the small Llama with random weights, in fp32."""
    if name == "smollm2-135m":
        return models.load(Model(name=name), dtype="fp32", device="cpu")
    models.quiet_libraries()
    torch.manual_seed(0)
    return Loaded(LlamaForCausalLM(SMALL).eval(), small_tokenizer())


def small_tokenizer() -> Any:
    """SmolLM2's tokenizer, cut to its first tokens and the merges that make them."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    whole = AutoTokenizer.from_pretrained(embedded.folder())
    parts = json.loads(whole.backend_tokenizer.to_str())
    kept = {token: number for token, number in parts["model"]["vocab"].items() if number < VOCABULARY}
    parts["model"]["vocab"] = kept
    parts["model"]["merges"] = [pair for pair in parts["model"]["merges"] if set(pair) | {"".join(pair)} <= kept.keys()]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)),
        bos_token=whole.bos_token,
        eos_token=whole.eos_token,
        pad_token=whole.pad_token,
    )


class Turns:
    """Waits for a turn, and tells how long it took."""

    def __init__(self, orders: TextIO, answers: TextIO) -> None:
        self._orders, self._answers = orders, answers

    def wait(self) -> None:
        """Until it is this process's turn; the clocks run from here."""
        assert self._orders.readline(), "the other side has gone"
        self._began = time.perf_counter(), time.process_time()

    def done(self) -> None:
        """The turn is over."""
        wall, processor = self._began
        self.tell(seconds=time.perf_counter() - wall, cpu_seconds=time.process_time() - processor)

    def tell(self, **facts: Any) -> None:
        """One line to the other side."""
        self._answers.write(json.dumps(facts) + "\n")
        self._answers.flush()


class StepsInTurns(TrainerCallback):  # type: ignore[misc]  # Transformers ships no types for its callbacks
    """A repetition is so many optimizer steps of one run, from fetching the first batch to the last update."""

    def __init__(self, turns: Turns, steps: int) -> None:
        self._turns, self._steps = turns, steps

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Everything is prepared; the first batch is not made yet."""
        self._turns.wait()

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Weights have changed."""
        if state.global_step % self._steps == 0:
            self._turns.done()
            if state.global_step < state.max_steps:
                self._turns.wait()


def train(spec: dict[str, Any], turns: Turns) -> dict[str, Any]:
    """All repetitions of training; returns the loss of every step."""
    import same_training
    from transformers import PrinterCallback

    loaded, given = model(spec["model"]), same_training.examples(spec["sentences"])
    steps = spec["steps"] * spec["repetitions"]
    callbacks = [StepsInTurns(turns, spec["steps"])]
    if spec["system"] == "finllm":
        trainer = same_training.ours(loaded, given, steps, callbacks)
    else:
        trainer = same_training.trls(loaded, given, steps, callbacks, **spec["settings"])
    trainer.remove_callback(PrinterCallback)
    with shared_prefix.attending(trainer.model, streams=spec["system"] == "finllm"):
        trainer.train()
    return {"found": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}


def score(spec: dict[str, Any], turns: Turns) -> dict[str, Any]:
    """All repetitions of scoring; returns the log-probabilities (texts x labels) of the last."""
    import same_training

    loaded, given = model(spec["model"]), same_training.examples(spec["sentences"])
    prompter = Prompter(loaded.tokenizer, Prompt())
    once = _ours(loaded, given, prompter) if spec["system"] == "finllm" else _lm_evals(loaded, given, prompter, spec)
    found: list[list[float]] = []
    for _ in range(spec["repetitions"]):
        turns.wait()
        found = once()
        turns.done()
    return {"found": [value for row in found for value in row]}


def _ours(loaded: Loaded, given: list[Example], prompter: Prompter) -> Callable[[], list[list[float]]]:
    from finllm.recipe import Evaluation

    batch_tokens = Evaluation().batch_tokens

    def once() -> list[list[float]]:
        prompts = [p.ids for p in prompter.render([e.text for e in given])]
        answers = [prompter.answers[label] for label in LABELS]
        rows: list[list[float]] = scoring.score(loaded.model, prompts, answers, batch_tokens=batch_tokens).tolist()
        return rows

    return once


def _lm_evals(
    loaded: Loaded, given: list[Example], prompter: Prompter, spec: dict[str, Any]
) -> Callable[[], list[list[float]]]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, device="cpu", **spec["settings"])
    requests = [
        Instance("loglikelihood", {}, (prompter.string(example.text), f" {label}"), index)
        for example in given
        for index, label in enumerate(LABELS)
    ]

    def once() -> list[list[float]]:
        flat = [log_p for log_p, _ in harness.loglikelihood(requests, disable_tqdm=True)]
        return [flat[i : i + len(LABELS)] for i in range(0, len(flat), len(LABELS))]

    return once


def main() -> None:
    spec = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")  # what libraries print goes elsewhere
    os.dup2(2, 1)
    torch.set_num_threads(spec["threads"])
    turns = Turns(sys.stdin, answers)
    found = {"train": train, "score": score}[spec["task"]](spec, turns)
    turns.tell(peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, **found)


if __name__ == "__main__":
    main()
