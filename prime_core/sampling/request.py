"""What can be asked of a model: the fields of a text request and of an image request, with their defaults."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from torch import Tensor

from prime_core.config import Config, UNetConfig
from prime_core.sampling.canvas import CanvasError, Numbers, Template, Tokens
from prime_core.sampling.correctors import Corrector
from prime_core.sampling.curves import TemperatureCurve, TimeWarp
from prime_core.sampling.presets import PRESETS
from prime_core.sampling.settings import ImageSampler
from prime_core.sampling.time_grid import Steps

DEFAULT_STEPS = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class TextRequest:
    """A request for text.

    Attributes:
        n: number of outputs, at least 1.
        steps: grid steps, or "exact".
        seed: 0..2**64-1; None draws one. Output r uses `row_seed(seed, r)`.
        temperature: 0..100.
        top_p: (0, 1].
        top_k: 0 keeps all.
        prompt: text or token ids before the gap; None or empty for none.
        suffix: text or token ids after the gap; None or empty for none, and then text may end early.
        template: strings and gaps `{"gap": number_of_tokens}` in order.
        max_tokens: tokens of the gap; None fills the context.
        stop: strings that end the text of a prompt.
        y: (L, S) known digits with ``codec.mask_index`` where free, in place of prompt, suffix and template.
    """

    n: int = 1
    steps: Steps = DEFAULT_STEPS
    seed: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    prompt: Tokens | None = None
    suffix: Tokens | None = None
    template: Template | None = None
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    y: Numbers | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageRequest:
    """A request for images.

    Attributes:
        n: number of images, at least 1.
        steps: grid steps, or "exact".
        seed: 0..2**64-1; None draws one. Image r uses `row_seed(seed, r)`.
        temperature: 0..100, or a curve over noise time.
        top_p: (0, 1].
        top_k: 0 keeps all.
        label: 0..num_labels-1 or a label's name, for class-conditional models; None draws one uniformly for every
            image from its seed.
        sampler: "ancestral" draws one token among those that agree with the visible digits; "published" draws every
            digit alone, as the published image sampler does. The difference is more than a name: see
            `prime_core.sampling.settings`.
        corrector: masks digits again, see `Corrector`; None for none.
        warp: warp of the time grid; None for none.
        known: (H, W, C) integers: pixel values 0..255, or -1 where free (in-painting).
        y: (C, H, W, S) known digits with ``codec.mask_index`` where free (imputation), in place of ``known``.
    """

    n: int = 1
    steps: Steps = DEFAULT_STEPS
    seed: int | None = None
    temperature: float | TemperatureCurve = 1.0
    top_p: float = 1.0
    top_k: int = 0
    label: int | str | None = None
    sampler: ImageSampler = "ancestral"
    corrector: Corrector | None = None
    warp: TimeWarp | None = None
    known: Numbers | None = None
    y: Numbers | None = None


Request = TextRequest | ImageRequest

# The fields of an image request that a preset fixes.
PRESET_FIELDS = ("steps", "temperature", "warp", "corrector", "sampler")


def make_request(config: Config, given: Mapping[str, Any]) -> Request:
    """Return the request that fits a model from its fields.

    Image models also take ``preset``, the name of published settings (`prime_core.sampling.presets`); fields that are
    given beside it come first.

    Args:
        config: configuration of the model.
        given: fields by name.

    Raises:
        CanvasError: a field is unknown to this kind of model, or there is no such preset.
    """
    is_text = not isinstance(config.model, UNetConfig)
    kind = TextRequest if is_text else ImageRequest
    known = {field.name for field in fields(kind)} | (set() if is_text else {"preset"})
    chosen = checked_fields(given, known, "a text model" if is_text else "an image model")
    return kind(**(chosen if is_text else fill_in_preset(chosen)))


def checked_fields(given: Mapping[str, Any], known: Collection[str], owner: str) -> dict[str, Any]:
    """Return the fields of a request, single numbers of numpy or torch as Python's own.

    Args:
        given: fields by name.
        known: the names that there are.
        owner: in messages, what the fields are of.

    Raises:
        CanvasError: a name is unknown.
    """
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
            raise CanvasError(name, f"{name} is no argument of {owner}; {hint}")
    return {name: value.item() if _is_number(value) else value for name, value in given.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, np.generic) or (isinstance(value, (np.ndarray, Tensor)) and value.ndim == 0)


def fill_in_preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an image request with those of the preset they name, if any, in its place.

    Fields that are given come first, None among them: ``corrector=None`` turns the preset's corrector off.

    Args:
        given: fields by name, ``preset`` among them or not.

    Raises:
        CanvasError: there is no such preset; the message lists them.
    """
    chosen = dict(given)
    name = chosen.pop("preset", None)
    if name is None:
        return chosen
    if name not in PRESETS:
        raise CanvasError("preset", f"preset must be one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    return {field: getattr(preset, field) for field in PRESET_FIELDS} | chosen
