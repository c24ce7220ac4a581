"""OpenAI's requests, and its errors. What this server does not do is refused rather than ignored."""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from alignx_ds.data.rows import Chat, Turn
from alignx_ds.errors import SHOWN, presentable
from alignx_ds.evaluation.sampling import Sampling

MOST_TOP_LOGPROBS = 20
MOST_STOPS = 16
LONGEST = 1000  # characters of an error's message, which quotes the request
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
# Parameters that change nothing in an answer.
IGNORED = (
    *("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention"),
)
UNSUPPORTED: dict[str, tuple[Any, ...]] = {  # with the values, beside null, that ask for nothing
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": ("none",),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry = status, param, code, retry

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        message = presentable(str(self))
        message = message if len(message) <= LONGEST else f"{message[:LONGEST]}…"
        error = {"message": message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool | None = None


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: int | None = None
    stop: list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    axes: dict[str, Annotated[float, Field(ge=0, le=1)]] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _usable(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and (len(value) > MOST_STOPS or "" in value):
            raise ValueError(f"give at most {MOST_STOPS} strings, none of them empty")
        return value

    @property
    def answers(self) -> int:
        """How many per prompt."""
        return self.n or 1

    def _sampling(self, top_logprobs: int | None) -> Sampling:
        temperature = 1.0 if self.temperature is None else self.temperature
        return Sampling(temperature, 1.0 if self.top_p is None else self.top_p, self.seed, top_logprobs)

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def needs(self, experts: list[str]) -> list[float] | None:
        """Of every axis, from `axes`: those that are not named are not needed."""
        return None if self.axes is None else needs_of(self.axes, experts)


Kind = TypeVar("Kind", bound=_Request)
Model = TypeVar("Model", bound=BaseModel)


class ChatRequest(_Request):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None

    @property
    def sampling(self) -> Sampling:
        return self._sampling((self.top_logprobs or 0) if self.logprobs else None)

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def chat(self) -> Chat:
        return chat_of(self.messages)


class CompletionRequest(_Request):
    """The body of /v1/completions. A prompt is text as the model reads it, or token ids."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None

    @property
    def sampling(self) -> Sampling:
        return self._sampling(self.logprobs)

    @property
    def limit(self) -> int:
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    def prompts(self) -> list[str | list[int]]:
        if not self.prompt and isinstance(self.prompt, list):
            raise ApiError(400, "prompt: got an empty list; give at least one prompt", param="prompt")
        return prompts_of(self.prompt)


class RoutedRequest(BaseModel):
    """What a router reads of a body; the rest is for the server behind it."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    stream: bool | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    prompt: str | list[str] | list[int] | list[list[int]] | None = None
    axes: dict[str, Annotated[float, Field(ge=0, le=1)]] | None = None

    def one_prompt(self) -> str | list[int]:
        """The prompt of /v1/completions, of which each could need another expert."""
        prompts = [] if self.prompt is None else prompts_of(self.prompt)
        if len(prompts) != 1:
            raise ApiError(400, f"prompt: got {len(prompts)}; give one prompt a request", param="prompt")
        return prompts[0]


def needs_of(axes: dict[str, float], experts: list[str]) -> list[float]:
    """Of every axis of the model, in its order. Raises ApiError for a name that it does not have."""
    if not experts:
        raise ApiError(400, "this model is dense and has no axes; leave axes out", param="axes")
    if unknown := sorted(axes.keys() - set(experts[1:])):
        fix = f"its axes are {', '.join(experts[1:])}; name those that shall serve"
        raise ApiError(400, f"{unknown[0]!r} is no axis of this model; {fix}", param="axes")
    return [axes.get(name, 0.0) for name in experts[1:]]


def chat_of(messages: list[dict[str, Any]]) -> Chat:
    """The dialogue. Raises ApiError for a message that has no text, and where the last is not the user's."""
    turns = tuple(_turn(message, f"messages.{number}") for number, message in enumerate(messages))
    if turns[-1].role != "user":
        raise ApiError(400, "the last message has to be the user's, which the model answers", param="messages")
    return turns


def prompts_of(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """Texts, or token ids, of /v1/completions."""
    if isinstance(prompt, str):
        return [prompt]
    ids = [token for token in prompt if isinstance(token, int)]
    return [ids] if ids else [part for part in prompt if not isinstance(part, int)]


def read_object(body: bytes) -> dict[str, Any]:
    """The body's JSON object. Raises ApiError."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON ({error}); send one JSON object") from error
    if not isinstance(given, dict):
        raise ApiError(400, f"the body is a JSON {type(given).__name__}; send one JSON object")
    return given


def validated(kind: type[Model], given: dict[str, Any]) -> Model:
    """Raises ApiError, which says what is wrong with the request and where."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _explained(error) from error


def parsed(kind: type[Kind], body: bytes) -> Kind:
    """Raises ApiError, which says what is wrong with the body and where."""
    given = read_object(body)
    for name, neutral in UNSUPPORTED.items():
        value = given.pop(name, None)
        if value is not None and value not in neutral:
            raise ApiError(400, f"{name} is not supported by this server; leave it out", param=name)
    return validated(kind, {name: value for name, value in given.items() if name not in IGNORED})


def _explained(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{where} is no parameter of this endpoint; leave it out", param=where)
    if first["type"] == "missing":
        return ApiError(400, f"{where} is missing; add it", param=where)
    given = repr(first["input"])
    given = given if len(given) <= SHOWN else f"{given[:SHOWN]}…"
    return ApiError(400, f"{where}: got {given}; {first['msg'][:1].lower()}{first['msg'][1:]}", param=where)


def _turn(message: dict[str, Any], where: str) -> Turn:
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(ROLES)
        raise ApiError(400, f"{where}.role: got {role!r}; this server knows {known}", param=f"{where}.role")
    return Turn(ROLES[role], _text(message.get("content"), f"{where}.content"))  # type: ignore[arg-type]


def _text(content: Any, where: str) -> str:
    """A message's text: a string, or OpenAI's list of parts, which have to be text."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ApiError(400, f"{where} has to be a string, or a list of parts of the type text", param=where)
    return "".join(texts)  # type: ignore[arg-type]
