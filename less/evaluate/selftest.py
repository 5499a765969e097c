"""Every native kernel against the reference on this machine, in seconds: ``less-kv doctor``.

A case is one layer of small pages, filled by a prompt, a chunk and single tokens until it evicts,
once through the native kernels and once through ``less.reference``. The outputs must agree within
the rounding of sums, and the same tokens must be kept. Two ops that no layer calls, which callers
use by themselves, are tried by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from less.backend import ops
from less.cache import PagedLayer
from less.dtypes import format_name, row_format
from less.layer import PageLayout, State
from less.layer.kinds import KINDS
from less.policies import H2O
from less.reference import fold, prompt_scores
from less.sidekick import Sidekick

#: Tokens of the calls of a case: a prompt longer than the page, a chunk, and steps.
CALLS = (40, 7, *(1,) * 8)
_ROWS, _Q, _K, _D, _RANK, _SLOTS = 2, 4, 2, 64, 8, 24
#: Largest difference to the reference, as a part of the largest output. A mean of merged rows
#: that lies between two codes has either, but for the rounding of sums, so packed rows that merge
#: have more room than one code of few bits in ``_SLOTS`` slots.
ROUNDING, CODE = 1e-3, 0.1


@dataclass(frozen=True)
class Case:
    """One layer that is tried.

    Attributes:
        rows: A dtype or packed format of slots.
        victim: ``"fold"``, ``"merge"`` or ``"forget"``.
        maps: A kind of feature maps; None without a state.
    """

    rows: torch.dtype | str
    victim: str
    maps: str | None = None

    @property
    def name(self) -> str:
        """``k4v4 merge``."""
        kind = "" if self.maps is None else f" {self.maps} maps"
        return f"{format_name(self.rows)} {self.victim}{kind}"


def cases(device: torch.device) -> list[Case]:
    """All formats with all victims, and all kinds of maps, that the kernels of a device have."""
    found = [
        Case(rows, victim) for rows in ops.slot_dtypes(device) for victim in ("forget", "merge")
    ]
    for kind, row in KINDS.items():
        if row.centred and device.type != "cpu":
            continue  # refused by name: no CUDA kernel has such maps
        rows = (torch.float16, torch.int8, "k4v4") if device.type == "cpu" else (torch.float16,)
        found += [Case(x, "fold", kind) for x in rows]
    return found


def run(device: torch.device) -> Iterator[tuple[str, str | None]]:
    """The name of each case, and what is wrong: None where the kernels agree with the reference.

    Args:
        device: Whose kernels.
    """
    for case in cases(device):
        yield case.name, failure(case, device)
    for name, (got, want) in _alone(device).items():
        yield name, _difference(got.cpu(), want, ROUNDING)


def failure(case: Case, device: torch.device) -> str | None:
    """What is wrong with one case; None: nothing."""
    native, reference = (
        _layer(case, backend, place)
        for backend, place in (("native", device), ("reference", torch.device("cpu")))
    )
    pools = native.new_pool(_ROWS), reference.new_pool(_ROWS)
    allowed = CODE if case.victim == "merge" and row_format("", case.rows).packed else ROUNDING
    for number, tokens in enumerate(CALLS):
        q, k, v = _drawn(tokens, number)
        got = native.attend(pools[0], *(x.to(device) for x in (q, k, v))).cpu()
        want = reference.attend(pools[1], q, k, v)
        wrong = _difference(got, want, allowed)
        if wrong is not None:
            return f"call {number}, of {tokens} tokens, {wrong}"
    kept = [
        layer.layout.views(pool.cpu())
        for layer, pool in zip((native, reference), pools, strict=True)
    ]
    for mine, its in zip(*kept, strict=True):
        if not torch.equal(mine.slots.position, its.slots.position):
            return "other tokens were kept than by the reference"
    return None


def _difference(got: Tensor, want: Tensor, allowed: float) -> str | None:
    """How far numbers are from the reference's, as a part of the largest; None: near enough."""
    far = float((got - want).abs().max() / want.abs().max())
    return None if far <= allowed else f"is {far:.1e} from the reference, {allowed:.1e} allowed"


def _alone(device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """What ops that no layer calls computed, and what the reference did."""
    q, k, v = _drawn(CALLS[0], 0)
    on = [x.to(device) for x in (q, k, v)]
    score = ops.prompt_scores(*on[:2], scale=_D**-0.5)
    features = k[..., :_RANK].abs().contiguous()
    H, z = torch.zeros(_ROWS, _K, _RANK, _D), torch.zeros(_ROWS, _K, _RANK)
    held = State(H.to(device, copy=True), z.to(device, copy=True))
    ops.fold(held.H, held.z, features.to(device), on[2])
    return {
        "prompt_scores": (score, prompt_scores(q, k, scale=_D**-0.5)),
        "fold": (held.H, fold(State(H, z), features, v).H),
    }


def _layer(case: Case, backend: str, device: torch.device) -> PagedLayer:
    packed = row_format("selftest", case.rows).packed
    sidekick = (
        None
        if case.maps is None
        else Sidekick.random(1, _Q, _K, _D, _RANK, hidden=16, kind=case.maps, generator=0)
    )
    layout = PageLayout(
        _K,
        _D,
        _SLOTS,
        case.rows,
        rank=0 if sidekick is None else _RANK,
        sinks=2 if packed else None,
        hot=4 if packed else None,
        weights=(packed and case.victim == "merge") or None,
    )
    return PagedLayer(
        H2O(heavy=_SLOTS - 6, recent=6, decay=0.97),
        layout,
        _Q,
        maps=None if sidekick is None else sidekick[0],
        kind=case.maps or "exp",
        victim=case.victim,
        device=device,
        backend=backend,
    )


def _drawn(tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a call."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(_ROWS, heads, tokens, _D, generator=g) for heads in (_Q, _K, _K))
    return 1.5 * q, k, v
