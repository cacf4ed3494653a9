"""What a browser may ask for: checked as it is read, refused with one line that says why."""

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from chargpt.errors import ConfigError, one_line

MAX_MODELS = 6
MAX_PROMPT = 10_000  # characters
MAX_LENGTH = 2_000  # characters of a continuation
MAX_TEXT = 5_000  # characters to be surprised by
MAX_REASON = 300  # characters of a refusal
LIMITS = {"models": MAX_MODELS, "prompt": MAX_PROMPT, "length": MAX_LENGTH, "text": MAX_TEXT}

Models = Annotated[list[int], Field(min_length=1, max_length=MAX_MODELS)]


class Ask(BaseModel):
    """Fields of their own type, within bounds, and no others."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Continue(Ask):
    """A prompt that some models continue at once."""

    models: Models
    prompt: str = Field(min_length=1, max_length=MAX_PROMPT)
    length: int = Field(300, ge=1, le=MAX_LENGTH)
    temperature: float = Field(0.8, ge=0, le=100)
    top_k: int | None = Field(None, ge=1, le=1_000_000)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int = Field(0, ge=0, lt=2**31)


class Attention(Ask):
    """What a model reads to predict the character after a text."""

    model: int
    text: str = Field(min_length=1, max_length=MAX_PROMPT)


class Surprise(Ask):
    """How much every character of a text surprises some models."""

    models: Models
    text: str = Field(min_length=1, max_length=MAX_TEXT)


Asked = TypeVar("Asked", bound=Ask)


def read(schema: type[Asked], body: bytes) -> Asked:
    """The request in `body`, JSON; ConfigError naming the first field that is wrong."""
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the request"
        raise ConfigError(one_line(f"{place}: {first['msg']}")[:MAX_REASON]) from None
