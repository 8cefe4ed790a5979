"""The addresses of the server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse, StreamingResponse

from bara.language.prompts import Prompt
from bara.serving.batcher import Batcher
from bara.serving.metrics import Metrics
from bara.serving.openai_answers import Form, event
from bara.serving.openai_schemas import (
    CHAT_COMPLETION,
    COMPLETION,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
)
from bara.serving.page import HEADERS, PAGE
from bara.serving.problems import Problem, error_body
from bara.serving.prompts import conversation
from bara.serving.schemas import (
    CLASSIFIED,
    PREDICTED,
    RANKED,
    ClassifyRequest,
    LoadRequest,
    PredictRequest,
    RankRequest,
    UnloadRequest,
)
from bara.serving.shelf import Shelf
from bara.serving.waiting import Events, results

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": what,
        "content": {"application/json": {"example": error_body(status, message, param)}},
    }
    for status, what, message, param in (
        (400, "The request cannot be used.", "texts is missing", "texts"),
        (401, "The key is missing or wrong.", "this server wants its key", None),
        (404, "There is no such model.", "there is no model 'x' here", "model"),
        (413, "The body is too large.", "the body has more than 1048576 bytes", None),
        (503, "The queue is full; see Retry-After.", "the server is busy", None),
        (504, "The time limit is over.", "there was not time enough", None),
    )
}

_FORBIDDEN = error_body(403, "this server loads no adapters: start it with --load-from")
LOADING = ERRORS | {
    403: {
        "description": "The server was not started for this.",
        "content": {"application/json": {"example": _FORBIDDEN}},
    }
}


def example(description: str, value: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """What a route answers, for its documentation."""
    ok = {"description": description, "content": {"application/json": {"example": value}}}
    return ERRORS | {200: ok}


def routes(shelf: Shelf, metrics: Metrics, batcher: Batcher) -> APIRouter:
    """The routes of a server with these adapters."""
    router = APIRouter()

    @router.post("/v1/predict", responses=example("Predictions of the texts.", PREDICTED))
    async def predict(body: PredictRequest, request: Request) -> dict[str, Any]:
        """Classes or numbers for texts, each with the parts of its uncertainty.

        The probabilities are those of `bara.predict` with this number of draws and this seed.
        Uncertainties of classes are in nats, those of numbers are variances.
        """
        job = shelf.predictor(body.model).job(body)
        batcher.submit([job])
        (answer,) = await results(request, [job])
        return dict(answer)

    @router.post("/classify", responses=example("Classes of the texts.", CLASSIFIED))
    async def classify(body: ClassifyRequest, request: Request) -> dict[str, Any]:
        """Classes in vLLM's form, for the client of an export; `/v1/predict` says more."""
        if (task := shelf.predictor(body.model).served.task.task) != "classification":
            raise Problem(400, f"/classify is for classification, not {task}", param="model")
        answer = await predict(body.prediction(), request)
        data = []
        for index, record in enumerate(answer["predictions"]):
            probs = list(record["probabilities"].values())
            label = {"index": index, "label": record["prediction"], "probs": probs}
            data.append(label | {"num_classes": len(probs)})
        return {"object": "list", "model": answer["model"], "data": data}

    @router.post("/v1/rank", responses=example("The rank in use of every layer.", RANKED))
    async def rank(body: RankRequest, request: Request) -> dict[str, Any]:
        """How many factors each layer uses for these texts, in the mean over them."""
        predictor = shelf.predictor(body.model)
        job = predictor.rank_job(body)
        batcher.submit([job])
        (layers,) = await results(request, [job])
        return {
            "object": "ranks",
            "model": predictor.served.name,
            "layers": [{"name": n, "max_rank": most, "rank": mean} for n, most, mean in layers],
            "mean": sum(mean for _, _, mean in layers) / len(layers),
        }

    @router.post(
        "/v1/chat/completions",
        responses=example("The answer; with `stream` as server-sent events.", CHAT_COMPLETION),
    )
    async def chat(body: ChatRequest, request: Request) -> Any:
        """OpenAI's chat completions, from the mixture over draws: `bara.generate`.

        `logprobs` are the mixture's. `uncertainty` of a choice is ours.
        """
        return await generate(body, [conversation(body.messages)], request)

    @router.post(
        "/v1/completions",
        responses=example("The answers; with `stream` as server-sent events.", COMPLETION),
    )
    async def complete(body: CompletionRequest, request: Request) -> Any:
        """OpenAI's completions, from the mixture over draws: `bara.generate`."""
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        return await generate(body, prompts, request)

    async def generate(body: GenerationRequest, prompts: Sequence[Prompt], request: Request) -> Any:
        decoder = shelf.decoder(body.model)
        form = Form(decoder, body)
        jobs = decoder.jobs(body, prompts, form.wanted, form.top, form.reads)
        if not body.stream:
            batcher.submit(jobs)
            return form.whole(await results(request, jobs))
        events = Events(jobs)
        batcher.submit(jobs)
        await events.begin(request)
        return StreamingResponse(_stream(form, events), media_type="text/event-stream")

    async def _stream(form: Form, events: Events) -> AsyncIterator[str]:
        answers = events.answers()
        for line in form.opening(len(answers)):
            yield line
        try:
            async for index, token in events.read():
                yield form.token(index, token) if token else form.closing(index, answers[index])
        except Problem as problem:  # the status has been sent: clients look for this
            yield event(problem.body())
            return
        options = form.request.stream_options
        if options is not None and options.include_usage:
            yield form.usage(answers)
        yield "data: [DONE]\n\n"

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The adapters that requests can name."""
        return {"object": "list", "data": [one.described() for one in shelf.served]}

    @router.get("/v1/models/{name}", responses={404: ERRORS[404]})
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        return shelf.predictor(name).served.described()

    @router.post("/v1/load_lora_adapter", responses=LOADING, response_class=PlainTextResponse)
    async def load(body: LoadRequest, request: Request) -> str:
        """Loads an adapter from the folder that the server allows, as vLLM does."""
        job = shelf.load_job(body)
        batcher.submit([job])
        (one,) = await results(request, [job])
        shelf.add(one)
        return f"Success: LoRA adapter '{body.lora_name}' added successfully."

    @router.post("/v1/unload_lora_adapter", responses=LOADING, response_class=PlainTextResponse)
    async def unload(body: UnloadRequest) -> str:
        """Unloads an adapter that was loaded; requests that it has under way finish."""
        shelf.remove(body.lora_name)
        return f"Success: LoRA adapter '{body.lora_name}' removed successfully."

    @router.get("/healthz")
    async def health() -> dict[str, str]:
        """Whether the server lives."""
        return {"status": "ok"}

    @router.get("/metrics")
    async def numbers() -> Response:
        """Numbers for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(PAGE, media_type="text/html", headers=HEADERS)

    return router
