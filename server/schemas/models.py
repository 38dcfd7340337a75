"""GET /v1/models: what an answer holds, in OpenAI's shape."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from server.schemas.base import Strict


class Model(Strict):
    """A loaded model."""

    id: str = Field(description="its name in requests")
    object: Literal["model"] = "model"
    created: int = Field(description="Unix time in seconds at which it was loaded")
    owned_by: str


class ModelList(Strict):
    """Answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]
