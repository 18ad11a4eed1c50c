"""What goes over HTTP, as pydantic models: the OpenAPI description is made of them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from common.retrieval.documents import Document, as_documents

MAX_QUERY = 8192  # characters
MAX_PASSAGES = 1000  # of a request to /rerank, documents of one to /documents
MAX_TEXT = 200_000  # characters of a passage or document
MAX_PROMPTS = 16  # prompts times n
MAX_NEW_TOKENS = 1024
MAX_DEPTH = 32  # of a document's metadata


def _words(text: str) -> str:
    if not text.strip():
        raise ValueError("give some words")
    return text


def _whole(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


def _depth(value: Any) -> int:
    """How deep a JSON value is nested, counted no further than MAX_DEPTH + 1."""
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        inner = [list(item.values()) if isinstance(item, dict) else item for item in level]
        level = [part for item in inner if isinstance(item, list) for part in item]
        depth += 1
    return depth


Words = Annotated[str, StringConstraints(max_length=MAX_QUERY), AfterValidator(_words)]
Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
Count = Annotated[int, BeforeValidator(_whole)]
Id = Annotated[str, StringConstraints(min_length=1, max_length=512)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class Strict(BaseModel):
    """Of our own routes: a field that we do not know is an error."""

    model_config = ConfigDict(extra="forbid")


class Shared(BaseModel):
    """Of routes with other people's clients, whose other fields are passed over."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class Problem(BaseModel):
    """What was wrong, and for a body where."""

    message: str
    type: str
    fields: list[str] = []


class Refused(BaseModel):
    error: Problem


# /rerank


class TextObject(Shared):
    text: Text


class RerankRequest(Shared):
    """Cohere's and Jina's form (`documents`), or text-embeddings-inference's (`texts`)."""

    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra={
            "examples": [
                {"query": "sort a list", "documents": ["sorted returns a list", "json.dumps"], "top_n": 1},
                {"query": "sort a list", "texts": ["sorted returns a list", "json.dumps"]},
            ]
        },
    )
    query: Words
    documents: list[Text | TextObject] | None = Field(None, min_length=1, max_length=MAX_PASSAGES)
    texts: list[Text] | None = Field(None, min_length=1, max_length=MAX_PASSAGES)
    model: str | None = Field(None, max_length=200)
    top_n: Count | None = Field(None, ge=1, le=1_000_000)
    return_documents: bool = False
    return_text: bool = False
    raw_scores: bool = False

    @model_validator(mode="after")
    def _one_form(self) -> RerankRequest:
        if (self.documents is None) == (self.texts is None):
            raise ValueError("give either `documents` or `texts`")
        return self

    @property
    def passages(self) -> list[str]:
        given = self.documents if self.documents is not None else self.texts or []
        return [item if isinstance(item, str) else item.text for item in given]


class RerankResult(BaseModel):
    """`relevance_score` is the logistic function of the raw `score`: it orders, and is no probability."""

    index: int
    relevance_score: float
    score: float
    resonance: float
    overlap: float
    coherence: float
    document: TextObject | None = None


class RerankResponse(BaseModel):
    id: str
    model: str
    results: list[RerankResult]
    seconds: float


class TextScore(BaseModel):
    index: int
    score: float
    text: str | None = None


# /search, /context, /feedback


class SearchRequest(Strict):
    model_config = ConfigDict(json_schema_extra={"examples": [{"query": "sort a list", "top_k": 5}]})
    query: Words
    top_k: Count = Field(5, ge=1, le=200)
    rerank: bool = True


class FirstStageHit(BaseModel):
    rank: int
    id: str
    title: str
    score: float


class SearchHit(BaseModel):
    rank: int
    first_rank: int
    id: str
    document: str
    title: str
    text: str
    metadata: dict[str, Any]
    score: float = Field(description="Orders the hits: fused, or the first stage's.")
    first_score: float
    reranker: float | None
    resonance: float | None = Field(description="[-1, 1]")
    overlap: float | None = Field(description="[0, 1]")
    coherence: float | None = Field(description="[0, 1]")


class SearchResponse(BaseModel):
    id: str | None = Field(description="For /feedback; null when the search could not be stored.")
    query: str
    hits: list[SearchHit]
    first_stage: list[FirstStageHit]
    first_stage_name: str
    reranked: bool
    fallback: str | None = Field(description="Why the first stage's order is given instead.")
    confidence: float | None
    cache_hit: bool
    seconds: dict[str, float]
    model: str | None
    index_version: int


class ContextRequest(Strict):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"query": "sort a list", "top_k": 3, "max_tokens": 500}]}
    )
    query: Words
    top_k: Count = Field(3, ge=1, le=50)
    max_tokens: Count = Field(1000, ge=1, le=100_000)


class Source(BaseModel):
    number: int
    id: str
    title: str
    metadata: dict[str, Any]
    score: float


class ContextResponse(BaseModel):
    id: str | None
    text: str
    tokens: int
    sources: list[Source]
    reranked: bool
    fallback: str | None
    confidence: float | None


class FeedbackRequest(Strict):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"search": "0123456789abcdef", "document": "a", "value": 1}]}
    )
    search: Id
    document: Id
    value: Annotated[Literal[-1, 1], BeforeValidator(_whole)]


class Stored(BaseModel):
    stored: bool


# /documents


class DocumentObject(Strict):
    id: Id | None = None
    text: Text
    title: str = Field("", max_length=2000)
    metadata: dict[str, Any] = {}


class DocumentsRequest(Strict):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "documents": [
                        {"id": "a", "title": "Sorting", "text": "sorted gives a new list."},
                        {"text": "A text gets an id of its own.", "metadata": {"source": "b.html"}},
                    ]
                }
            ]
        }
    )
    documents: list[Text | DocumentObject] = Field(min_length=1, max_length=MAX_PASSAGES)

    def checked(self) -> list[Document]:
        """Documents of common.retrieval. ValueError or UserError for what cannot be one."""
        items = [item if isinstance(item, str) else item.model_dump() for item in self.documents]
        if any(_depth(item) > MAX_DEPTH for item in items):
            raise ValueError(f"`metadata` is nested deeper than {MAX_DEPTH}")
        json.dumps(items, allow_nan=False)
        return as_documents(items)


class DocumentsResponse(BaseModel):
    added: int
    updated: int
    unchanged: int
    ids: list[str]
    version: int


class DeletedResponse(BaseModel):
    deleted: int
    version: int


# /v1/completions

Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Prompt = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT)]


class CompletionRequest(Shared):
    """OpenAI's form, with `top_k`, `min_p` and `repetition_penalty` beside it."""

    model_config = ConfigDict(
        extra="ignore",
        protected_namespaces=(),
        json_schema_extra={
            "examples": [{"prompt": "The array is", "max_tokens": 32, "temperature": 0.8, "top_p": 0.95}]
        },
    )
    prompt: Prompt | list[Prompt]
    model: str | None = Field(None, max_length=200)
    max_tokens: Count = Field(16, ge=1, le=MAX_NEW_TOKENS)
    temperature: Number = Field(1.0, ge=0, le=100)
    top_p: Number = Field(1.0, gt=0, le=1)
    top_k: Count = Field(0, ge=0, le=1_000_000)
    min_p: Number = Field(0.0, ge=0, le=1)
    repetition_penalty: Number = Field(1.0, gt=0, le=100)
    frequency_penalty: Literal[0] | None = Field(None, description="Not there: use repetition_penalty.")
    presence_penalty: Literal[0] | None = Field(None, description="Not there: use repetition_penalty.")
    logprobs: None = None
    n: Count = Field(1, ge=1, le=MAX_PROMPTS)
    best_of: Literal[1] | None = None
    echo: bool = False
    stream: bool = False
    seed: Count | None = Field(None, ge=0, le=2**31 - 1)
    stop: Stop | list[Stop] | None = Field(None)

    @model_validator(mode="after")
    def _few(self) -> CompletionRequest:
        if not self.prompts:
            raise ValueError("`prompt` is an empty list")
        if len(self.prompts) * self.n > MAX_PROMPTS:
            raise ValueError(f"prompts times n is over {MAX_PROMPTS}")
        if len(self.stops) > 16:
            raise ValueError("more than 16 texts under `stop`")
        return self

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class Choice(BaseModel):
    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    logprobs: None = None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionResponse(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class ModelObject(BaseModel):
    id: str
    object: Literal["model"] = "model"
    owned_by: str = "resonance"


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelObject]


# /health, /ready


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """`reranker`: up, down (answers are the first stage's) or none."""

    ready: bool
    reranker: Literal["up", "down", "none"]
    model: str | None
    language_model: str | None
    documents: int | None
    passages: int | None
    index_version: int | None
    problem: str | None = None
