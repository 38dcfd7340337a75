"""What every test shares: few threads for small tensors, seeded generators, one hypothesis profile."""

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings

# Triton reads this when it is imported: without a GPU its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Small tensors run slower on many threads, and a shared machine more slowly still. It holds for what tests start, too.
num_processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
num_threads = max(1, min(2, (os.cpu_count() or 1) // num_processes))
torch.set_num_threads(num_threads)
if num_processes > 1:
    os.environ["OMP_NUM_THREADS"] = str(num_threads)

# No deadline: a busy machine is not a bug. Derandomised: a failure on one machine is a failure on all.
settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("suite")


@pytest.fixture
def make_generator() -> Callable[[int], torch.Generator]:
    """Factory of CPU generators: `make_generator(seed)` never touches the global random state."""

    def make(seed: int) -> torch.Generator:
        return torch.Generator(device="cpu").manual_seed(seed)

    return make


@pytest.fixture
def generator(make_generator: Callable[[int], torch.Generator]) -> torch.Generator:
    """A CPU generator with seed 0, for tests that need only one."""
    return make_generator(0)
