"""Damaged archives: tensors stay inside their storages, and entries that are not sound are refused."""

import collections
import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from prime_core.checkpoint import CheckpointError
from prime_core.published import archive as published_archive
from prime_core.published.archive import open_archive
from tests.published import assemble, read, text, write_archive


class TestTensors:
    def archive(self, tmp_path: Path, *, kind: str = "FloatStorage", numel: int = 6, rest: bytes) -> Path:
        storage = b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text("0") + text("cpu")
        storage += b"J" + numel.to_bytes(4, "little", signed=True) + b"tQ"
        program = assemble(b"ctorch._utils\n_rebuild_tensor_v2\n(", storage, rest, b"tR")
        return write_archive(tmp_path / "a.ckpt", program, {"a/data/0": bytes(24)})

    @staticmethod
    def view(offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
        whole = pickle.dumps((offset, shape, stride), 2)
        return b"".join(
            b"J" + n.to_bytes(4, "little", signed=True) if isinstance(n, int) else
            b"(" + b"".join(b"J" + m.to_bytes(4, "little", signed=True) for m in n) + b"t"
            for n in pickle.loads(whole)
        ) + b"\x89}"  # fmt: skip

    def test_views(self, tmp_path: Path) -> None:
        for offset, shape, stride in [
            (0, (2, 3), (3, 1)),
            (0, (3, 2), (1, 3)),
            (2, (2,), (3,)),
            (6, (0,), (1,)),
            (5, (), ()),
        ]:
            path = self.archive(tmp_path, rest=self.view(offset, shape, stride))
            with open_archive(path) as content:
                assert content["x"].read().shape == shape

    @pytest.mark.parametrize(
        ("offset", "shape", "stride"),
        [
            (0, (7,), (1,)),
            (1, (6,), (1,)),
            (0, (2, 3), (4, 1)),
            (-1, (2,), (1,)),
            (0, (-2,), (1,)),
            (0, (2,), (-1,)),
            (0, (2, 3), (1,)),
            (0, (1000,), (0,)),
            (6, (), ()),
            (7, (0,), (1,)),
            (0, (1,) * 17, (1,) * 17),
        ],
    )
    def test_outside_of_the_storage(
        self, tmp_path: Path, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
    ) -> None:
        with pytest.raises(CheckpointError, match=r"outside|impossible"):
            read(self.archive(tmp_path, rest=self.view(offset, shape, stride)))

    def test_storages(self, tmp_path: Path) -> None:
        rest = self.view(0, (2,), (1,))
        for numel in (5, 7, -1, 2**31 - 1):
            with pytest.raises(CheckpointError, match=r"declared size"):
                read(self.archive(tmp_path, numel=numel, rest=rest))
        for kind in ("DoubleStorage", "HalfStorage"):
            with pytest.raises(CheckpointError, match=r"declared size"):
                read(self.archive(tmp_path, kind=kind, rest=rest))
        with pytest.raises(CheckpointError, match="not supported"):
            read(self.archive(tmp_path, kind="nn", rest=rest))
        path = self.archive(tmp_path, rest=rest)
        with zipfile.ZipFile(path) as archive:
            program = archive.read("a/data.pkl")
        with pytest.raises(CheckpointError, match="missing"):
            read(write_archive(path, program))

    @pytest.mark.parametrize("state", [b"}", b"N}" + text("_offset") + b"K\x01s\x86", b"N"])
    def test_states_are_refused(self, tmp_path: Path, state: bytes) -> None:
        """A state sets attributes: where a tensor begins in its storage is one."""
        storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x06tQ"
        view = self.view(0, (2,), (1,))
        for what, part in (
            ("storage", storage),
            ("tensor", b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + b"tR"),
        ):
            path = write_archive(tmp_path / "a.ckpt", assemble(part, state, b"b"), {"a/data/0": bytes(24)})
            with pytest.raises(CheckpointError, match=f"state for a {what}"):
                read(path)

    def test_sizes(self, tmp_path: Path) -> None:
        def size(*numbers: int) -> Path:
            values = b"".join(b"\x8a\x09" + n.to_bytes(9, "little", signed=True) for n in numbers)
            return write_archive(tmp_path / "a.ckpt", assemble(b"ctorch\nSize\n((", values, b"ttR"))

        assert read(size(2**48 - 1, 0))["x"] == (2**48 - 1, 0)
        assert read(size(*[1] * 16))["x"] == (1,) * 16
        for numbers in ((2**48,), (-1,), (1,) * 17):
            with pytest.raises(CheckpointError, match=r"an impossible torch\.Size"):
                read(size(*numbers))

    def test_real_tensors(self, tmp_path: Path) -> None:
        base = torch.arange(24.0)
        content = {
            "view": base.view(4, 6)[1:3, ::2],
            "transposed": base.view(4, 6).T,
            "scalar": torch.tensor(2.5),
            "empty": torch.empty(0, 3),
            "parameter": torch.nn.Parameter(base[:3].clone()),
            **{
                str(dtype): torch.ones(3).to(dtype)
                for dtype in (torch.bfloat16, torch.float16, torch.int64, torch.bool)
            },
        }
        state = collections.OrderedDict(content)
        state._metadata = {"version": 1}  # type: ignore[attr-defined]
        torch.save({"state": state, "size": torch.Size([2, 3])}, tmp_path / "a.pt")
        with open_archive(tmp_path / "a.pt") as found:
            assert found["size"] == (2, 3)
            assert list(found["state"]) == list(content)
            for name, tensor in content.items():
                copy = found["state"][name].read()
                assert copy.dtype == tensor.dtype
                assert copy.is_contiguous()
                assert torch.equal(copy, tensor)


class TestArchive:
    def test_damaged_entry(self, tmp_path: Path) -> None:
        torch.save({"w": torch.ones(500)}, tmp_path / "a.pt")
        raw = bytearray((tmp_path / "a.pt").read_bytes())
        place = raw.index(torch.ones(500).numpy().tobytes())
        raw[place + 100] ^= 1
        (tmp_path / "a.pt").write_bytes(raw)
        with open_archive(tmp_path / "a.pt") as content, pytest.raises(CheckpointError, match="CRC"):
            content["w"].read()

    def test_truncated(self, tmp_path: Path) -> None:
        torch.save({"w": torch.ones(50)}, tmp_path / "a.pt")
        raw = (tmp_path / "a.pt").read_bytes()
        for keep in range(0, len(raw) - 1, 61):
            (tmp_path / "a.pt").write_bytes(raw[:keep])
            with pytest.raises(CheckpointError):
                read(tmp_path / "a.pt")

    def test_old_format(self, tmp_path: Path) -> None:
        torch.save({"w": torch.ones(5)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
        with pytest.raises(CheckpointError, match="old PyTorch format"):
            read(tmp_path / "a.pt")
        (tmp_path / "a.pt").write_bytes(pickle.dumps({"a": 1}))
        with pytest.raises(CheckpointError, match="not a PyTorch zip"):
            read(tmp_path / "a.pt")

    @pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "a/../../evil", "a\\..\\evil"])
    def test_names(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(CheckpointError, match="leaves the archive"):
            read(write_archive(tmp_path / "a.ckpt", b"\x80\x02}.", {name: b"x"}))

    @staticmethod
    def patched(tmp_path: Path, place: int, change: bytes) -> Path:
        """An archive with bytes of the last entry of its directory changed, from ``place`` on."""
        path = write_archive(tmp_path / "a.ckpt", b"\x80\x02}.", {"a/data/1": b"", "a/data/0": b"12345678"})
        raw = bytearray(path.read_bytes())
        start = raw.rindex(b"PK\x01\x02") + place
        raw[start : start + len(change)] = change
        path.write_bytes(raw)
        return path

    def test_odd_entries(self, tmp_path: Path) -> None:
        assert read(self.patched(tmp_path, 8, b"\0")) == {}
        for place, change, message in (
            (8, b"\x01", "is encrypted: refused"),  # the flags
            (20, b"\x07", "is compressed"),  # stored, and of another size than it unpacks to
            (46 + 7, b"\0", "leaves the archive"),  # a name that ends earlier for others
            (46, b"a/data/1", "some twice"),
        ):
            with pytest.raises(CheckpointError, match=message):
                read(self.patched(tmp_path, place, change))

    def test_many_entries(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_archive(tmp_path / "a.ckpt", b"\x80\x02}.", {"a/data/0": b""})
        monkeypatch.setattr(published_archive, "MAX_ENTRIES", 3)
        assert read(path) == {}
        monkeypatch.setattr(published_archive, "MAX_ENTRIES", 2)
        with pytest.raises(CheckpointError, match="3 entries, some twice or over 2: refused"):
            read(path)

    def test_two_programs(self, tmp_path: Path) -> None:
        path = write_archive(tmp_path / "a.ckpt", b"\x80\x02}.", {"b/data.pkl": b"\x80\x02}."})
        with pytest.raises(CheckpointError, match=r"has one NAME/data\.pkl, found 2"):
            read(path)

    def test_compressed(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a/data.pkl", b"\x80\x02}.")
            archive.writestr("a/data/0", bytes(10_000_000))
        with pytest.raises(CheckpointError, match="compressed"):
            read(tmp_path / "a.ckpt")

    def test_entries_that_share_bytes(self, tmp_path: Path) -> None:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("a/data.pkl", b"\x80\x02}.")
            archive.writestr("a/data/0", bytes(1000))
            info = archive.getinfo("a/data/0")
            for index in range(1, 50):
                copy = zipfile.ZipInfo(f"a/data/{index}")
                for field in ("file_size", "compress_size", "CRC", "header_offset"):
                    setattr(copy, field, getattr(info, field))
                archive.filelist.append(copy)
                archive.NameToInfo[copy.filename] = copy
        (tmp_path / "a.ckpt").write_bytes(buffer.getvalue())
        with pytest.raises(CheckpointError, match="more bytes than the file"):
            read(tmp_path / "a.ckpt")

    def test_what_is_not_a_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="list"):
            read(write_archive(tmp_path / "a.ckpt", b"\x80\x02]."))
        with zipfile.ZipFile(tmp_path / "b.ckpt", "w") as archive:
            archive.writestr("readme", b"x")
        with pytest.raises(CheckpointError, match="found 0"):
            read(tmp_path / "b.ckpt")
        with pytest.raises(CheckpointError, match="big-endian"):
            read(write_archive(tmp_path / "c.ckpt", b"\x80\x02}.", {"a/byteorder": b"big"}))
