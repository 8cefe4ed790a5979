"""What requests for predictions and ranks hold. Unknown fields are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from bara.schema import Seed

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def with_examples(*examples: dict[str, Any]) -> ConfigDict:
    """The configuration of a request whose documentation shows these."""
    return STRICT | ConfigDict(json_schema_extra={"examples": list(examples)})


Text = Annotated[str, Field(min_length=1)]
Draws = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Messages = Annotated[list[dict[str, Any]], Field(min_length=1)]


class Asked(BaseModel):
    """A question about a context."""

    model_config = STRICT

    question: Text
    context: Text


READS = ("texts", "pairs", "tokens", "questions")
"""Fields of a request that have what an adapter reads: it reads one of them."""


class TextsRequest(BaseModel):
    """Texts for one adapter; what it was trained on says whether they are whole ones, pairs, lists
    of words (`tokens`) or questions with their contexts."""

    model_config = STRICT

    model: str | None = None
    texts: Annotated[list[Text], Field(min_length=1)] | None = None
    pairs: (
        Annotated[
            list[Annotated[list[Text], Field(min_length=2, max_length=2)]], Field(min_length=1)
        ]
        | None
    ) = None
    tokens: (
        Annotated[list[Annotated[list[Text], Field(min_length=1)]], Field(min_length=1)] | None
    ) = None
    questions: Annotated[list[Asked], Field(min_length=1)] | None = None


class PredictRequest(TextsRequest):
    """What classes, labels, tags, answers or numbers are to be predicted for."""

    model_config = with_examples(
        {"model": "tweets", "texts": ["What a day!", "Not again."], "num_draws": 10, "seed": 0},
        {"pairs": [["A dog runs.", "An animal moves."]], "abstain_at_risk": 0.1},
        {"texts": ["What a day!"], "coverage": 0.9},
        {"tokens": [["Ada", "lived", "in", "London"]]},
        {"questions": [{"question": "Who lived there?", "context": "Ada lived in London."}]},
    )

    num_draws: Draws = 10
    seed: Seed = 0
    deterministic: bool = False
    abstain_at_risk: Share | None = None
    coverage: Share | None = None


class ClassifyRequest(BaseModel):
    """Texts to classify, in vLLM's form."""

    model_config = with_examples({"model": "tweets", "input": "What a day!"})

    model: str | None = None
    input: Text | Annotated[list[Text], Field(min_length=1)]
    num_draws: Draws = 10
    seed: Seed = 0
    deterministic: bool = False

    def prediction(self) -> PredictRequest:
        """The same as a request of our own."""
        fields = self.model_dump(exclude={"input"})
        texts = [self.input] if isinstance(self.input, str) else self.input
        return PredictRequest(texts=texts, **fields)


class RankRequest(TextsRequest):
    """Texts whose rank in use is asked for; for a language model also a conversation."""

    model_config = with_examples({"model": "tweets", "texts": ["What a day!"]})

    messages: Messages | None = None


AdapterName = Annotated[str, Field(pattern=r"^[\w.:@+-]{1,200}$")]


class UnloadRequest(BaseModel):
    """An adapter that was loaded, by its name."""

    model_config = with_examples({"lora_name": "draw-0"})

    lora_name: AdapterName


class LoadRequest(UnloadRequest):
    """An adapter to load; the fields are vLLM's. The path is one of the server's machine, and may
    be relative to the folder that the server loads from."""

    model_config = with_examples({"lora_name": "draw-0", "lora_path": "writer-draws/draw-0"})

    lora_path: Text
    load_inplace: Literal[False] = False


PREDICTED = {
    "object": "predictions",
    "model": "tweets",
    "task": "classification",
    "num_draws": 10,
    "seed": 0,
    "predictions": [
        {
            "prediction": "positive",
            "probabilities": {"negative": 0.08, "positive": 0.92},
            "total": 0.28,
            "aleatoric": 0.25,
            "epistemic": 0.03,
        }
    ],
}
CLASSIFIED = {
    "object": "list",
    "model": "tweets",
    "data": [{"index": 0, "label": "positive", "probs": [0.08, 0.92], "num_classes": 2}],
}
RANKED = {
    "object": "ranks",
    "model": "tweets",
    "layers": [{"name": "encoder.layer.0.attention.self.query", "max_rank": 8, "rank": 3.2}],
    "mean": 3.2,
}
