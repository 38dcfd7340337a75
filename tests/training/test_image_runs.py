"""Image runs through the one trainer: the shipped configurations learn, and a killed run goes on bit for bit."""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from prime_core.checkpoint import load_checkpoint
from prime_core.sampling.stepper import Stepper
from tests.training.data.images import image_files
from tests.training.data.images.image_files import (
    Made,
    make_cifar_binary,
    make_folder,
    make_imagenet32_batches,
)
from tests.training.picture_sets import write_fashion_files
from tests.training.small_run import assert_same_run, load_run, metrics_of
from tests.training.test_resume import interrupt_run
from training import trainer as trainer_module
from training.data.images import DataError
from training.images import preview
from training.images.evaluate import ImageEvalConfig, evaluate_images
from training.train import train
from training.trainer import Trainer

CONFIGS = Path(__file__).resolve().parents[2] / "training" / "configs"
# The shipped network, schedule and optimiser at a size that takes seconds.
SMALL = [
    *("--model.model-channels", "96", "--model.channel-mult", "1", "--model.num-res-blocks", "1"),
    *(
        "--model.attention-rates",
        "--model.head-channels",
        "32",
        "--batch-size",
        "4",
        "--micro-batch-size",
        "2",
    ),
    *(
        "--chunk-rows",
        "8192",
        "--precision",
        "float32",
        "--device",
        "cpu",
        "--num-threads",
        "1",
        "--steps",
        "6",
    ),
    *("--learning-rate", "3e-3", "--warmup-steps", "0", "--log-every", "1", "--eval-every", "4"),
    *("--eval-rows", "1", "--preview", "0", "--save-every", "4"),
]
UNET_RUN = """
objective = "coded"
weighted = false
steps = 8
batch_size = 2
micro_batch_size = 1
chunk_rows = 512
learning_rate = 3e-3
warmup_steps = 2
ema_decay = 0.9
ema_warmup = true
log_every = 1
eval_every = 4
eval_rows = 2
preview = 4
preview_steps = 3
save_every = 2
precision = "bfloat16"
device = "cpu"
num_threads = 1

[model]
kind = "unet"
channels = 1
height = 28
width = 28
model_channels = 32
channel_mult = [1, 1]
num_res_blocks = 1
attention_rates = [2]
head_channels = 32
dropout = 0.2
labels = "class"
num_labels = 10

[codec]
vocab_size = 256
target_length = 2

[schedule]
kind = "polynomial"
power = 3.0

[data]
kind = "images"
dataset = "fashion-mnist"
path = "{path}"
flip = true
"""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _dark(n: int, shape: tuple[int, int, int], classes: int, seed: int) -> Made:
    """Noise in 0..15 only: a network that learns this halves its loss."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 16, (n, *shape), dtype=np.uint8)
    return pixels, np.arange(n, dtype=np.int64) % classes


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("cifar10-prime-l2", make_cifar_binary),
        ("cifar10-supertoken", make_cifar_binary),
        ("imagenet32-mixture", make_imagenet32_batches),
    ],
)
def test_shipped_configs_train_on_files_in_the_official_format(
    name: str, make: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "random_images", _dark)
    make(tmp_path / "data")
    files = ["--data.path", str(tmp_path / "data"), "--data.cache", str(tmp_path / "cache")]
    with pytest.raises(DataError, match="set verify to false"):
        train(load_run(CONFIGS / f"{name}.toml", tmp_path / "run", *SMALL, *files), progress=False)
    files += ["--data.verify", "false"]
    if name == "cifar10-supertoken":
        # A head over 4,096 pairs is most of a step at this size.
        files += ["--batch-size", "1", "--micro-batch-size", "1", "--steps", "3"]
    config = load_run(CONFIGS / f"{name}.toml", tmp_path / "run", *SMALL, *files)
    train(config, progress=False)
    losses = [record["loss"] for record in metrics_of(tmp_path / "run") if "loss" in record]
    assert len(losses) == config.steps
    assert losses[-1] < 0.9 * losses[0], losses
    assert load_checkpoint(tmp_path / "run/checkpoint").config.provenance["step"] == config.steps


def test_a_killed_image_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    write_fashion_files(tmp_path / "data", 32, 8)
    config = tmp_path / "run.toml"
    config.write_text(UNET_RUN.format(path=tmp_path / "data"))
    train(load_run(config, tmp_path / "unbroken"), progress=False)
    result = interrupt_run(config, tmp_path / "run", ["step:2:0", "step:4:10", "commit:9"])
    assert result["lines_lost"] > 0  # a kill that loses no step would prove nothing
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")
    pictures = [(tmp_path / run / "preview.png").read_bytes() for run in ("run", "unbroken")]
    assert pictures[0] == pictures[1]


def test_a_folder_of_mixed_sizes_trains_and_evaluates_at_the_size_that_is_set(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for number in range(50):
        pixels = generator.integers(0, 16, (30 + number % 3, 34), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{number:02d}.png")
    config = tmp_path / "run.toml"
    text = UNET_RUN.format(path=tmp_path / "data").replace("fashion-mnist", "folder")
    text = text.replace('labels = "class"\nnum_labels = 10\n', "").replace("steps = 8", "steps = 1")
    config.write_text(f'{text}cache = "{tmp_path}/cache"\n')
    with pytest.raises(DataError, match="give `size` to crop and resize"):
        train(load_run(config, tmp_path / "run"), progress=False)
    train(load_run(config, tmp_path / "run", "--data.size", "28", "28"), progress=False)
    # The evaluation takes the size from the training, and refuses pictures of another one.
    settings = {"checkpoint": tmp_path / "run/checkpoint", "rows": 2, "num_draws": 1, "device": "cpu"}
    assert evaluate_images(ImageEvalConfig(**settings), progress=False)["num_dimensions"] == 784
    with pytest.raises(ValueError, match=r"are \(16, 16, 1\), and the model's are \(28, 28, 1\)"):
        evaluate_images(ImageEvalConfig(size=(16, 16), **settings), progress=False)


def test_an_archive_of_ones_own_trains_once_its_checksum_is_waived(tmp_path: Path) -> None:
    image_files.make_cifar_python_archive(tmp_path / "cifar-10-python.tar.gz", 2)
    shutil.rmtree(tmp_path / "cifar-10-batches-py")
    flags = [*SMALL, "--steps", "1", "--data.path", str(tmp_path / "cifar-10-python.tar.gz")]
    with pytest.raises(DataError, match="set verify to false"):
        train(load_run(CONFIGS / "cifar10-mdm.toml", tmp_path / "run", *flags), progress=False)
    config = load_run(CONFIGS / "cifar10-mdm.toml", tmp_path / "run", *flags, "--data.verify", "false")
    assert train(config, progress=False).step == 1


def _tiny(tmp_path: Path, *flags: str) -> Trainer:
    """A run on 6 RGB pictures of 4 x 4 pixels in two classes, and 5 held-out ones."""
    if not (tmp_path / "data").exists():
        make_folder(tmp_path / "data", 6, classes=("ant", "bee"), side=4)
        make_folder(tmp_path / "data" / "heldout", 5, classes=("ant", "bee"), side=4, seed=1)
    config = tmp_path / "run.toml"
    config.write_text(UNET_RUN.format(path=tmp_path / "data"))
    sizes = ["--model.height", "4", "--model.width", "4", "--model.channels", "3", "--model.num-labels", "2"]
    network = ["--model.model-channels", "96", "--model.channel-mult", "1", "--model.attention-rates"]
    data = ["--data.dataset", "folder", "--data.cache", str(tmp_path / "cache"), "--eval-rows", "3"]
    run = load_run(config, tmp_path / "run", *sizes, *network, *data, *flags)
    return Trainer(run, progress=False)


def test_pictures_are_mirrored_for_training_alone_and_keep_their_class(tmp_path: Path) -> None:
    trainer = _tiny(tmp_path)
    train, heldout = trainer.data.train, trainer.data.heldout
    assert heldout is not None
    assert (train.num_rows, heldout.num_rows) == (12, 5)
    for index in range(6):
        planes, mirrored = (train.row(row).reshape(3, 4, 4) for row in (index, index + 6))
        assert np.array_equal(mirrored, planes[:, :, ::-1])
        assert train.label(index) == train.label(index + 6) == index // 3
    assert not np.array_equal(train.row(0), train.row(6))
    assert [heldout.label(index) for index in range(5)] == [0, 0, 0, 1, 1]
    trainer.config.output.mkdir()
    trainer.save()
    assert load_checkpoint(tmp_path / "run/checkpoint").config.label_names == ("ant", "bee")


def test_held_out_figures_take_the_classes_and_count_pixel_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels: list[int] = []
    estimate = trainer_module.estimate_likelihood

    def spy(*arguments: Any, **options: Any) -> Any:
        labels.extend(options["labels"].tolist())
        assert torch.is_autocast_enabled("cpu")
        return estimate(*arguments, **options)

    monkeypatch.setattr(trainer_module, "estimate_likelihood", spy)
    packed = ["--model.packing", "rgb24", "--model.channels", "2", "--codec.vocab-size", "4096"]
    figures = _tiny(tmp_path, *packed, "--codec.target-length", "1").evaluate()
    assert labels == [0, 0, 1]  # of rows 0, 2 and 4
    # 32 tokens for 48 values.
    assert figures["heldout_bpd"] == pytest.approx(figures["heldout_nelbo"] * 32 / 48 / math.log(2))


def test_a_preview_has_a_column_for_each_class(tmp_path: Path) -> None:
    trainer = _tiny(tmp_path, "--preview", "6")
    assert trainer.data.labels.in_order(6) == [0, 1, 0, 1, 0, 1]
    assert trainer.data.paint is not None
    painted = trainer.data.paint(torch.zeros(6, 48, dtype=torch.int64))
    assert painted.shape == (3 * 6 - 2, 2 * 6 - 2, 3)


def test_a_preview_is_drawn_by_the_averaged_weights_without_dropout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    queue = Stepper.queue

    def spy(self: Stepper, rows: Any) -> Any:
        sizes.append(len(rows))
        return queue(self, rows)

    monkeypatch.setattr(Stepper, "queue", spy)
    monkeypatch.setattr(preview, "_MAX_TOKENS", 2 * 48 + 1)  # two rows in a call
    trainer = _tiny(tmp_path, "--model.dropout", "0.5")
    generator = torch.Generator().manual_seed(0)
    for parameter in trainer.model.parameters():  # the head starts at zero, where dropout does not show
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    trainer.ema.shadow = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.model.train()
    first = trainer.preview()
    assert first is not None and trainer.preview() == first
    assert max(sizes) == 2
    pictures = np.asarray(Image.open(io.BytesIO(first)))
    assert pictures.shape == (10, 10, 3)
    assert not np.array_equal(
        pictures[:4, :4], pictures[6:, :4]
    )  # two of one class, each with a seed of its own
    for parameter in trainer.model.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape, generator=generator)
    own = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    assert trainer.preview() == first
    assert all(torch.equal(a, b) for a, b in zip(own, trainer.model.parameters(), strict=True))
