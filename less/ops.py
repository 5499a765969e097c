"""The native ops, under their Python names.

Each op is ``torch.ops.less.<name>``, registered by ``csrc/ops/<name>.cpp`` when the library
``less._C`` is loaded, which importing this module does. Beside each stands its fake kernel, by
which torch traces through the op without running it. ``less.reference`` says in plain torch what
each computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

_native = True
try:
    from less import _C
except ModuleNotFoundError as error:
    # Installed with LESS_NATIVE=off. A library that is there but fails to load stays an error.
    if error.name != "less._C":
        raise
    _native = False

_cuda_built = _native and bool(_C.build_facts()["cuda"])
if _cuda_built and torch.cuda.is_available():
    from less import _cuda  # noqa: F401


def missing(device: torch.device) -> str | None:
    """Why the native ops cannot run on this device, or None where they can."""
    if not _native:
        return "the native kernels were not built (LESS_NATIVE=off, or an unbuilt source tree)"
    if device.type != "cpu":
        return f"there are no native kernels for {device.type}"
    return None


def fold(H: Tensor, z: Tensor, psi_k: Tensor, v: Tensor, keep: Tensor | None = None) -> None:
    """Fold evicted tokens into the low-rank state, in place, in the order given.

    Args:
        H: Running sum of psi(k) v^T, float32 [B, K, R, D]. Written.
        z: Running sum of psi(k), float32 [B, K, R]. Written.
        psi_k: Features of the evicted keys, float32 [B, K, N, R].
        v: Their values, float32, bfloat16 or float16 [B, K, N, D].
        keep: Bool [B, K, N]; where False the token is neither folded nor read.

    Raises:
        RuntimeError: A shape, dtype, layout or device differs from the above.

    Source: arXiv:2402.09398, eq. 5.
    """
    torch.ops.less.fold(H, z, psi_k, v, keep)


if _native:

    @torch.library.register_fake("less::fold")
    def _fold_fake(
        H: Tensor, z: Tensor, psi_k: Tensor, v: Tensor, keep: Tensor | None = None
    ) -> None:
        return None
