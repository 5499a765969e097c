"""What every test shares: SIMD levels, thread counts, loud skips where CUDA is missing."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


def simd_levels() -> list[str]:
    """The SIMD levels that this build has and this machine can run; none without native code."""
    try:
        from less import _C
    except ImportError:
        return []
    return list(_C.build_facts()["simd_supported"])


@pytest.fixture(params=simd_levels())
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once in each SIMD level."""
    from less import _C

    before = _C.build_facts()["simd"]
    _C._test.set_simd(request.param)
    yield request.param
    _C._test.set_simd(before)


@pytest.fixture
def with_threads() -> Iterator[object]:
    """A function that sets torch's thread count; it is put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def cuda() -> torch.device:
    """A CUDA device. Skips where there is none, fails where LESS_REQUIRE_CUDA=1 promised one."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("LESS_REQUIRE_CUDA") == "1":
        pytest.fail("LESS_REQUIRE_CUDA=1, but torch.cuda.is_available() is false")
    pytest.skip("NO GPU: this test of CUDA kernels did not run")
