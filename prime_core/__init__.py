"""MDM-Prime core: codec, schedule, objectives, networks and samplers, without any serving code."""

from prime_core.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from prime_core.sampling.canvas import CanvasError
from prime_core.sampling.prepare import ImageSample, NonFiniteError, Sample
from prime_core.sampling.sample import sample
from prime_core.scoring.score import score
from prime_core.scoring.scored import Score

__all__ = [
    "CanvasError",
    "Checkpoint",
    "CheckpointError",
    "ImageSample",
    "NonFiniteError",
    "Sample",
    "Score",
    "load_checkpoint",
    "sample",
    "save_checkpoint",
    "score",
]
