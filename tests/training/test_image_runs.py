"""Image runs through the one trainer: the shipped configurations learn, and a killed run goes on bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prime_core.checkpoint import load_checkpoint
from tests.training.data.images import image_files
from tests.training.data.images.image_files import Made, make_cifar_binary, make_imagenet32_batches
from tests.training.picture_sets import write_fashion_files
from tests.training.small_run import assert_same_run, load_run, metrics_of
from tests.training.test_resume import interrupt_run
from training.data.images import DataError
from training.images.evaluate import ImageEvalConfig, evaluate_images
from training.train import train

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
