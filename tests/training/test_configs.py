"""The shipped configurations, and how flags, environment and file are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prime_core.config import Config, LinearConfig, PolynomialConfig
from prime_core.tokenizer import load_tokenizer
from tests.training.small_run import load_run, write_run
from training.config import TrainConfig, load_train_config
from training.data.corpus import list_sources
from training.evaluate import main as evaluate_main
from training.sample import main as sample_main
from training.train import main as train_main

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "training" / "configs"
PUBLISHED_BASES = {1: 50257, 2: 225, 3: 37, 4: 15, 6: 7, 8: 4}
PUBLISHED = {1: "owt-mdlm", **{length: f"owt-prime-l{length}" for length in (2, 3, 4, 6, 8)}}
PUBLISHED_IMAGES = {
    f"{data}-{kind}"
    for data in ("cifar10", "imagenet32")
    for kind in ("mdm", "prime-l2", "prime-l3", "prime-l4", "prime-l8", "mixture", "supertoken")
}
# Digits of a token and their base.
IMAGE_DIGITS = {
    "mdm": (1, 256), "prime-l2": (2, 16), "prime-l3": (3, 7), "prime-l4": (4, 4), "prime-l8": (8, 2),
    "mixture": (2, 16), "supertoken": (1, 4096),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _in_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def _load(name: str) -> TrainConfig:
    return load_train_config(["--config", str(CONFIGS / f"{name}.toml")])


def test_every_config_loads_and_describes_a_network() -> None:
    names = {path.stem for path in CONFIGS.glob("*.toml")}
    assert names == {"tiny", "demo-text", "demo-images", "toy2d", *PUBLISHED.values(), *PUBLISHED_IMAGES}
    for name in names:
        config = _load(name)
        Config(model=config.model, codec=config.codec, schedule=config.schedule)
        config.codec.build()
        assert config.output == Path("runs") / name


@pytest.mark.parametrize("target_length", PUBLISHED)
def test_published_configs_hold_the_published_values(target_length: int) -> None:
    config = _load(PUBLISHED[target_length])
    assert config.codec.target_length == target_length
    assert config.codec.base == PUBLISHED_BASES[target_length]
    assert (config.codec.vocab_size, config.data.tokenizer.kind) == (50257, "gpt2")
    model = config.model
    assert (model.hidden_size, model.num_blocks, model.num_heads, model.cond_dim) == (768, 12, 12, 128)
    assert (model.length, model.dropout, model.time_conditioned) == (1024, 0.1, False)
    assert (config.batch_size, config.steps, config.objective) == (512, 1_000_000, "coded")
    assert (config.learning_rate, config.beta1, config.beta2, config.weight_decay) == (3e-4, 0.9, 0.999, 0)
    assert (config.warmup_steps, config.decay_steps, config.grad_clip) == (2500, 0, 1.0)
    assert (config.ema_decay, config.eps, config.precision) == (0.9999, 1e-3, "bfloat16")
    assert config.schedule == LinearConfig(eps=1e-3)


def test_published_configs_differ_in_digits_and_folders_only() -> None:
    dumps = [_load(name).model_dump(exclude={"output": True, "codec": {"target_length"}})
             for name in PUBLISHED.values()]  # fmt: skip
    assert all(dump == dumps[0] for dump in dumps)


@pytest.mark.parametrize("name", sorted(PUBLISHED_IMAGES))
def test_published_image_configs_hold_the_published_values(name: str) -> None:
    data, _, kind = name.partition("-")
    config = _load(name)
    model, packed, mixed = config.model, kind == "supertoken", kind == "mixture"
    assert (model.height, model.width, model.channels) == (32, 32, 2 if packed else 3)
    assert (model.model_channels, model.channel_mult, model.num_res_blocks) == (96, (3, 4, 4), 5)
    assert (model.attention_rates, model.head_channels, model.dropout) == ((2,), 64, 0.4)
    assert (model.labels, model.time_conditioned) == ("uniform" if mixed else "none", False)
    assert model.packing == ("rgb24" if packed else "none")
    digits, base = IMAGE_DIGITS[kind]
    assert (config.codec.vocab_size, config.codec.permuted) == (4096 if packed else 256, False)
    assert (config.codec.target_length, config.codec.base) == (digits, base)
    assert config.schedule == PolynomialConfig(power=3.0)
    assert (config.objective, config.weighted, config.eps, config.batch_size) == ("coded", False, 0.0, 512)
    assert (config.learning_rate, config.beta1, config.beta2) == (1e-4, 0.9, 0.95)
    assert (config.ema_decay, config.ema_warmup) == (0.999, True)
    assert (config.data.kind, config.data.dataset) == ("images", data)


@pytest.mark.parametrize("data", ["cifar10", "imagenet32"])
def test_published_image_configs_differ_in_digits_labels_packing_and_folder_only(data: str) -> None:
    free = {
        "output": True,
        "chunk_rows": True,  # memory alone: super-tokens have 16 times the logits
        "codec": {"vocab_size", "target_length"},
        "model": {"channels", "packing", "labels", "num_labels"},
    }
    dumps = [_load(name).model_dump(exclude=free) for name in sorted(PUBLISHED_IMAGES) if data in name]
    assert len(dumps) == 7
    assert all(dump == dumps[0] for dump in dumps)


def test_an_absent_corpus_or_tokenizer_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert train_main(["--config", str(CONFIGS / "owt-mdlm.toml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "prime-train: GPT-2 tokenizer file vocab.bpe not found, and it is never downloaded"
    )
    assert error.count("\n") == 1


def test_a_network_that_contradicts_the_codec_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--config", str(CONFIGS / "cifar10-prime-l2.toml"), "--output", str(tmp_path / "run")]
    assert train_main([*command, "--model.model-channels", "32", "--model.channel-mult", "1", "2"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "prime-train: model.model_channels * model.channel_mult[0] (32) must be a multiple"
    )
    assert error.count("\n") == 1 and "validation error" not in error and "pydantic" not in error


def test_tiny_needs_only_the_clone() -> None:
    config = _load("tiny")
    for source in list_sources([*config.data.train, *config.data.heldout]):
        assert CONFIGS in source.resolve().parents
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.tokenizer_folder)
    assert tokenizer is not None
    assert tokenizer.vocab_size == config.codec.vocab_size == 257
    assert tokenizer.encode("é") == list("é".encode())


def test_flags_beat_variables_beat_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_run(tmp_path)
    assert load_run(file, tmp_path / "out").model.num_blocks == 2
    monkeypatch.setenv("PRIME_TRAIN_MODEL__NUM_BLOCKS", "3")
    monkeypatch.setenv("PRIME_TRAIN_SEED", "5")
    monkeypatch.setenv("PRIME_TRAIN_DATA__HELDOUT", "[]")
    config = load_run(file, tmp_path / "out", "--model.num_blocks", "4")
    assert (config.model.num_blocks, config.model.hidden_size) == (4, 16)
    assert (config.seed, config.steps, config.beta1) == (5, 24, 0.9)  # variable, file, default
    assert config.data.heldout == ()
    monkeypatch.setenv("PRIME_TRAIN_CONFIG", str(file))
    monkeypatch.setenv("PRIME_TRAIN_OUTPUT", "elsewhere")
    assert load_train_config([]).output == Path("elsewhere")


@pytest.mark.parametrize("length", ["1", "3"])
def test_a_row_of_the_toy_is_two_tokens(length: str, tmp_path: Path) -> None:
    flags = ["--config", str(CONFIGS / "toy2d.toml"), "--output", str(tmp_path), "--model.length", length]
    with pytest.raises(
        ValueError, match=f"model.length is {length}: a row of data.kind 'toy2d' has 2 tokens"
    ):
        load_train_config(flags)


@pytest.mark.parametrize("spelling", [["--batch-size", "4"], ["--batch_size", "4"], ["--batch_size=4"]])
def test_flags_are_spelled_with_either_line(spelling: list[str], tmp_path: Path) -> None:
    assert load_run(write_run(tmp_path), tmp_path / "out", *spelling).batch_size == 4


def test_lists_switches_and_objects_as_flags(tmp_path: Path) -> None:
    config = load_run(
        write_run(tmp_path), tmp_path / "out", "--data.train", "a.txt", "b c.txt", "--codec.permuted",
        "--carry-over", "false", "--data.tokenizer.special-tokens", '{"<|endoftext|>": 256, "x": 257}',
        "--data.heldout",
    )  # fmt: skip
    assert config.data.train == (Path("a.txt"), Path("b c.txt"))
    assert config.data.heldout == ()
    assert (config.codec.permuted, config.carry_over) == (True, False)
    assert config.data.tokenizer.special_tokens == {"<|endoftext|>": 256, "x": 257}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bogus", "1"], "unrecognized arguments: --bogus 1"),
        (["--model.num-block", "1"], "unrecognized arguments: --model.num-block"),  # no abbreviations
        (["--steps", "x"], "--steps: input should be a valid integer.* got 'x'"),
        (["--steps", "0"], "--steps: input should be greater than or equal to 1, got '0'"),
        (["--model.dropout", "1"], "--model.dropout: input should be less than 1"),
        (["--learning-rate", "nan"], "--learning-rate: input should be a finite number"),
        (["--seed", "-1"], "--seed: input should be greater than or equal to 0"),
        (["--batch-size", "6"], r"batch_size \(6\) must be a multiple of micro_batch_size \(4\)"),
        (["--model.num-heads", "3"], r"--model: hidden_size \(16\) must be an even multiple of num_heads"),
        (["--eps", "1"], "--eps: input should be less than 1"),
        (["--objective", "nelbo", "--weighted", "false"], "objective 'nelbo' is a bound only with its weights"),
        (["--schedule.kind", "sine"], "--schedule: input tag 'sine'"),
        (["--schedule.kind", "cosine", "--schedule.eps", "0"], "schedule.eps does not go with this schedule"),
        (["--device", "tpu"], "--device: string should match"),
        (["--data.train"], "--data.train: .* at least 1 item"),
        (["--data.tokenizer.special-tokens", "x"], "'x' is not JSON"),
        (["--steps"], "--steps"),
        (["--config", "absent.toml"], "cannot read absent.toml: No such file"),
    ],
)  # fmt: skip
def test_wrong_flags_are_one_line_and_exit_status_2(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=message):
        load_run(write_run(tmp_path), tmp_path / "out", *flags)
    arguments = ["--config", str(tmp_path / "run.toml"), "--output", str(tmp_path / "out"), *flags]
    assert train_main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("prime-train: ")
    assert (printed.err.count("\n"), printed.out) == (1, "")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("stepz = 3\n", "stepz is no setting; did you mean steps?"),
        ("steps = 3\nsteps = 4\n", "is not TOML"),
        ("[model]\nbreadth = 3\n", "model.breadth is no setting"),
        ("[model]\nwidth = 3\n", "model.width does not go with this model.kind; it belongs to unet"),
        ("[modle]\nnum_blocks = 3\n", "modle is no setting; did you mean model"),
    ],
)
def test_unknown_keys_of_a_file_are_errors(line: str, message: str, tmp_path: Path) -> None:
    file = write_run(tmp_path)
    text = file.read_text()
    if "[model]" in line:
        text = text.replace("[model]\n", line)
    else:
        text = text + line if line.startswith("[") else line + text.replace("steps = 24\n", "")
    file.write_text(text)
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        load_run(file, tmp_path / "out")


def test_unknown_variables_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIME_TRAIN_STEP", "3")
    with pytest.raises(ValueError, match=r"PRIME_TRAIN_STEP in .* did you mean PRIME_TRAIN_STEPS"):
        load_run(write_run(tmp_path), tmp_path / "out")


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(ValueError, match=r"--output is missing.*--model is missing"):
        load_train_config([])


@pytest.mark.parametrize("main", [train_main, evaluate_main, sample_main])
def test_help_explains_every_flag(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out.partition("options:")[2].partition("Each flag is also")[0]
    entries = ["--" + entry for entry in text.split("\n  --")[1:]]
    assert len(entries) > 15
    for entry in entries:
        flag, *words = " ".join(entry.split()).split(" ")
        described = " ".join(words).partition("(default")[0]
        assert len([word for word in described.split() if word.isalpha()]) >= 2, (flag, described)
