"""The distribution holds what its commands need, and the set-up script keeps its promise about torch."""

import importlib
import importlib.util
import re
import subprocess
import sys
import tomllib
import types
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PACKAGES = ["kernels", "prime_core", "training", "server", "benchmarks"]
COMMANDS = ["prime-serve", "prime-train", "prime-eval", "prime-sample", "prime-import", "prime-bench"]


@pytest.fixture(scope="module")
def install() -> types.ModuleType:
    """The set-up script `.ci/install.py` as a module."""
    spec = importlib.util.spec_from_file_location("install", ROOT / ".ci" / "install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel built from the working tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in [*PACKAGES, "pyproject.toml", "README.md", "LICENSE"]:
        # Links, not copies: the build writes only beside them, and never into them.
        (source / name).symlink_to(ROOT / name)
    build = "from setuptools import build_meta; import sys; print(build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(folder / done.stdout.splitlines()[-1]) as archive:
        return set(archive.namelist())


def test_every_command_of_the_design_is_declared() -> None:
    assert sorted(PROJECT["scripts"]) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_resolves_to_a_callable(command: str) -> None:
    module, _, name = PROJECT["scripts"][command].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def test_wheel_holds_every_module_and_data_file(wheel: set[str]) -> None:
    wanted = {path for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    wanted |= {path for path in (ROOT / "server" / "demo").rglob("*") if path.is_file()}
    wanted |= set((ROOT / "server" / "playground").iterdir())
    wanted |= set((ROOT / "training" / "configs").glob("*.toml"))
    wanted |= set((ROOT / "benchmarks" / "workloads").glob("*.toml"))
    wanted |= {ROOT / name / "py.typed" for name in PACKAGES}
    missing = {str(path.relative_to(ROOT)) for path in wanted if "__pycache__" not in path.parts} - wheel
    assert not missing


def test_wheel_ships_a_demo_and_the_configurations(wheel: set[str]) -> None:
    assert any(name.startswith("server/demo/") and name.endswith(".safetensors") for name in wheel)
    assert {"training/configs/tiny.toml", "training/configs/demo-text.toml"} <= wheel


def test_demo_checkpoints_stay_small() -> None:
    sizes = {path.name: path.stat().st_size for path in (ROOT / "server" / "demo").rglob("*.safetensors")}
    assert sizes and max(sizes.values()) <= 20_000_000, sizes


def test_wheel_holds_nothing_but_the_packages(wheel: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert tops == {*PACKAGES, f"mdm_prime-{PROJECT['version']}.dist-info"}


def test_no_requirement_is_a_distribution_named_kernels(install: types.ModuleType) -> None:
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    assert "kernels" not in {install.requirement_name(item) for items in lists for item in items}


def test_torch_is_taken_out_of_what_the_resolver_sees(install: types.ModuleType) -> None:
    torch, others = install.requirements(ROOT / "pyproject.toml", "dev")
    assert install.requirement_name(torch) == "torch"
    assert torch in PROJECT["dependencies"]
    names = {install.requirement_name(item) for item in others}
    assert {"fastapi", "safetensors", "pytest"} <= names
    assert not names & {"torch", "torchvision"}


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("2.13.0+cpu", True),
        ("2.13.0", True),
        ("2.11.0a0+git1234", True),
        ("2.12.1+cu128", True),
        ("2.10.0", False),
        ("2.15.0+cu132", True),
        ("2.16.0", False),
        ("3.12.0", False),
        ("1.13.1", False),
        (None, False),
    ],
)
def test_range_of_torch(install: types.ModuleType, version: str | None, fits: bool) -> None:
    requirement, _ = install.requirements(ROOT / "pyproject.toml", "dev")
    assert install.in_range(version, requirement) is fits


@pytest.mark.parametrize("probe", ["python", "torch"])
def test_probe_accepts_this_interpreter(probe: str) -> None:
    command = [sys.executable, str(ROOT / ".ci" / "install.py"), "--probe", probe]
    assert subprocess.run(command, check=False).returncode == 0


def test_probe_refuses_a_torch_out_of_range(
    install: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "output_of", lambda python, code: "2.16.0")
    monkeypatch.setattr(sys, "argv", ["install.py", "--probe", "torch"])
    with pytest.raises(SystemExit) as end:
        install.main()
    assert end.value.code == 1


def test_what_an_interpreter_prints_may_hold_blanks(install: types.ModuleType) -> None:
    printed = install.output_of(Path(sys.executable), "print('a warning'); print('/home/me/My Projects')")
    assert printed == "/home/me/My Projects"


def test_torch_is_held_at_the_version_that_pip_knows_it_by(
    install: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The CUDA build that PyPI distributes as 2.13.0 says 2.13.0+cu130, and to pip that is another version.
    versions = {install.IMPORT_TORCH: "2.13.0+cu130", install.DISTRIBUTION_OF_TORCH: "2.13.0"}
    monkeypatch.setattr(install, "output_of", lambda python, code: versions[code])
    monkeypatch.setattr(install, "create", lambda venv, requirement: venv / "bin" / "python")
    monkeypatch.setattr(install, "pip", lambda python, *arguments, **options: None)
    monkeypatch.setattr(sys, "argv", ["install.py", "--venv", str(tmp_path)])
    install.main()
    assert (tmp_path / "constraints.txt").read_text("utf-8") == "torch==2.13.0\n"


def test_extras_ask_for_a_recent_triton_only_on_request() -> None:
    (triton,) = PROJECT["optional-dependencies"]["gpu"]
    assert triton == "triton>=3.6,<4"
    assert f"{triton}; sys_platform == 'linux'" in PROJECT["optional-dependencies"]["dev"]
    assert not any(item.startswith("triton") for item in PROJECT["dependencies"])


def test_whoever_develops_has_what_traces_need() -> None:
    extras = PROJECT["optional-dependencies"]
    assert extras["otel"] and set(extras["otel"]) <= set(extras["dev"])


def test_set_up_files_name_one_version_of_torch_and_it_is_in_range(install: types.ModuleType) -> None:
    named = {
        *re.findall(r"^TORCH +\?= torch==(\S+)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE),
        *re.findall(r"^ARG TORCH_VERSION=(\S+)$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE),
        *re.findall(r'default="torch==([^"]+)"', (ROOT / ".ci" / "install.py").read_text("utf-8")),
    }
    assert len(named) == 1
    requirement, _ = install.requirements(ROOT / "pyproject.toml", "dev")
    assert install.in_range(named.pop(), requirement)


def test_image_is_built_from_every_package() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line[:1] == "!"}
    assert kept == {*PACKAGES, "pyproject.toml", "README.md", "LICENSE"}
