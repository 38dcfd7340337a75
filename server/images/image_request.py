"""From the fields of POST or GET /images to the request of the core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from prime_core.sampling.canvas import CanvasError
from prime_core.sampling.correctors import Corrector
from prime_core.sampling.curves import TemperatureCurve, TimeWarp
from prime_core.sampling.request import ImageRequest, fill_in_preset
from server.images.known import Known
from server.schemas.images import Curve, ImagesRequest

_FIELDS = (
    "n", "steps", "seed", "temperature", "top_p", "top_k", "label", "sampler", "warp", "corrector", "preset"
)  # fmt: skip
_Built = TypeVar("_Built")


def image_request_of(body: ImagesRequest, known: Known) -> ImageRequest:
    """Return the request for the core: the fields that were given, then those of the preset, then the defaults.

    Raises:
        CanvasError: if the numbers of a curve or of the corrector contradict each other.
    """
    fields: dict[str, Any] = {name: getattr(body, name) for name in _FIELDS}
    if isinstance(body.temperature, Curve):
        fields["temperature"] = _built("temperature", TemperatureCurve, body.temperature)
    if body.warp is not None:
        fields["warp"] = _built("warp", TimeWarp, body.warp)
    if body.corrector is not None:
        fields["corrector"] = _built("corrector", Corrector, body.corrector)
    given = {name: value for name, value in fields.items() if name in body.model_fields_set}
    defaults = {name: value for name, value in fields.items() if name != "preset"}
    return ImageRequest(**defaults | fill_in_preset(given), known=known.pixels, y=known.digits)


def _built(param: str, build: Callable[..., _Built], given: Any) -> _Built:
    try:
        return build(**given.model_dump())
    except ValueError as error:
        raise CanvasError(param, str(error)) from None
