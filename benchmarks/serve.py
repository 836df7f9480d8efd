"""Throughput of `finllm serve` on loopback: many clients at once against one, on the same model.

    python benchmarks/serve.py MODEL [--clients 64] [--seconds 10] [--repetitions 3]

One client, and CLIENTS clients, take turns for SECONDS each; every client asks for one text at a time, over one
connection that it keeps. All answers are compared with `SentimentPredictor.predict` on the same texts. Writes
benchmarks/results/serve_NAME.json; ratios are of medians, also of the processor time that the service spends on a text,
which other programs on the machine disturb less. Exits with 1 where a request fails or an answer differs.

The model `llama-30x16` is made on the spot: random weights in 30 layers of width 16. Its passes cost more than their
arithmetic, as those of large models do on a GPU; on a CPU those of large models do not, so that batches gain less.
"""

import argparse
import http.client
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
WITHIN = {"cpu": 1e-4, "cuda": 3e-2}
"""Largest difference of a probability; bf16 on a GPU rounds differently in batches of other sizes."""
COMMAND = "import sys; from launch.cli import main; sys.exit(main())"


MADE = "llama-30x16"


def make(folder: Path) -> Path:
    """A folder with that model, and the tokenizer of the embedded one."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from finllm import embedded, models

    models.quiet_libraries()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(embedded.folder())
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=48, num_hidden_layers=30,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Client(threading.Thread):
    """Asks for one text after the other until told to stop."""

    def __init__(self, port: int, texts: list[str], first: int, step: int, stop: threading.Event) -> None:
        super().__init__()
        self._port, self._texts, self._first, self._step, self._stop_asking = port, texts, first, step, stop
        self.answers: list[tuple[int, int, dict[str, Any] | None, float]] = []
        """Index of the text, status, answer, seconds."""

    def run(self) -> None:
        """Ask."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        connection.connect()
        index = self._first
        while not self._stop_asking.is_set():
            began = time.perf_counter()
            body = json.dumps({"texts": self._texts[index % len(self._texts)]})
            connection.request("POST", "/v1/classify", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = json.loads(response.read())
            answer = content["answers"][0] if response.status == 200 else None
            self.answers.append((index % len(self._texts), response.status, answer, time.perf_counter() - began))
            index += self._step
        connection.close()


def processor_seconds(process: int) -> float:
    """That a process has used so far, all its threads."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime: man 5 proc_pid_stat


def turn(process: int, port: int, texts: list[str], clients: int, seconds: float) -> dict[str, Any]:
    """What that many clients were answered in that time."""
    stop = threading.Event()
    asking = [Client(port, texts, first, clients, stop) for first in range(clients)]
    began, used = time.perf_counter(), processor_seconds(process)
    for client in asking:
        client.start()
    time.sleep(seconds)
    stop.set()
    for client in asking:
        client.join()
    passed = time.perf_counter() - began
    answers = [answer for client in asking for answer in client.answers]
    waits = sorted(answer[3] for answer in answers)
    return {
        "answers": answers,
        "texts_per_s": round(len(answers) / passed, 2),
        "server_processor_ms_per_text": round(1000 * (processor_seconds(process) - used) / len(answers), 2),
        "median_ms": round(1000 * statistics.median(waits), 1),
        "p95_ms": round(1000 * waits[int(0.95 * (len(waits) - 1))], 1),
    }


def serve(model: str, device: str) -> tuple["subprocess.Popen[str]", int]:
    """A service of the model in a process of its own, and its port."""
    words = [sys.executable, "-c", COMMAND, "serve", model, "--port", "0", "--device", device]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        found = re.search(r"http://[^:]+:(\d+)", line)
        if found:
            return process, int(found[1])
    raise SystemExit(f"`finllm serve {model}` ended with {process.wait()}; start it by hand to see why")


def differences(model: str, device: str, texts: list[str], answers: list[tuple[Any, ...]]) -> dict[str, Any]:
    """How far answers lie from those of `predict`, and how many have another label."""
    from finllm import SentimentPredictor

    right = SentimentPredictor(model, device=device).predict(texts)
    answered = [(right[index], answer) for index, _, answer, _ in answers if answer is not None]
    furthest = max(
        abs(mine["probabilities"][label] - answer["probabilities"][label])
        for mine, answer in answered
        for label in mine["probabilities"]
    )
    other = sum(mine["sentiment"] != answer["sentiment"] for mine, answer in answered)
    return {"compared": len(answered), "largest_difference": float(f"{furthest:.2g}"), "other_labels": other}


def measure(options: argparse.Namespace, texts: list[str]) -> dict[str, Any]:
    """All turns of one service."""
    process, port = serve(options.model, options.device)
    try:
        turns: dict[int, list[dict[str, Any]]] = {1: [], options.clients: []}
        turn(process.pid, port, texts, options.clients, 2)  # a warm-up that is not counted
        for _ in range(options.repetitions):
            for clients, done in turns.items():
                done.append(turn(process.pid, port, texts, clients, options.seconds))
                print(clients, {k: v for k, v in done[-1].items() if k != "answers"}, flush=True)
    finally:
        process.terminate()
        ended = process.wait(60)

    def median(clients: int, figure: str) -> float:
        return statistics.median(done[figure] for done in turns[clients])

    one, many = (median(clients, "texts_per_s") for clients in (1, options.clients))
    used = [median(clients, "server_processor_ms_per_text") for clients in (1, options.clients)]
    answers = [answer for done in turns.values() for each in done for answer in each.pop("answers")]
    return {
        "ratio": round(many / one, 2),
        "ratio_of_processor_time": round(used[0] / used[1], 2),
        "texts_per_s": {"1": one, str(options.clients): many},
        "turns": {str(clients): done for clients, done in turns.items()},
        "requests": len(answers),
        "failed": sum(status != 200 for _, status, _, _ in answers),
        "exit_status_after_sigterm": ended,
        **differences(options.model, options.device, texts, answers),
    }


def hardware(device: str) -> str:
    if device == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return f"{len(os.sched_getaffinity(0))} cores of {found[1] if found else platform.processor()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"a run, a folder, smollm2-135m, or {MADE}")
    parser.add_argument("--name", help="in the result's file name; else that of the model")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    from finllm.data.sample import Sample

    texts = [example.text for example in Sample(name="sample").read()]
    name = options.name or Path(options.model).name
    if options.model == MADE:
        options.model = str(make(Path(tempfile.mkdtemp()) / MADE))
    found = {
        "model": name,
        "clients": options.clients,
        "hardware": hardware(options.device),
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("finllm", "torch", "uvicorn")}},
        "date": datetime.now(UTC).date().isoformat(),
        **measure(options, texts),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"serve_{found['model']}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in found.items() if k != "turns"}, indent=1), f"\n{path}")
    right = not found["failed"] and not found["other_labels"] and found["largest_difference"] <= WITHIN[options.device]
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
