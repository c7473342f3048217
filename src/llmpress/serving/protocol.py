"""What requests may say, in OpenAI's words, and what is refused.

Fields that would change an answer and are not supported are an error, never ignored.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "parallel_tool_calls"),
}
"""Fields that change no answer."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
}
"""Fields whose only supported value is the one that changes nothing."""
MOST_CHOICES = 16
MOST_STOPS = 16


class StreamOptions(BaseModel):
    """What a stream says beside the text."""

    include_usage: bool = False


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _known(self) -> "_Request":
        for name, value in (self.model_extra or {}).items():
            if value is not None and name not in IGNORED and value not in NEUTRAL.get(name, ()):
                raise ValueError(f"{name} is not supported here; leave it out")
        if len(self.stops) > MOST_STOPS or not all(self.stops):
            raise ValueError(f"stop: allowed are up to {MOST_STOPS} strings, none of them empty")
        return self

    @property
    def stops(self) -> list[str]:
        """All strings that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_Request):
    """A text to continue, several of them, or their tokens."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def prompts(self) -> list[str | list[int]]:
        """One for each text."""
        several = isinstance(self.prompt, list) and self.prompt
        if several and not isinstance(self.prompt[0], int):
            return list(self.prompt)  # type: ignore[arg-type]
        return [self.prompt]  # type: ignore[list-item]

    @property
    def num_logprobs(self) -> int | None:
        """The most probable tokens to tell of each; None for no log probabilities."""
        return self.logprobs


class ChatRequest(_Request):
    """A chat to continue, with tools that may be called."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] = "auto"
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    max_completion_tokens: int | None = Field(None, ge=1)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return self

    @property
    def num_logprobs(self) -> int | None:
        """The most probable tokens to tell of each; None for no log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class LoadRequest(BaseModel):
    """A delta to serve under a name from now on."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1)
    source: str = Field(min_length=1)


class UnloadRequest(BaseModel):
    """The name of a delta that is no longer served."""

    model_config = ConfigDict(extra="forbid")

    name: str
