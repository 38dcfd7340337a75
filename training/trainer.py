"""One training run: its data, network, optimiser and averaged weights, advanced step by step.

One step: draw rows, mask them at antithetic noise times, take the objective's gradient over micro-batches,
clip, update, average. Everything random is a function of (seed, step), so a run that is killed and resumed
equals one that was not, bit for bit on a CPU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from prime_core.checkpoint import save_checkpoint
from prime_core.codec import SubtokenCodec
from prime_core.config import Config, explain
from prime_core.corruption import antithetic_times
from prime_core.device import choose_device
from prime_core.likelihood import Likelihood, estimate_likelihood
from prime_core.models.build import build_denoiser
from prime_core.objectives import training_loss
from prime_core.pictures import to_png
from prime_core.schedule import Schedule
from training.config import TrainConfig
from training.data.dataset import BlockOrder
from training.data.rows import RowSource, evenly_spread, stack_rows
from training.images.preview import draw_preview
from training.optim import ExponentialMovingAverage, build_optimizer, learning_rate
from training.setup import RunData, codec_permutation, open_data
from training.state import load_state, save_state

CHECKPOINT_NAME = "checkpoint"
_EVAL_DRAWS = 2  # masks of a held-out row
# Settings that may change when a run is resumed: how long it goes on, and what changes no weight.
_FREE_SETTINGS = {
    "steps",
    "decay_steps",
    "output",
    "log_every",
    "eval_every",
    "eval_rows",
    "preview",
    "preview_steps",
    "save_every",
    "save_every_s",
    "checkpoint_dtype",
    "num_threads",
    "device",
}


class Trainer:
    """One run.

    Attributes:
        config: its settings.
        data: what it learns from.
        model: the network, with the weights of the last step.
        optimizer: AdamW.
        ema: the averaged weights.
        step: optimiser steps done.
        saved_step: step of the state on disk; -1 before there is one.
        exported_step: step of the checkpoint that this process wrote last; -1 before.
    """

    def __init__(self, config: TrainConfig, *, progress: bool = True) -> None:
        """Open the data, build the network, and resume if the output folder holds a state.

        Args:
            config: the run.
            progress: show a progress bar while data is converted.

        Raises:
            ValueError: the data, tokenizer or codec do not fit, or the folder holds another run.
            FileNotFoundError: a tokenizer file is missing.
        """
        self.config = config
        self.device = choose_device(config.device)
        self.codec: SubtokenCodec = config.codec.build(codec_permutation(config))
        self.schedule: Schedule = config.schedule.build()
        # Before the data: a network that cannot be is reported at once.
        self._model_config = _model_config(config)
        self.data: RunData = open_data(config, progress=progress)
        self._model_config = _model_config(config, self.data.label_names)
        self.order = BlockOrder(self.data.train.num_rows, config.seed)
        with _seeded(config.seed, self.device):
            self.model = build_denoiser(self._model_config).to(self.device)
        self.optimizer = build_optimizer(config, self.model)
        self.ema = ExponentialMovingAverage(
            self.model.named_parameters(), config.ema_decay, warmup=config.ema_warmup
        )
        self.run = json.dumps(config.model_dump(mode="json", exclude=_FREE_SETTINGS), sort_keys=True)
        resumed = load_state(config.output, self.model, self.optimizer, self.ema, self.run)
        self.step = 0 if resumed is None else resumed
        self.saved_step = -1 if resumed is None else resumed
        self.exported_step = -1  # a kill may have come between state and checkpoint
        if self.step > config.steps:
            raise ValueError(
                f"{config.output} holds a run at step {self.step}, past steps = {config.steps}; raise steps, "
                "or choose another output"
            )

    def train_step(self) -> dict[str, float]:
        """Take one optimiser step.

        Returns:
            loss (nats per token), grad_norm, learning_rate.

        Raises:
            FloatingPointError: the loss or gradient is not finite; no weight has changed.
        """
        config = self.config
        generator = torch.Generator().manual_seed(_step_seed(config.seed, self.step))
        rows = self._rows()
        x_0 = stack_rows(self.data.train, rows)
        t = antithetic_times(config.batch_size, generator, config.eps)
        uniforms = torch.rand(*x_0.shape, config.codec.target_length, generator=generator)
        labels = self.data.labels.of(self.data.train, rows, generator)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        # Rows go to micro-batches in turn, so that each holds an even spread of noise times.
        num_parts = config.batch_size // config.micro_batch_size
        parts = [slice(first, None, num_parts) for first in range(num_parts)]
        with _seeded(_step_seed(config.seed + 1, self.step), self.device):  # dropout
            loss = sum(
                self._backward(x_0[part], t[part], uniforms[part], None if labels is None else labels[part])
                for part in parts
            )
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip))
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise FloatingPointError(
                f"step {self.step}: loss {loss}, gradient norm {grad_norm}; training stops before this "
                "update and the last saved state stands. Lower learning_rate, or train in float32"
            )
        rate = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.ema.update(self.model.named_parameters())
        self.step += 1
        return {"loss": loss, "grad_norm": grad_norm, "learning_rate": rate}

    def evaluate(self) -> dict[str, float]:
        """Estimate the averaged weights' bound and coded loss on held-out rows.

        Returns:
            heldout_nelbo and heldout_coded_loss in nats per token; heldout_bpd, the bound in bits per pixel value,
            for images; heldout_entropy in nats per token, below which no bound can be, where it is known. Empty
            without held-out rows.
        """
        heldout = self.data.heldout
        if heldout is None:
            return {}
        rows = evenly_spread(self.config.eval_rows, heldout.num_rows)
        generator = torch.Generator().manual_seed(0)
        with self._averaged_weights(), self._autocast():
            self.model.eval()
            size = max(1, self.config.micro_batch_size // _EVAL_DRAWS)
            batches = [rows[first : first + size] for first in range(0, len(rows), size)]
            results = [self._likelihood(heldout, batch.tolist(), generator) for batch in batches]
        nelbo, coded_loss = (float(torch.cat(parts).mean()) for parts in zip(*results, strict=True))
        length, dimensions = self.config.model.length, self.data.num_dimensions
        figures = {"heldout_nelbo": nelbo / length, "heldout_coded_loss": coded_loss / length}
        if dimensions is not None:
            figures["heldout_bpd"] = nelbo / dimensions / math.log(2)
        if self.data.entropy is not None:
            figures["heldout_entropy"] = self.data.entropy / length
        return figures

    def preview(self) -> bytes | None:
        """Draw samples with the averaged weights: a PNG file, or None where there is nothing to look at.

        Raises:
            FloatingPointError: the averaged weights give values that are not finite.
        """
        config, paint = self.config, self.data.paint
        if paint is None or not config.preview:
            return None
        labels = self.data.labels.in_order(config.preview)
        with self._averaged_weights(), self._autocast():
            self.model.eval()
            samples = draw_preview(
                self.model, self.codec, self.schedule, config.model.length, config.preview_steps, labels
            )
        return to_png(paint(samples))

    def save(self) -> None:
        """Save the state of the run, then the checkpoint that is served (averaged weights).

        Raises:
            OSError: the disk is full, say; the last state and checkpoint stand.
            FloatingPointError: a weight is not finite; likewise.
        """
        config = self.config
        for name, parameter in self.model.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise FloatingPointError(
                    f"step {self.step}: {name} holds values that are not finite; nothing was saved and the "
                    "last saved state stands. Lower learning_rate, or train in float32"
                )
        save_state(config.output, self.step, self.model, self.optimizer, self.ema, self.run)
        self.saved_step = self.step
        provenance = {
            "step": self.step,
            "steps": config.steps,
            "decay_steps": config.decay_steps,
            "weights": "ema",
            "training": json.loads(self.run),
        }
        save_checkpoint(
            config.output / CHECKPOINT_NAME,
            self._model_config.model_copy(update={"provenance": provenance}),
            self.ema.shadow,
            permutation=self.codec.permutation,
            tokenizer_file=self.data.tokenizer_file,
            dtype=getattr(torch, config.checkpoint_dtype),
        )
        self.exported_step = self.step

    def _rows(self) -> list[int]:
        """Return the numbers of the rows of this step."""
        first = self.step * self.config.batch_size
        return [self.order.index(first + row) for row in range(self.config.batch_size)]

    def _likelihood(self, source: RowSource, rows: list[int], generator: torch.Generator) -> Likelihood:
        """Estimate nelbo and coded loss of some rows; a bound too for labels that are drawn (Jensen)."""
        labels = self.data.labels.of(source, rows, generator)
        return estimate_likelihood(
            self.model,
            self.codec,
            self.schedule,
            stack_rows(source, rows).to(self.device),
            generator=generator,
            num_draws=_EVAL_DRAWS,
            chunk_rows=self.config.chunk_rows,
            labels=None if labels is None else labels.to(self.device),
        )

    def _backward(self, x_0: Tensor, t: Tensor, uniforms: Tensor, labels: Tensor | None) -> float:
        """Add the gradient of one micro-batch; return its share of the loss."""
        config = self.config
        with self._autocast():
            loss = training_loss(
                self.model,
                self.codec,
                self.schedule,
                x_0.to(self.device),
                t.to(self.device),
                uniforms.to(self.device),
                objective=config.objective,
                carry_over=config.carry_over,
                weighted=config.weighted,
                chunk_rows=config.chunk_rows,
                labels=None if labels is None else labels.to(self.device),
            )
        share = len(x_0) / config.batch_size
        (loss * share).backward()
        return float(loss.detach()) * share

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        own = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self._copy_weights(self.ema.shadow)
        try:
            yield
        finally:
            self._copy_weights(own)

    @torch.no_grad()
    def _copy_weights(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(weights[name])


def _model_config(config: TrainConfig, label_names: tuple[str, ...] = ()) -> Config:
    """Return what goes into the checkpoint.

    Raises:
        ValueError: network, codec, tokenizer and names contradict each other; one line that says how.
    """
    try:
        return Config(
            model=config.model,
            codec=config.codec,
            schedule=config.schedule,
            tokenizer=config.data.tokenizer,
            label_names=label_names,
        )
    except ValidationError as error:
        raise ValueError(explain(error)) from None


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's own generators, which initialisation and dropout use, and give them back as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _step_seed(seed: int, step: int) -> int:
    """Mix seed and step into a 63-bit generator seed."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))
