"""The server's addresses: OpenAI's, and those to watch it and to change its tenants."""

import asyncio
import hmac
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import aclosing, asynccontextmanager
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from transformers.cli.serving.utils import BaseHandler, Modality

from llmpress.core.errors import LLMPressError
from llmpress.core.failures import one_line
from llmpress.serving.answers import (
    DONE,
    Chat,
    Completion,
    Json,
    event,
    merged,
    response_template,
)
from llmpress.serving.batching import WorkerDiedError
from llmpress.serving.engine import (
    DEFAULT_TOKENS,
    Answer,
    BusyError,
    EndingError,
    Engine,
    Settings,
    Tenant,
    TooLongError,
    UnknownModelError,
)
from llmpress.serving.logs import RequestLog, log
from llmpress.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    LoadRequest,
    UnloadRequest,
)

if TYPE_CHECKING:
    from llmpress.serving.metrics import Metrics

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
RETRY_SECONDS = 1
_KINDS: dict[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
_STATUS: tuple[tuple[type[Exception], int, str | None], ...] = (
    (BusyError, 429, "too_many_requests"),
    (EndingError, 503, "ending"),
    (TooLongError, 400, "context_length_exceeded"),
    (UnknownModelError, 404, "model_not_found"),
    (WorkerDiedError, 503, "worker_died"),
    (TimeoutError, 504, "timeout"),
    (LLMPressError, 400, None),
    (ValueError, 400, None),
)


def problem(status: int, message: str, code: str | None = None, param: str | None = None) -> Json:
    """Return an error in OpenAI's form."""
    kind = _KINDS.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def known_problem(error: Exception) -> tuple[int, Json]:
    """Return the status of an error and its form."""
    if isinstance(error, TimeoutError):
        return 504, problem(504, "the answer took longer than the server lets one take", "timeout")
    for kind, status, code in _STATUS:
        if isinstance(error, kind):
            param = "model" if status == 404 else None
            return status, problem(status, one_line(error), code, param)
    return 500, problem(500, "the server failed; its log says why")


def build_app(engine: Engine, api_key: str | None = None) -> FastAPI:
    """Build the application.

    Args:
        engine: Generates; started and stopped with the application.
        api_key: Without which nobody is answered; None for everybody, who cannot change tenants.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.batcher.start()
        yield
        await asyncio.to_thread(engine.batcher.stop, at_once=True)

    app = FastAPI(lifespan=lifespan, title="llmpress", docs_url=None, redoc_url=None)
    metrics = _metrics(engine)
    _add_errors(app)
    bearer = HTTPBearer(auto_error=False)

    def keyed(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        found = "" if given is None else given.credentials
        if api_key is not None and not hmac.compare_digest(found.encode(), api_key.encode()):
            raise HTTPException(401, "this server needs its API key: Authorization: Bearer KEY")

    def managed() -> None:
        if api_key is None:
            raise HTTPException(403, "tenants can only be changed on a server with an API key")

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = engine.batcher.is_alive()
        status = "ending" if engine.ending else "ok" if alive else "the worker has ended"
        body = {"status": status, "running": engine.running}
        return JSONResponse(body, status_code=200 if status == "ok" else 503)

    @app.get("/metrics", dependencies=[Depends(keyed)])
    async def read_metrics() -> Response:
        if metrics is None:
            raise HTTPException(501, "prometheus_client is missing: pip install 'llmpress[serve]'")
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", dependencies=[Depends(keyed)])
    async def models() -> Json:
        found = [_model(tenant) for tenant in engine.tenants.values() if not tenant.leaving]
        return {"object": "list", "data": found}

    @app.get("/v1/models/{name:path}", dependencies=[Depends(keyed)])
    async def model(name: str) -> Json:
        return _model(engine.tenant(name))

    @app.post("/v1/completions", dependencies=[Depends(keyed)])
    async def completions(request: Request, wanted: CompletionRequest) -> Response:
        tenant = engine.tenant(wanted.model)
        prompts = [
            tenant.tokenizer(prompt, verbose=False)["input_ids"]
            if isinstance(prompt, str)
            else prompt
            for prompt in wanted.prompts
        ]
        settings = _settings(wanted, wanted.max_tokens or DEFAULT_TOKENS)
        form = Completion(tenant.name, tenant.tokenizer)
        return await answered(request, tenant, prompts, settings, wanted, form)

    @app.post("/v1/chat/completions", dependencies=[Depends(keyed)])
    async def chat(request: Request, wanted: ChatRequest) -> Response:
        tenant = engine.tenant(wanted.model)
        tokens, tools = _chat_tokens(tenant, wanted)
        template = response_template(tenant.tokenizer, engine.model)
        settings = _settings(wanted, wanted.max_tokens, special=template is not None)
        form = Chat(tenant.name, tenant.tokenizer, template, tokens, tools, wanted.n)
        return await answered(request, tenant, [tokens], settings, wanted, form)

    async def answered(
        request: Request,
        tenant: Tenant,
        prompts: Sequence[list[int]],
        settings: Settings,
        wanted: CompletionRequest | ChatRequest,
        form: Completion,
    ) -> Response:
        notes = request.state.notes
        notes["tenant"], notes["stream"] = tenant.name, wanted.stream
        notes["prompt_tokens"] = sum(map(len, prompts))
        engine.check_room(len(prompts) * wanted.n)
        answers: list[Answer] = []
        try:
            for prompt, number in product(prompts, range(wanted.n)):
                answers.append(engine.begin(tenant, prompt, _numbered(settings, number)))
        except BaseException:
            for answer in answers:
                answer.cancel()
            raise
        started = time.perf_counter()

        async def choices() -> AsyncGenerator[tuple[int, list[Json]]]:
            generated: dict[int, int] = {}
            async with aclosing(merged(answers)) as pieces:
                async for number, piece in pieces:
                    if not generated:
                        notes["first_token_seconds"] = round(time.perf_counter() - started, 4)
                    generated[number] = piece.tokens
                    notes["completion_tokens"] = sum(generated.values())
                    yield number, form.parts(number, piece)

        def usage() -> Json:
            prompt, new = notes["prompt_tokens"], notes.get("completion_tokens", 0)
            total = {"total_tokens": prompt + new}
            return {"prompt_tokens": prompt, "completion_tokens": new, **total}

        async def stream() -> AsyncIterator[str]:
            try:
                for number in range(len(answers)):
                    for choice in form.first(number):
                        yield event(form.body([choice], part=True))
                async with aclosing(choices()) as parts:
                    async for _, found in parts:
                        for choice in found:
                            yield event(form.body([choice], part=True))
                if wanted.with_usage:
                    yield event(form.body([], part=True, usage=usage()))
            except Exception as error:  # noqa: BLE001 - the answer has begun: it ends with the error
                status, body = known_problem(error)
                notes["error"] = body["error"]["message"]
                log("stream failed", status=status, error=repr(error))
                yield event(body)
            finally:
                for answer in answers:
                    answer.cancel()
            yield DONE

        async def whole() -> Response:
            found: dict[int, list[Json]] = {n: list(form.first(n)) for n in range(len(answers))}
            async with aclosing(choices()) as parts:
                async for number, some in parts:
                    found[number] += some
            joined = [form.joined(number, parts) for number, parts in found.items()]
            return JSONResponse(form.body(joined, part=False, usage=usage()))

        if wanted.stream:
            return StreamingResponse(stream(), media_type="text/event-stream")
        return await _unless_gone(request, whole())

    @app.post("/v1/load_delta", dependencies=[Depends(keyed), Depends(managed)])
    async def load_delta(wanted: LoadRequest) -> Json:
        await engine.load(wanted.name, wanted.source)
        log("delta loaded", tenant=wanted.name, source=wanted.source)
        return _model(engine.tenant(wanted.name))

    @app.post("/v1/unload_delta", dependencies=[Depends(keyed), Depends(managed)])
    async def unload_delta(wanted: UnloadRequest) -> Json:
        await engine.unload(wanted.name)
        log("delta unloaded", tenant=wanted.name)
        return {"id": wanted.name, "object": "model", "deleted": True}

    def counted(notes: dict[str, Any], status: int, seconds: float) -> None:
        if metrics is not None:
            metrics.count(notes, status, seconds)

    app.add_middleware(RequestLog, counted=counted)
    return app


def _metrics(engine: Engine) -> "Metrics | None":
    """Return the counters; None where prometheus_client is missing, and the server goes without."""
    try:
        from llmpress.serving.metrics import Metrics
    except ModuleNotFoundError:
        return None
    return Metrics(engine)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        message = f"{place}: {first['msg']}" if place else str(first["msg"])
        return JSONResponse(problem(400, message, None, place or None), status_code=400)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        code = "invalid_api_key" if error.status_code == 401 else None
        body = problem(error.status_code, str(error.detail), code)
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    async def failed(request: Request, error: Exception) -> JSONResponse:
        status, body = known_problem(error)
        request.state.notes["error"] = body["error"]["message"]
        headers = {"Retry-After": str(RETRY_SECONDS)} if status == 429 else None
        return JSONResponse(body, status_code=status, headers=headers)

    for kind in (*(kind for kind, _, _ in _STATUS), Exception):
        app.exception_handler(kind)(failed)


def _model(tenant: Tenant) -> Json:
    owner = "llmpress"
    return {"id": tenant.name, "object": "model", "created": tenant.created, "owned_by": owner}


def _settings(
    wanted: CompletionRequest | ChatRequest, max_tokens: int | None, *, special: bool = False
) -> Settings:
    return Settings(
        max_tokens,
        {name: getattr(wanted, name) for name in SAMPLING},
        wanted.seed,
        wanted.stops,
        wanted.num_logprobs,
        special,
    )


def _numbered(settings: Settings, number: int) -> Settings:
    """Return the settings of one of several answers: with a seed, each has another one."""
    if settings.seed is None or number == 0:
        return settings
    return Settings(**{**vars(settings), "seed": settings.seed + number})


def _chat_tokens(tenant: Tenant, wanted: ChatRequest) -> tuple[list[int], list[Json] | None]:
    """Return the tokens of a chat and the tools that its answer may call."""
    tools: Any = wanted.tools if wanted.tool_choice == "auto" else None
    if tenant.tokenizer.chat_template is None:
        raise ValueError(f"{tenant.name} has no chat template; use /v1/completions")
    try:
        messages = BaseHandler.get_processor_inputs_from_messages(wanted.messages, Modality.LLM)
        found: Any = tenant.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **wanted.chat_template_kwargs,
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(
            f"messages: the chat template of {tenant.name} refuses them ({one_line(error)})"
        ) from None
    return list(found["input_ids"]), tools


async def _unless_gone(request: Request, answer: Awaitable[Response]) -> Response:
    """Wait for an answer as long as the client does."""
    making = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({making, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if making.done():
            return making.result()
        request.state.notes["error"] = "the client went away"
        return Response(status_code=499)
    finally:
        for task in (making, leaving):
            task.cancel()
        await asyncio.gather(making, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
