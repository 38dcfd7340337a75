"""A crash or a full disk at any point of a save leaves the old checkpoint or the new one, never a mixture."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prime_core import atomic
from prime_core.checkpoint import load_checkpoint, save_checkpoint
from prime_core.config import LinearConfig
from prime_core.rank_files import write_rank_file
from prime_core.tokenizer import TokenizerSpec
from tests.checkpoints import CONFIG, assert_equal, assert_same, file_names, make_state, with_codec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    save_checkpoint(path, CONFIG, make_state())
    return path


class TestCrash:
    """The new checkpoint differs in configuration and weights; a mixture would be seen."""

    NEW = CONFIG.model_copy(update={"schedule": LinearConfig(eps=0.5), "provenance": {"note": "new"}})

    NEWER = CONFIG.model_copy(update={"schedule": LinearConfig(eps=0.75)})

    def version(self, path: Path) -> str:
        """Which checkpoint loads: "old" (seed 0), "new" (seed 1) or "newer" (seed 2); never a mixture."""
        loaded = load_checkpoint(path)
        seed = [CONFIG, self.NEW, self.NEWER].index(loaded.config)
        assert_equal(loaded, make_state(seed=seed))
        return ["old", "new", "newer"][seed]

    def snapshots(
        self, folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch, *, save: Callable[[], None]
    ) -> list[Path]:
        """What a kill at any moment of a save would leave: copies around every system call and write."""
        copies: list[Path] = []

        def snap() -> None:
            copies.append(store / str(len(copies)))
            shutil.copytree(folder, copies[-1])

        def around(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any) -> Any:
                snap()
                result = call(*args)
                snap()
                return result

            return wrapped

        open_partial = atomic.open_partial

        def open_and_watch(path: Path) -> Any:
            file = open_partial(path)
            raw = path.parent / atomic.partial_path(path).name

            class Watched:
                def __enter__(self) -> Any:
                    return self

                def __exit__(self, *_: object) -> None:
                    file.close()

                def write(self, content: bytes) -> None:
                    half = len(content) // 2
                    file.write(content[:half])
                    file.flush()
                    snap()
                    file.write(content[half:])

                flush, fileno = file.flush, file.fileno

            snap()
            assert raw.exists()
            return Watched()

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", around(os.fsync))
            patch.setattr(os, "replace", around(os.replace))
            patch.setattr(atomic, "open_partial", open_and_watch)
            save()
        return copies

    def test_killed_at_any_point(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        copies = self.snapshots(
            folder,
            tmp_path / "snapshots",
            monkeypatch,
            save=lambda: save_checkpoint(folder, self.NEW, make_state(seed=1)),
        )
        found = [self.version(path) for path in copies]
        assert len(found) > 30
        assert found == sorted(found, reverse=True), "old until the commit point, new after it"
        assert set(found) == {"old", "new"}
        # A save over what any crash left works, also when it fails, and when it is killed again.
        for path, what in zip(copies[-8:], found[-8:], strict=True):
            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", fail_with_full_disk)
                with pytest.raises(OSError, match="No space"):
                    save_checkpoint(path, CONFIG, make_state(seed=5))
            assert self.version(path) == what
            save_checkpoint(path, CONFIG, make_state(seed=7))
            assert_same(path, make_state(seed=7))
            assert file_names(path) == ["config.json", "model.safetensors"]

    def test_killed_twice(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = self.snapshots(
            folder,
            tmp_path / "first",
            monkeypatch,
            save=lambda: save_checkpoint(folder, self.NEW, make_state(seed=1)),
        )
        between = [path for path in first if (path / ".config.json.partial").exists()][-1]
        assert self.version(between) == "new"
        assert json.loads((between / "config.json").read_text())["provenance"] == {"note": "test"}
        second = self.snapshots(
            between,
            tmp_path / "second",
            monkeypatch,
            save=lambda: save_checkpoint(between, self.NEWER, make_state(seed=2)),
        )
        found = [self.version(path) for path in second]
        assert found == sorted(found)
        assert set(found) == {"new", "newer"}

    @pytest.mark.parametrize(
        ("call", "countdown"), [*(("fsync", n) for n in range(5)), ("replace", 0), ("replace", 1)]
    )
    def test_full_disk(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, countdown: int
    ) -> None:
        original, calls = getattr(os, call), iter(range(100))

        def sometimes(*args: Any) -> Any:
            return fail_with_full_disk() if next(calls) == countdown else original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, sometimes)
            with pytest.raises(OSError, match="No space"):
                save_checkpoint(folder, self.NEW, make_state(seed=1))
        is_committed = countdown >= {"fsync": 3, "replace": 1}[call]
        assert self.version(folder) == ("new" if is_committed else "old")
        if not is_committed:
            assert file_names(folder) == ["config.json", "model.safetensors"]

    def test_full_disk_while_writing_a_first_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("prime_core.checkpoint.write_weights", fail_with_full_disk)
        with pytest.raises(OSError, match="No space"):
            save_checkpoint(tmp_path / "a", CONFIG, make_state())
        assert file_names(tmp_path) == []


def test_a_tokenizer_file_goes_with_a_checkpoint_that_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = tmp_path / "ranks.tiktoken"
    write_rank_file(ranks, [bytes([value]) for value in range(256)])
    spec = TokenizerSpec(kind="tiktoken_file", file="ranks.tiktoken")
    config = with_codec(256, 2, tokenizer=spec)
    monkeypatch.setattr("prime_core.checkpoint.write_weights", fail_with_full_disk)
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path / "a", config, make_state(config), tokenizer_file=ranks)
    assert file_names(tmp_path / "a") == []


def fail_with_full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
