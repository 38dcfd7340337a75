"""MDM-Prime core: codec, schedule, objectives, networks and samplers, without any serving code."""

from prime_core.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from prime_core.prepare import Sample
from prime_core.sample import sample

__all__ = ["Checkpoint", "CheckpointError", "Sample", "load_checkpoint", "sample", "save_checkpoint"]
