"""The application: routes, and how each kind of fault is answered."""

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Annotated, Any, Protocol

from fastapi import Body, Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from finllm.service.batching import Batcher, ClosedError, QueueFullError, Work, WorkFailedError
from finllm.service.limits import BodyLimit
from finllm.service.monitoring import Monitor, Watch
from finllm.service.schema import QUESTIONS, Answers, Explanations, Fault, Health, Question, WhyQuestion
from finllm.service.settings import Settings

log = logging.getLogger("finllm.service")

ABOUT = "Sentiment of financial texts, from one model. Requests that come together are read together."
FAULTS: dict[int | str, dict[str, Any]] = {
    code: {"model": Fault, "description": words}
    for code, words in {
        400: "The body is no JSON.",
        401: "The bearer token is missing or wrong.",
        408: "The request took too long to arrive.",
        413: "The body is too large.",
        422: "The body is no question of this service.",
        429: "Too many texts wait; Retry-After says how many seconds to stay away.",
        500: "The model failed.",
        503: "The service is ending.",
        504: "The model took too long.",
    }.items()
}
RETRY_AFTER = {"Retry-After": {"description": "Seconds to stay away.", "schema": {"type": "integer", "minimum": 1}}}
FAULTS[429]["headers"] = RETRY_AFTER


class Reading(Protocol):
    """What reads texts: `finllm.service.reader.Reader`, with a model."""

    name: str

    def classify(self, texts: list[str], target: str | None = None) -> Sequence[Any]:
        """One Answer for each text."""

    def explain(self, texts: list[str], target: str | None = None) -> Sequence[Any]:
        """One Explained for each text."""


def create(reader: Reading, settings: Settings) -> FastAPI:
    """The application that answers with `reader`; it starts a thread for the model, and ends it at shutdown."""
    works = {
        "classify": Work(reader.classify, settings.batch_texts),
        "explain": Work(reader.explain, settings.batch_explained),
    }
    monitor = Monitor(lambda: batcher.waiting)
    batcher = Batcher(works, queue_texts=settings.queue_texts, watch=monitor.batch)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)

    app = FastAPI(title="FinLLM", description=ABOUT, version=version("finllm"), lifespan=lifespan)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, timeout_seconds=settings.timeout_seconds)
    app.add_middleware(Watch, monitor=monitor)  # the last one added is the first to see a request
    _answer_faults(app)
    guards = [Depends(_guard(settings.token.get_secret_value()))] if settings.token else []
    _add_questions(app, reader.name, Desk(batcher, settings), guards)
    _add_state(app, reader.name, batcher, monitor, guards)
    return app


class Desk:
    """Takes questions to the model and waits for their answers."""

    def __init__(self, batcher: Batcher, settings: Settings) -> None:
        self._batcher, self._settings = batcher, settings

    async def answers(self, verb: str, question: Question) -> list[Any]:
        """One answer for each text; raises HTTPException where there is none."""
        timeout_seconds = self._settings.timeout_seconds
        try:
            job = self._batcher.submit(verb, question.many, question.target)
            found = await asyncio.wait_for(asyncio.wrap_future(job.future), timeout_seconds)
        except QueueFullError as error:
            raise HTTPException(429, str(error), {"Retry-After": str(error.retry_after_seconds)}) from error
        except ClosedError as error:
            raise HTTPException(503, "the service is ending; ask again in a moment") from error
        except WorkFailedError as error:
            raise HTTPException(500, "the model failed on this batch; the service's log says how") from error
        except TimeoutError as error:
            raise HTTPException(504, f"no answer within {timeout_seconds:g} s; send fewer texts at once") from error
        if self._settings.log_texts:
            for text, answer in zip(question.many, found, strict=True):
                log.info("%s", json.dumps({"text": text, **answer}))
        return found


def _add_questions(app: FastAPI, name: str, desk: Desk, guards: Sequence[Any]) -> None:
    documented: dict[str, Any] = {"responses": FAULTS, "dependencies": guards, "tags": ["questions"]}

    @app.post("/v1/classify", summary="Sentiment of one text or of several", **documented)
    async def classify(question: Annotated[Question, Body(openapi_examples=QUESTIONS)]) -> Answers:
        return Answers(model=name, answers=await desk.answers("classify", question))

    @app.post("/v1/explain", summary="Sentiment, and a reason in words", **documented)
    async def explain(question: Annotated[WhyQuestion, Body(openapi_examples=QUESTIONS)]) -> Explanations:
        return Explanations(model=name, answers=await desk.answers("explain", question))


def _add_state(app: FastAPI, name: str, batcher: Batcher, monitor: Monitor, guards: Sequence[Any]) -> None:
    ending: dict[int | str, dict[str, Any]] = {503: {"model": Health, "description": "The model's thread has ended."}}

    @app.get("/healthz", summary="Whether the service works", responses=ending, tags=["state"])
    async def healthz(response: Response) -> Health:
        response.status_code = 200 if batcher.alive else 503
        status = "ok" if batcher.alive else "failed"
        return Health(status=status, model=name, waiting_texts=batcher.waiting)

    @app.get(
        "/metrics",
        summary="Figures for Prometheus",
        response_class=PlainTextResponse,
        responses={401: FAULTS[401]} if guards else {},
        dependencies=guards,
        tags=["state"],
    )
    async def metrics() -> Response:
        return Response(monitor.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _guard(token: str) -> Callable[..., None]:
    """Lets requests pass that bear the token; comparing takes the same time wherever they differ."""
    bearer = HTTPBearer(auto_error=False, description="The token that the service was started with.")

    def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        if given is None or not hmac.compare_digest(given.credentials.encode(), token.encode()):
            raise HTTPException(401, "send the header `Authorization: Bearer TOKEN`", {"WWW-Authenticate": "Bearer"})

    return check


def _answer_faults(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def wrong(_: Request, error: RequestValidationError) -> JSONResponse:
        # Neither the input nor its unknown keys are repeated: they may be private, or no Unicode.
        faults = (f"{_place(fault['loc'])}: {fault['msg']}" for fault in error.errors())
        return JSONResponse({"detail": "; ".join(dict.fromkeys(faults))}, 422)

    @app.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> JSONResponse:
        return JSONResponse({"detail": "the service failed; its log says how"}, 500)


def _place(parts: Sequence[int | str]) -> str:
    known = {"body", *Question.model_fields}
    return ".".join(str(part) if isinstance(part, int) or part in known else "(unknown key)" for part in parts)
