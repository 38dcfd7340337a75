"""Settings of `prime-serve`: every field is a flag, an environment variable PRIME_... and a TOML key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from prime_core.device import DEVICE_PATTERN
from server.http.sites import parse_hosts
from server.logs import LogFormat
from server.model_sources import MAX_NAME_CHARS, ModelSource, demo_models, parse_models


class SettingsError(ValueError):
    """The settings cannot be used; the message names the setting, its range and where it came from."""


class Settings(BaseSettings):
    """All settings of the server, frozen. The descriptions are the help text of the flags."""

    model_config = SettingsConfigDict(
        env_prefix="PRIME_", env_ignore_empty=True, frozen=True, extra="forbid", allow_inf_nan=False
    )

    model: Annotated[tuple[ModelSource, ...], NoDecode] = Field(
        default_factory=demo_models,
        description="checkpoint, a folder or one .safetensors file: PATH or NAME=PATH; PATH alone is named by its last "
        "part, RUN/checkpoint by RUN; repeat it to serve several "
        "(as a variable: a JSON list, or between commas); default: the bundled demos",
    )
    served_model_name: str | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_NAME_CHARS,
        description="name of the only model in requests and answers; default: that of --model",
    )
    host: str = Field(default="127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="TCP port; 0 picks a free one")
    device: str = Field(default="auto", pattern=DEVICE_PATTERN, description="auto, cpu, cuda, cuda:N")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto, float32 or bfloat16"
    )
    num_threads: int | None = Field(
        default=None, ge=1, le=1024, description="CPU threads; default: torch's choice"
    )
    cuda_graphs: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="most CUDA graphs of each model, for batches that come again and again; 0: none. Needs a GPU; not "
        "measured yet",
    )
    max_batch_rows: int = Field(default=32, ge=1, le=65536, description="most rows in one denoiser call")
    max_batch_tokens: int = Field(
        default=16384, ge=1, le=2**24, description="most tokens in one denoiser call"
    )
    max_queue_rows: int = Field(
        default=512, ge=1, le=2**20, description="most rows held at once, waiting and running; beyond: 429"
    )
    max_queue_bytes: int = Field(
        default=2**30,
        ge=2**20,
        le=2**45,
        description="most memory of these rows in bytes: digits and plans; beyond: 429",
    )
    max_n: int = Field(default=64, ge=1, le=4096, description="most outputs of one request")
    max_steps: int = Field(default=4096, ge=1, le=2**20, description="most steps of one request")
    max_work: int = Field(
        default=2**24,
        ge=1,
        le=2**40,
        description="most n * tokens * steps of one request (steps: denoiser calls)",
    )
    max_body_bytes: int = Field(default=2**20, ge=1024, le=2**28, description="largest request body in bytes")
    max_held_body_bytes: int = Field(
        default=2**25,
        ge=1024,
        le=2**40,
        description="most bytes of bodies over 64 KiB held at once while they arrive and are parsed; beyond: 429",
    )
    max_connections: int = Field(
        default=1024,
        ge=1,
        le=2**20,
        description="most connections; beyond, those at rest are closed for new ones, and if all are at work, "
        "requests other than /health and /ready get 429",
    )
    receive_timeout_s: float = Field(
        default=10.0,
        gt=0,
        le=3600,
        description="seconds for a client to send a request in, or to read on in an answer",
    )
    max_request_s: float = Field(
        default=600.0,
        gt=0,
        le=86400,
        description="seconds in which a request must be answered once it was read; beyond: 504. A client may ask for "
        "less in the header X-Request-Timeout",
    )
    keep_alive_s: int = Field(
        default=15, ge=1, le=3600, description="seconds an idle connection is kept open"
    )
    api_keys_file: Path | None = Field(
        default=None,
        description="file of API keys, one a line or NAME:KEY, read again when it changes; keys may also be in the "
        "environment: PRIME_API_KEY, or PRIME_API_KEYS between commas; default: no key is asked for",
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default_factory=tuple,
        description="names that the server may be asked under besides localhost and addresses, between commas, or * "
        "for any; default: *, but no others on a loopback address without API keys",
    )
    drain_timeout_s: float = Field(
        default=600.0, ge=0, le=86400, description="seconds that SIGTERM waits for accepted requests"
    )
    stall_exit_s: float = Field(
        default=300.0,
        ge=0,
        le=86400,
        description="seconds that the engine may hang before the process ends, for its supervisor to start it again; "
        "0: never",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="how much to log"
    )
    log_format: LogFormat = Field(
        default="text", description="text, or json: one object a line; on stderr either way"
    )
    otlp_traces_endpoint: str | None = Field(
        default=None,
        description="URL to send traces to by OTLP over HTTP, such as http://127.0.0.1:4318/v1/traces; needs the "
        "extra otel; default: no traces",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("no setting is a boolean")
        return value

    @field_validator("model", mode="before")
    @classmethod
    def _parse_models(cls, value: Any) -> tuple[ModelSource, ...]:
        return parse_models(value)

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _parse_hosts(cls, value: Any) -> tuple[str, ...]:
        return parse_hosts(value)

    @field_validator("served_model_name")
    @classmethod
    def _name_one_model(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and len(info.data.get("model", [1])) > 1:
            raise ValueError("there is more than one model; name each in --model NAME=PATH")
        return value

    @field_validator("max_queue_rows")
    @classmethod
    def _hold_a_batch(cls, value: int, info: ValidationInfo) -> int:
        rows = info.data.get("max_batch_rows")
        if rows is not None and value < rows:
            raise ValueError(f"must be at least max_batch_rows ({rows}), or a call could never be full")
        return value

    @field_validator("max_held_body_bytes")
    @classmethod
    def _hold_a_body(cls, value: int, info: ValidationInfo) -> int:
        size = info.data.get("max_body_bytes")
        if size is not None and value < size:
            raise ValueError(f"must be at least max_body_bytes ({size}), or such a body could never be read")
        return value

    @field_validator("max_n")
    @classmethod
    def _fit_the_queue(cls, value: int, info: ValidationInfo) -> int:
        rows = info.data.get("max_queue_rows")
        if rows is not None and value > rows:
            raise ValueError(
                f"must be at most max_queue_rows ({rows}), or such a request could never be accepted"
            )
        return value

    @field_validator("otlp_traces_endpoint")
    @classmethod
    def _name_a_collector(cls, value: str | None) -> str | None:
        if value is not None and not _is_http_url(value):
            raise ValueError("must be an http or https URL, such as http://127.0.0.1:4318/v1/traces")
        return value

    @property
    def models(self) -> tuple[ModelSource, ...]:
        """What to serve, under the names to be used."""
        if self.served_model_name is None:
            return self.model
        return (ModelSource(self.served_model_name, self.model[0].path),)


def _is_http_url(text: str) -> bool:
    if not re.fullmatch("[!-~]+", text):  # `urlsplit` would leave line ends out
        return False
    try:
        url = urlsplit(text)
        return url.scheme in {"http", "https"} and bool(url.hostname) and url.port != 0
    except ValueError:  # a port that is none, or brackets of an address that is none
        return False
