"""The frames of a stream: a text or an image in the middle of sampling.

Positions are those of tokens: of an image in channel-major order, as everywhere.
"""

from __future__ import annotations

from pydantic import Field

from server.schemas.base import Strict


class DenoiseFrame(Strict):
    """What happened to one output since its last frame; a slow reader gets fewer and larger ones."""

    output: int = Field(description="number of the output, from 0")
    step: int = Field(description="the step of the grid that it has reached")
    nfe: int = Field(description="denoiser calls that it has taken part in")
    progress: float = Field(
        ge=0, le=1, description="of the whole request: calls done over calls needed, exact"
    )
    eta_s: float | None = Field(description="seconds to the end of the request, at its pace so far")
    positions: list[int] = Field(description="tokens that changed, in order")
    digits: list[list[int | None]] = Field(
        description="all digits of each of them, most significant first; null where masked"
    )


class TextFrame(DenoiseFrame):
    """A text in the middle of sampling."""

    text: str = Field(description="the whole text so far, with ░ for every token that is not known yet")
    pieces: list[str | None] = Field(
        description="the text of each token that changed; null where it is not known yet"
    )
    revealed: list[float] = Field(description="the share of known digits of each token that changed, 0 to 1")
    gaps: list[tuple[int, int]] | None = Field(
        default=None,
        description="first token of every gap and the one after its last, in the first frame of an output; then null",
    )


class ImageFrame(DenoiseFrame):
    """An image in the middle of sampling."""

    b64_json: str | None = Field(
        description="a PNG in base64, masked digits at the middle of their range; null between two pictures"
    )
