"""What tests of launched kernels share."""

import pytest
import torch


@pytest.fixture(params=["cluster", "workspace"])
def meeting(request, monkeypatch):
    """Where a head's blocks meet: in a cluster (sm_90 on), or in the workspace."""
    if request.param == "cluster" and request.config.getoption("--emulator-tier") == "ptx_80":
        pytest.skip("sm_80 has no clusters")
    if request.param == "workspace":
        on_gpu = request.node.callspec.params["launched"] == "cuda" and torch.cuda.is_available()
        if on_gpu and torch.cuda.get_device_capability() >= (9, 0):
            pytest.skip("this GPU has clusters: its blocks meet there")
        monkeypatch.setenv("LESS_EMULATOR_ARCHITECTURE", "80")
    return request.param
