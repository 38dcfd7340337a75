"""Make the virtual environment that `make venv` promises, without ever touching a torch that is there.

Started by the Makefile with an interpreter of a supported version; needs only the standard library.

The order matters. torch is settled first, by itself: one in the supported range that the base interpreter
or the environment already has is kept, else the requirement in `--torch` is installed. Everything else is
then installed from the list in pyproject.toml with torch taken out, so that the resolver has no reason to
look again at torch, or at the CUDA packages that some of its builds ask for. Last comes the project itself,
without its requirements.
"""

import argparse
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUPPORTED_PYTHON = ((3, 11), (3, 13))
IMPORT_TORCH = "import torch; print(torch.__version__)"
# What pip goes by: PyPI's CUDA builds call themselves 2.13.0+cu130 and are distributed as 2.13.0.
DISTRIBUTION_OF_TORCH = "import importlib.metadata; print(importlib.metadata.version('torch'))"
SITE_PACKAGES = "import sysconfig; print(sysconfig.get_path('purelib'))"


def requirement_name(requirement: str) -> str:
    """Normalised distribution name of a requirement, as in `torch` of `torch>=2.11,<2.16`."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    if match is None:
        raise ValueError(f"no distribution name in the requirement {requirement!r}")
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def requirements(pyproject: Path, extra: str) -> tuple[str, list[str]]:
    """The requirement on torch, and all other requirements of the project and of one extra."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    everything = [*project["dependencies"], *project["optional-dependencies"][extra]]
    (torch,) = (item for item in everything if requirement_name(item) == "torch")
    return torch, [item for item in everything if item != torch]


def in_range(version: str | None, requirement: str) -> bool:
    """Whether a torch version such as `2.13.0+cpu` fits a requirement `torch>=X.Y,<X.Z`."""
    bounds = re.fullmatch(r"torch>=(\d+)\.(\d+),<(\d+)\.(\d+)", requirement)
    if bounds is None:
        raise ValueError(f"the torch requirement must read torch>=X.Y,<X.Z, got {requirement!r}")
    found = re.match(r"(\d+)\.(\d+)", version or "")
    if found is None:
        return False
    low_major, low_minor, high_major, high_minor = map(int, bounds.groups())
    return (low_major, low_minor) <= (int(found[1]), int(found[2])) < (high_major, high_minor)


def output_of(python: Path, code: str) -> str | None:
    """Last line that `code` prints under `python`, or None where it fails."""
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    return lines[-1] if done.returncode == 0 and lines else None


def pip(python: Path, *arguments: str, hint: str = "") -> None:
    """Run pip of the environment; a failure ends this program with pip's own message on the screen, and a hint."""
    done = subprocess.run([python, "-m", "pip", "install", *arguments], cwd=ROOT, check=False)
    if done.returncode != 0:
        sys.exit(f"pip install {' '.join(arguments)} failed (exit status {done.returncode}){hint}")


def create(venv: Path, torch_requirement: str) -> Path:
    """Create the environment unless a working one is there, and return its interpreter."""
    python = venv / "bin" / "python"
    if python.exists() and output_of(python, "import pip; print(pip.__version__)"):
        return python
    keeps = in_range(output_of(Path(sys.executable), IMPORT_TORCH), torch_requirement)
    options = ["--clear"] + (["--system-site-packages"] if keeps else [])
    if subprocess.run([sys.executable, "-m", "venv", *options, venv], check=False).returncode != 0:
        sys.exit(
            f"{sys.executable} cannot make a virtual environment: install the venv module (on Debian and "
            "Ubuntu the package python3-venv), or choose another interpreter with PYTHON=..."
        )
    if keeps and output_of(python, IMPORT_TORCH) is None:
        # The chosen interpreter lives in a virtual environment itself: --system-site-packages skips over it.
        parent = output_of(Path(sys.executable), SITE_PACKAGES)
        site = output_of(python, SITE_PACKAGES)
        if parent is not None and site is not None:
            Path(site, "parent_environment.pth").write_text(parent + "\n", encoding="utf-8")
    return python


def settle_torch(python: Path, requirement: str, wanted: str) -> str:
    """Version of the torch that the environment keeps, installing `wanted` where none is in range."""
    version = output_of(python, IMPORT_TORCH)
    if not in_range(version, requirement):
        print(f"torch: found {version}, installing {wanted}", flush=True)
        pip(python, wanted)
        version = output_of(python, IMPORT_TORCH)
    if version is None or not in_range(version, requirement):
        sys.exit(
            f"after installing {wanted}, torch is {version}; {requirement} is needed: set TORCH=torch==2.13.0"
        )
    print(f"torch: {version} is kept", flush=True)
    return version


def main() -> None:
    """Probe this interpreter (`--probe`), or make the environment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder of the environment")
    parser.add_argument("--torch", default="torch==2.13.0", help="installed where no torch in range is found")
    parser.add_argument(
        "--probe", choices=["python", "torch"], help="only tell whether this interpreter is fit"
    )
    arguments = parser.parse_args()
    torch_requirement, others = requirements(ROOT / "pyproject.toml", "dev")
    if arguments.probe is not None:
        fit = SUPPORTED_PYTHON[0] <= sys.version_info[:2] <= SUPPORTED_PYTHON[1]
        if fit and arguments.probe == "torch":
            fit = in_range(output_of(Path(sys.executable), IMPORT_TORCH), torch_requirement)
        sys.exit(0 if fit else 1)
    python = create(arguments.venv.absolute(), torch_requirement)
    version = settle_torch(python, torch_requirement, arguments.torch)
    constraints = arguments.venv / "constraints.txt"
    distributed = output_of(python, DISTRIBUTION_OF_TORCH) or version
    constraints.write_text(f"torch=={distributed}\n", encoding="utf-8")
    pinned = ("--constraint", str(constraints.absolute()))
    # A constraint that pip is configured with may forbid this torch: better one error now than a search without end.
    hint = ": does a constraint of this machine forbid it (pip config list, PIP_CONSTRAINT)?"
    pip(python, "--quiet", "--dry-run", "--no-deps", *pinned, f"torch=={distributed}", hint=hint)
    pip(python, *pinned, *others)
    pip(python, "--no-deps", "--editable", ".")
    after = output_of(python, IMPORT_TORCH)
    if after != version:
        sys.exit(
            f"torch was {version} and is {after} after the installation: remove {arguments.venv} and retry"
        )


if __name__ == "__main__":
    main()
