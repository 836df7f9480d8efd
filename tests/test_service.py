"""The service: answers of the model over HTTP, and a plain word for everything that is refused."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from pydantic import SecretStr
from schemathesis.generation import GenerationMode

from finllm.errors import RunError
from finllm.run import Run
from finllm.service.app import create
from finllm.service.reader import Reader
from finllm.service.schema import MAX_CHARACTERS, MAX_TEXTS
from finllm.service.settings import TOKEN, Settings, token_of_environment

TEXTS = ["Profits today. Orders doubled.", "Losses today. A plant burnt down.", "Meetings today. Lunch is served."]


@pytest.fixture(scope="module")
def reader(tiny_run: Run) -> Reader:
    return Reader(tiny_run.folder, device="cpu")


@pytest.fixture
def ask(reader: Reader) -> Iterator[Callable[..., TestClient]]:
    """A client of a service with the given settings."""
    clients: list[TestClient] = []

    def client(**settings: Any) -> TestClient:
        clients.append(TestClient(create(reader, Settings(**settings))))
        return clients[-1].__enter__()

    yield client
    for one in clients:
        one.__exit__()


def test_answers_are_those_of_predict(ask: Callable[..., TestClient], reader: Reader) -> None:
    """One text or several; each with its three probabilities, under the model's name."""
    client = ask()
    many = client.post("/v1/classify", json={"texts": TEXTS}).json()
    one = client.post("/v1/classify", json={"texts": TEXTS[0]}).json()
    assert many["model"] == reader.name == "tiny"
    expected = reader.predictor.predict(TEXTS)
    for answer, right in zip([*many["answers"], *one["answers"]], [*expected, expected[0]], strict=True):
        assert answer["sentiment"] == right["sentiment"]
        assert answer["probabilities"] == pytest.approx(right["probabilities"], abs=1e-5)
    assert len({answer["confidence"] for answer in many["answers"]}) == 3


def test_explanations_are_those_of_the_model(ask: Callable[..., TestClient], reader: Reader) -> None:
    """Label, probabilities and reason as `explain` gives them."""
    answers = ask().post("/v1/explain", json={"texts": TEXTS[:2]}).json()["answers"]
    for answer, right in zip(answers, reader.predictor.explain(TEXTS[:2]), strict=True):
        assert answer["probabilities"] == pytest.approx(right["probabilities"], abs=1e-5)
        assert (answer["explanation"], answer["truncated"]) == (right["explanation"], right["truncated"])


def test_concurrent_requests_get_their_own_answers_from_shared_batches(
    ask: Callable[..., TestClient], reader: Reader
) -> None:
    """Thirty-two clients at once: fewer batches than requests, and nobody gets another's answer."""
    client = ask()
    asked = [f"{TEXTS[i % 3]} {i}" for i in range(32)]
    with ThreadPoolExecutor(32) as pool:
        given = list(pool.map(lambda text: client.post("/v1/classify", json={"texts": text}).json(), asked))
    for body, right in zip(given, reader.predictor.predict(asked), strict=True):
        assert body["answers"][0]["probabilities"] == pytest.approx(right["probabilities"], abs=1e-5)
    figures = client.get("/metrics").text
    assert 'finllm_texts_total{verb="classify"} 32.0' in figures
    batches = float(figures.split('finllm_batch_texts_count{verb="classify"} ')[1].split()[0])
    assert batches < 32


def test_a_target_reaches_the_prompt(ask: Callable[..., TestClient], reader: Reader) -> None:
    """The same text about another company is another question."""
    client = ask()
    body = client.post("/v1/classify", json={"texts": TEXTS[0], "target": "Acme"}).json()
    right = reader.predictor.predict(TEXTS[0], target="Acme")["probabilities"]
    assert body["answers"][0]["probabilities"] == pytest.approx(right, abs=1e-5)
    assert right != pytest.approx(reader.predictor.predict(TEXTS[0])["probabilities"], abs=1e-4)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"texts": []}, "at least 1 item"),
        ({"texts": ["a"] * (MAX_TEXTS + 1)}, f"at most {MAX_TEXTS} items"),
        ({"texts": "a" * (MAX_CHARACTERS + 1)}, f"at most {MAX_CHARACTERS} characters"),
        ({"texts": ["good", " \n"]}, "body.texts"),
        ({"texts": "a", "secret plan": 1}, "(unknown key)"),
        ({"texts": 7}, "body.texts"),
        ([], "body"),
    ],
    ids=["no text", "too many", "too long", "blank", "unknown key", "number", "list"],
)
def test_what_is_no_question_is_refused_with_its_place(ask: Callable[..., TestClient], body: Any, said: str) -> None:
    """422 in one sentence that does not repeat the text."""
    answer = ask().post("/v1/classify", json=body)
    assert answer.status_code == 422
    assert said in answer.json()["detail"]
    assert "secret plan" not in answer.text


@pytest.mark.parametrize("body", [b"{", b"\xff", b'{"texts": "\\ud800"}', b'{"\\ud800": 1}', b"[" * 100_000])
def test_bytes_that_are_no_question_are_refused(ask: Callable[..., TestClient], body: bytes) -> None:
    """Broken JSON, broken UTF-8, lone surrogates, endless nesting: the asker's fault, never ours."""
    answer = ask().post("/v1/classify", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.json()["detail"]


def test_a_body_that_is_too_large_is_refused_unread(ask: Callable[..., TestClient]) -> None:
    """By its announced length, and by what arrives where none is announced."""
    client = ask(max_body_bytes=2000)
    assert client.post("/v1/classify", json={"texts": "a" * 1900}).status_code == 200
    assert client.post("/v1/classify", json={"texts": "a" * 2000}).status_code == 413
    parts = (b'{"texts": "aaaaaaaaaa"' for _ in range(100))
    headers = {"Content-Type": "application/json"}
    assert client.post("/v1/classify", content=parts, headers=headers).status_code == 413


class Slow:
    """A model that waits until it is let go."""

    name, has_base = "slow", False

    def __init__(self) -> None:
        self.open = threading.Event()

    def classify(self, texts: list[str], target: str | None = None) -> list[Any]:
        """Neutral, in the end."""
        assert self.open.wait(20), target
        if "bad" in texts:
            raise MemoryError
        return [{"sentiment": "neutral", "confidence": 1.0, "probabilities": {"neutral": 1.0}}] * len(texts)

    explain = classify


@pytest.fixture
def slow() -> Iterator[Slow]:
    made = Slow()
    yield made
    made.open.set()


def waits_for(client: TestClient, texts: int) -> None:
    """Return once that many texts wait for the model."""
    for _ in range(500):
        if client.get("/healthz").json()["waiting_texts"] == texts:
            return
        time.sleep(0.01)
    pytest.fail(f"never {texts} texts waited")


def test_a_full_queue_says_when_to_come_back(slow: Slow) -> None:
    """429 with Retry-After; what was taken before is answered."""
    settings = Settings(queue_texts=MAX_TEXTS, batch_texts=1)
    with TestClient(create(slow, settings)) as client, ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.post, "/v1/classify", json={"texts": "a"})
        second = pool.submit(client.post, "/v1/classify", json={"texts": ["a"] * (MAX_TEXTS - 1)})
        waits_for(client, MAX_TEXTS - 1)
        refused = client.post("/v1/classify", json={"texts": ["a", "b"]})
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        slow.open.set()
        assert {first.result(10).status_code, second.result(10).status_code} == {200}


def test_an_answer_that_takes_too_long_is_given_up(slow: Slow) -> None:
    """504, and what still waited is withdrawn from the queue."""
    with TestClient(create(slow, Settings(timeout_seconds=0.2, batch_texts=1))) as client:
        assert client.post("/v1/classify", json={"texts": ["a", "b", "c"]}).status_code == 504
        slow.open.set()
        waits_for(client, 0)
        assert client.post("/v1/classify", json={"texts": "a"}).status_code == 200


def test_a_failing_model_is_said_and_survived(slow: Slow) -> None:
    """500 for the askers of that batch, with a hint at the log; the next one is answered."""
    slow.open.set()
    with TestClient(create(slow, Settings())) as client:
        failed = client.post("/v1/classify", json={"texts": "bad"})
        assert (failed.status_code, "log" in failed.json()["detail"]) == (500, True)
        assert client.post("/v1/classify", json={"texts": "good"}).status_code == 200
        assert client.get("/healthz").json()["status"] == "ok"


def test_shutting_down_answers_what_was_taken(slow: Slow) -> None:
    """The application's shutdown waits for the model."""
    app = create(slow, Settings())
    with TestClient(app) as client, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.post, "/v1/classify", json={"texts": "a"})
        threading.Timer(0.2, slow.open.set).start()
        assert asked.result(10).status_code == 200
    with TestClient(app) as client:
        assert client.post("/v1/classify", json={"texts": "a"}).status_code == 503
        assert client.get("/healthz").status_code == 503


def test_a_token_is_asked_for_where_one_is_set(ask: Callable[..., TestClient]) -> None:
    """Missing, wrong, of another scheme, not ASCII: 401; health needs none, so that probes work."""
    client = ask(token=SecretStr("planted-token"))
    for sent in (b"", b"Bearer planted-tokem", b"Bearer planted", b"Basic planted-token", b"Bearer \xff\xfe"):
        headers = {b"Authorization": sent}
        refused = client.post("/v1/classify", json={"texts": "a"}, headers=headers)
        assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert client.get("/metrics", headers=headers).status_code == 401
    right = {"Authorization": "Bearer planted-token"}
    assert client.post("/v1/classify", json={"texts": "a"}, headers=right).status_code == 200
    assert client.get("/metrics", headers=right).status_code == 200
    assert client.get("/healthz").status_code == 200
    assert "planted-token" not in client.get("/openapi.json").text


@pytest.mark.parametrize("token", ["", "  ", "two words", "schlüssel", "line\n"])
def test_a_token_that_cannot_be_one_is_refused(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty variable must not silently open the service."""
    monkeypatch.setenv(TOKEN, token)
    with pytest.raises(RunError, match=TOKEN):
        token_of_environment()


def test_no_text_reaches_the_log_unless_asked(ask: Callable[..., TestClient], caplog: pytest.LogCaptureFixture) -> None:
    """Not from the body, the path or the query, not from faults; with log_texts, text and answer."""
    caplog.set_level(logging.DEBUG, logger="finllm")
    client = ask()
    client.post("/v1/classify", json={"texts": "Planted profits."})
    client.post("/v1/classify", json={"texts": [], "Planted": "Planted"})
    client.get("/v1/classify/Planted?text=Planted")
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("finllm")]
    assert sum("/v1/classify 200" in message for message in messages) == 1
    assert not any("Planted" in message for message in messages)
    ask(log_texts=True).post("/v1/classify", json={"texts": "Planted profits."})
    assert any("Planted profits." in record.getMessage() for record in caplog.records)


def test_metrics_count_requests_by_route_and_status(ask: Callable[..., TestClient]) -> None:
    """Unknown paths share one series, so that nobody can make endless ones."""
    client = ask()
    client.post("/v1/classify", json={"texts": "a"})
    client.post("/v1/classify", json={})
    for number in range(3):
        client.get(f"/unknown/{number}")
    figures = client.get("/metrics").text
    assert 'finllm_requests_total{route="/v1/classify",status="200"} 1.0' in figures
    assert 'finllm_requests_total{route="/v1/classify",status="422"} 1.0' in figures
    assert 'finllm_requests_total{route="(unknown)",status="404"} 3.0' in figures
    assert "finllm_waiting_texts 0.0" in figures


def test_every_example_of_the_description_works(ask: Callable[..., TestClient]) -> None:
    """What /docs offers to try is answered; each route names its faults."""
    client = ask()
    described = client.get("/openapi.json").json()
    assert set(described["paths"]) == {"/v1/classify", "/v1/explain", "/healthz", "/metrics"}
    question = described["paths"]["/v1/classify"]["post"]
    assert {"200", "401", "413", "422", "429", "504"} <= set(question["responses"])
    examples = question["requestBody"]["content"]["application/json"]["examples"]
    assert len(examples) == 3
    for example in examples.values():
        assert client.post("/v1/classify", json=example["value"]).status_code == 200
    assert json.dumps(described).count('"examples"') >= 4


RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("route", "kind", "examples"),
    [
        ("POST /v1/classify", RIGHT, 40),
        ("POST /v1/classify", WRONG, 60),
        ("POST /v1/explain", RIGHT, 8),
        ("POST /v1/explain", WRONG, 20),
        ("GET /healthz", RIGHT, 2),
        ("GET /metrics", RIGHT, 2),
    ],
)
def test_the_service_keeps_to_its_own_description(
    reader: Reader, route: str, kind: GenerationMode, examples: int
) -> None:
    """Right questions are answered, wrong ones refused, all with what the description says; never a 500."""
    app = create(reader, Settings())
    method, path = route.split()
    operation = schemathesis.openapi.from_asgi("/openapi.json", app)[path][method]

    @given(case=operation.as_strategy(generation_mode=kind))
    @effort(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    def fuzz(case: Any) -> None:
        case.call_and_validate()

    with TestClient(app):
        fuzz()
