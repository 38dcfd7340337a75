"""Hostile pickle programs: nothing is executed, and everything is refused or inert within bounded time."""

import argparse
import collections
import copyreg
import os
import pickle
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from prime_core.checkpoint import CheckpointError
from prime_core.published import program as published_program
from prime_core.published.archive import open_archive
from prime_core.published.program import check_program
from prime_core.published.unpickler import ArchiveTensor, InertRecord
from tests.published import assemble, read, text, write_archive


def outcome(path: Path) -> str:
    """The type of what the program leaves, or "refused"."""
    try:
        return type(read(path).get("x")).__name__
    except CheckpointError as error:
        return "refused" if "\n" not in str(error) else "message of many lines"


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args


class WithState(Call):
    def __reduce__(self) -> tuple[Any, ...]:
        return (*super().__reduce__(), {"__class__": 1, "a": [1]}, iter([1, 2]), iter([("k", "v")]))


class TestNothingRuns:
    """Every program would make the folder `canary`, one way or another."""

    @pytest.fixture
    def canary(self, tmp_path: Path) -> Path:
        return tmp_path / "canary"

    def programs(self, canary: Path) -> dict[str, bytes]:
        path, command = text(str(canary)), text(f"mkdir {canary}")
        tensor, mapping = b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"
        code = text(f"__import__('os').mkdir({str(canary)!r})")
        mkdir = b"cos\nmkdir\n"
        get = b"cbuiltins\ngetattr\n(cos\npath\n" + text("__class__") + b"tR"
        return {
            "global": assemble(mkdir, path, b"\x85R"),
            "system": assemble(b"cposix\nsystem\n", command, b"\x85R"),
            "popen": assemble(b"csubprocess\nPopen\n", command, b"\x85R"),
            "eval": assemble(b"cbuiltins\neval\n", code, b"\x85R"),
            "exec, python 2 name": assemble(b"c__builtin__\nexec\n", code, b"\x85R"),
            "torch, not a tensor": assemble(b"ctorch.hub\nload\n", path, b"\x85R"),
            "dotted": assemble(b"ctorch\nserialization.os.mkdir\n", path, b"\x85R"),
            "dotted, known module": assemble(b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n", b""),
            "stack global": assemble(text("os"), text("mkdir"), b"\x93", path, b"\x85R", protocol=4),
            "stack global, dotted": assemble(text("collections"), text("abc.sys"), b"\x93", protocol=4),
            "inst": assemble(b"(", path, b"ios\nmkdir\n"),
            "obj": assemble(b"(", mkdir, path, b"o"),
            "newobj": assemble(mkdir, path, b"\x85\x81"),
            "newobj with names": assemble(mkdir, path, b"\x85", b"}", b"\x92", protocol=4),
            "nested": assemble(mkdir, mkdir, path, b"\x85R", b"\x85R"),
            "call of a result": assemble(get, path, b"\x85R"),
            "getattr": assemble(get, text("mkdir"), b"\x86", b"R", path, b"\x85R"),
            "build": assemble(mkdir, b"(", path, b"tR", b"}", text("__reduce__"), mkdir, b"sb"),
            "build on a class": assemble(mkdir, b"}", text("__call__"), mkdir, b"sb", path, b"\x85R"),
            "build slots, class": assemble(mkdir, b"N}", text("__new__"), mkdir, b"s\x86b", path, b"\x85R"),
            "build on a function": assemble(tensor, b"}", text("x"), mkdir, b"sb"),
            "build slots on a function": assemble(
                tensor, b"N}", text("__code__"), mkdir, b"s\x86b"
            ),
            "build on the dictionary class": assemble(mapping, b"}", text("x"), mkdir, b"sb"),
            "append": assemble(mkdir, path, b"a"),
            "appends to a result": assemble(mkdir, b")R", b"(", path, b"e"),
            "items of a result": assemble(mkdir, b")R", b"(", path, path, b"u"),
            "set of results": assemble(b"\x8f(", mkdir, b")R\x90", protocol=4),
            "persistent id": assemble(text("storage"), mkdir, path, path, b"K\x01", b"t", b"Q"),
            "persistent call": assemble(b"(", text("storage"), mkdir, path, b"\x85R", path, path, b"K\x01tQ"),
            "text persistent id": assemble(b"Pos.mkdir\n"),
            "key": assemble(b"}", mkdir, path, b"\x85R", b"Ns"),
            "protocol 0": b"(dVx\ncos\nmkdir\n(V" + str(canary).encode() + b"\ntRs.",
            "mapping of a call": assemble(mapping, mkdir, path, b"\x85R\x85R"),
            "size of a call": assemble(b"ctorch\nSize\n", mkdir, path, b"\x85R\x85R"),
            "pickle in pickle": assemble(
                b"cpickle\nloads\n", b"cos\nmkdir\n", path, b"\x85\x85R"
            ),
        }  # fmt: skip

    def test_all(self, tmp_path: Path, canary: Path) -> None:
        outcomes = {}
        for name, program in self.programs(canary).items():
            outcomes[name] = outcome(write_archive(tmp_path / "a.ckpt", program))
            assert not canary.exists(), name
        assert "message of many lines" not in outcomes.values()
        assert outcomes["global"] == outcomes["eval"] == outcomes["inst"] == "InertRecord"
        for name in (
            "build on a class",
            "build on a function",
            "build slots on a function",
            "text persistent id",
        ):
            assert outcomes[name] == "refused", name

    def test_a_canary_dies_without_protection(self, tmp_path: Path, canary: Path) -> None:
        """The programs above are live: the plain unpickler runs them."""
        live = ("global", "eval", "stack global", "inst", "obj", "nested", "protocol 0", "system")
        for name in live:
            program = self.programs(canary)[name]
            command = (
                "import pickle, sys\ntry: pickle.loads(bytes.fromhex(sys.argv[1]))\nexcept Exception: pass"
            )
            subprocess.run([sys.executable, "-c", command, program.hex()], check=True)
            assert canary.is_dir(), name
            canary.rmdir()

    def test_extension_codes(self, tmp_path: Path) -> None:
        copyreg.add_extension("os", "mkdir", 240)
        try:
            program = assemble(b"\x82\xf0", text(str(tmp_path / "canary")), b"\x85R")
            with pytest.raises(CheckpointError, match="EXT1"):
                read(write_archive(tmp_path / "a.ckpt", program))
        finally:
            copyreg.remove_extension("os", "mkdir", 240)
        assert not (tmp_path / "canary").exists()

    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    def test_real_pickles(self, tmp_path: Path, canary: Path, protocol: int) -> None:
        content = {
            "call": Call(os.mkdir, str(canary)),
            "inner": [Call(eval, f"open({str(canary)!r}, 'w')")],
            "state": WithState(collections.Counter),
            "plain": {"a": (1, 2.5, None, True, "text", b"bytes"), "set": {1}, "n": argparse.Namespace(x=1)},
        }
        found = read(write_archive(tmp_path / "a.ckpt", pickle.dumps(content, protocol)))
        assert not canary.exists()
        assert isinstance(found["call"], InertRecord)
        assert found["call"].kind in ("posix.mkdir", "nt.mkdir")
        assert found["call"].args == (str(canary),)
        assert found["inner"][0].args[0].startswith("open(")
        assert found["state"].kind == "collections.Counter"
        assert found["state"].state == {"__class__": 1, "a": [1]}
        assert found["plain"]["a"][:5] == (1, 2.5, None, True, "text")
        assert found["plain"]["n"].state == {"x": 1}

    def test_nothing_is_imported(self, tmp_path: Path) -> None:
        path = write_archive(tmp_path / "a.ckpt", assemble(b"cantigravity\nfly\n", b")R"))
        assert read(path)["x"].kind == "antigravity.fly"
        assert "antigravity" not in sys.modules


class TestBounds:
    @pytest.mark.parametrize(
        ("program", "message"),
        [
            (assemble(b"N", b"r\xff\xff\xff\x7f"), "memo index"),
            (assemble(b"N", b"p99999999999\n"), "memo index"),
            (assemble(b"N", b"p-1\n"), "memo index"),
            (assemble(b"}N", b"\x85" * 100_000, b"Ns"), "nested"),
            (assemble(b"}N", b"2\x86" * 60, b"Ns"), "nested"),
            (assemble(b"}N", b"\x85q\x000h\x00" * 2000, b"Ns"), "nested|memo"),
            (assemble(b"\x8b\x00\x08\x00\x00" + b"\x7f" * 2048), "bits"),
            (assemble(b"\x96" + (2**40).to_bytes(8, "little"), protocol=5), "complete"),
            (assemble(b"\x8d" + (2**62).to_bytes(8, "little"), protocol=4), "complete"),
            (assemble(b"\x8b\xff\xff\xff\x7f"), "complete"),
            (assemble(b"\x97", protocol=5), "refused"),
            (b"\x80\x02}", "complete"),
            (b"", "complete"),
            (b"\x80\x02s.", "complete"),
            (b"\x80\x02h\x05.", "complete"),
            (b"\x80\x09}.", "protocol"),
            (b"\xff\xff", "complete"),
            (b"\x80\x02}X\x01\0\0\0xNs0.", "complete"),
        ],
    )
    def test_program(self, tmp_path: Path, program: bytes, message: str) -> None:
        with pytest.raises(CheckpointError, match=rf"pickle is refused.*({message})"):
            read(write_archive(tmp_path / "a.ckpt", program))

    def test_many_instructions_end_early(self, monkeypatch: pytest.MonkeyPatch) -> None:
        started = time.monotonic()
        with pytest.raises(pickle.UnpicklingError, match=r"instructions, or 1000 open marks"):
            check_program(b"\x80\x02" + b"(" * 5_000_000 + b".")
        assert time.monotonic() - started < 2  # all of them would be 20 s
        monkeypatch.setattr(published_program, "MAX_OPCODES", 5000)
        for opcodes in (b"N0", b"(1", b"(t0"):
            with pytest.raises(pickle.UnpicklingError, match=r"more than 5000 instructions, or"):
                check_program(b"\x80\x02" + opcodes * 5000 + b".")
            check_program(b"\x80\x02" + opcodes * 1500 + b"N.")

    def test_length(self) -> None:
        with pytest.raises(pickle.UnpicklingError, match="at most"):
            check_program(bytes(64 * 2**20 + 1))

    def test_every_cut_and_many_flips_of_a_real_program(self, tmp_path: Path) -> None:
        torch.save(
            {"state_dict": {"w": torch.arange(6.0).view(2, 3)}, "n": argparse.Namespace(x=1)}, tmp_path / "r"
        )
        with zipfile.ZipFile(tmp_path / "r") as archive:
            program = archive.read("r/data.pkl")
            entries = {"a/data/0": archive.read("r/data/0")}
        generator = torch.Generator().manual_seed(0)
        variants = [program[:end] for end in range(0, len(program), 3)]
        for _ in range(300):
            place, value = torch.randint(0, 2**30, (2,), generator=generator).tolist()
            broken = bytearray(program)
            broken[place % len(program)] = value % 256
            variants.append(bytes(broken))
        refused = 0
        for variant in variants:
            path = write_archive(tmp_path / "a.ckpt", variant, entries)
            try:
                with open_archive(path) as content:
                    state = content.get("state_dict")
                    if isinstance(state, dict) and isinstance(state.get("w"), ArchiveTensor):
                        state["w"].read()
            except CheckpointError:
                refused += 1
        assert refused > len(variants) // 2
