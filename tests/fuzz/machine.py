"""A state machine over one layer of a cache: random calls, and what must hold after each."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from less import H2O, LessKVCache, Sidekick, SinkRecent
from less.layer import PageRows
from tests.helpers import HeavyValues, assert_close, random_maps

HOT = {"sinks": 1, "hot": 3}  # of packed formats
#: A wrong call: what it changes, and what its message says. No one changes a bit.
WRONG = {
    "a layer that is not": ({"layer": 1}, "layer must be in 0 .. 0"),
    "no tokens": ({"T": 0}, "q must have shape"),
    "q of another D": ({"q": lambda x: x[..., :-1]}, "q must have shape"),
    "k of other heads": ({"k": lambda x: x.repeat(1, 2, 1, 1)}, "k must have shape"),
    "v of another dtype": ({"v": torch.Tensor.double}, "v must have dtype|v must have k's dtype"),
    "q of whole numbers": ({"q": torch.Tensor.long}, "q must have dtype"),
    "k elsewhere": ({"k": lambda x: x.to("meta")}, "k must be on"),
    "q that wants a gradient": ({"q": lambda x: x.clone().requires_grad_()}, "requires grad"),
    "padding of another T": ({"valid": lambda x: x.repeat(1, 2)}, "valid must have shape"),
    "padding of numbers": ({"valid": torch.Tensor.float}, "valid must have dtype"),
    "out of another T": ({"out": lambda x: x.repeat(1, 1, 2, 1)}, "out must have shape"),
    "out of another dtype": ({"out": torch.Tensor.double}, "out must have contiguous rows"),
    "out that is one row again and again": (
        {"out": lambda x: x[:, :1].expand_as(x) if x.shape[1] > 1 else x[:, :, :0]},
        "out must (not overlap|have shape)",
    ),
    "out that is q": ({"same": True}, "out must not overlap q"),
}


#: Formats of slots that every backend has.
FORMATS = [torch.float32, torch.float16, torch.bfloat16, torch.int8]
FORMATS += ["k4v4", "k8v4", "k4v2", "k3v3", "k2v2"]
VICTIMS = ("fold", "merge", "forget")


@st.composite
def shapes(
    draw: st.DrawFn,
    formats: list[torch.dtype | str],
    victims: tuple[str, ...],
    kinds: tuple[str, ...],
    head_dims: tuple[int, ...],
) -> dict[str, object]:
    """A small cache: its arguments but the maps, whose kind stands for them."""
    dtype = draw(st.sampled_from(formats))
    packed = isinstance(dtype, str)
    K, G = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    least = sum(HOT.values()) + 1 if packed else 2
    S = draw(st.integers(least, 24))
    recent = draw(st.integers(1, S - 1))
    policies = [
        H2O(S - recent, recent, sinks=draw(st.integers(0, min(2, S - recent)))),
        H2O(S - recent, recent, decay=0.9),
        H2O(S - recent, recent, per_age=True),
        SinkRecent(sinks=S - recent, recent=recent),
        HeavyValues(S),
    ]
    victim = draw(st.sampled_from(victims if packed else VICTIMS))
    if victim == "merge":
        policies = policies[1:2]
    ragged = draw(st.booleans())
    return {
        "kv_heads": K,
        "q_heads": K * G,
        "head_dim": draw(st.sampled_from(head_dims)),
        "batch": draw(st.integers(1, 3)),
        "policy": draw(st.sampled_from(policies)),
        "dtype": dtype,
        "victim": victim,
        "kind": draw(st.sampled_from(kinds)) if victim == "fold" else "",
        "softcap": draw(st.sampled_from([None, None, 5.0])),
        "capacities": [[draw(st.integers(least, 40)) for _ in range(K)]] if ragged else None,
        **(HOT if packed else {}),
    }


def bits(cache: LessKVCache) -> list[torch.Tensor]:
    """A copy of every byte of the layer's pages."""
    return [pool.clone() for pool in cache.pools.values()]


class CacheMachine(RuleBasedStateMachine):
    """Random calls of one cache of one layer. Subclasses say which backend computes."""

    BACKEND = "reference"
    FORMATS = FORMATS
    PACKED_VICTIMS: tuple[str, ...] = VICTIMS  # of packed formats
    KINDS: tuple[str, ...] = ("exp", "paper", "centroid")
    HEAD_DIMS: tuple[int, ...] = (16, 32, 64)
    steps = 0

    @initialize(data=st.data(), seed=st.integers(0, 1 << 16))
    def build(self, data: st.DataObject, seed: int) -> None:
        """An empty cache, of which the test knows the tokens that each row has seen."""
        drawn = shapes(self.FORMATS, self.PACKED_VICTIMS, self.KINDS, self.HEAD_DIMS)
        of = data.draw(drawn)
        kind = of.pop("kind")
        Q, K, D = of["q_heads"], of["kv_heads"], of["head_dim"]
        maps = [random_maps(Q, K, D, 8, 4, kind, seed)] if kind else None
        sidekick = Sidekick(maps, kind=kind) if maps else None
        self.arguments = {"layers": 1, "sidekick": sidekick, **of}
        self.cache = self.made(self.BACKEND)
        self.empty = bits(self.cache)
        #: Computes the same calls where they are compared; what it held before does not matter.
        self.other = self.made("reference") if self.BACKEND != "reference" else None
        self.changed = True  # since slots were looked at
        self.seen = torch.zeros(self.cache.batch, dtype=torch.int64)
        self.columns = 0
        self.random = torch.Generator().manual_seed(seed)
        self.bytes = self.cache.memory()["total"]
        self.refused: list[torch.Tensor] | None = None

    def made(self, backend: str) -> LessKVCache:
        """Another empty cache of the same arguments."""
        return LessKVCache(**self.arguments, backend=backend)

    # -- calls -----------------------------------------------------------------------------------

    def call(self, T: int, dtype: torch.dtype, padding: bool) -> dict[str, torch.Tensor]:
        """Arguments of ``attend``: T random tokens of every row."""
        c = self.cache

        def normal(heads: int) -> torch.Tensor:
            return torch.randn(c.batch, heads, T, c.head_dim, generator=self.random).to(dtype)

        q, k, v = normal(c.q_heads), normal(c.kv_heads), normal(c.kv_heads)
        valid = torch.ones(c.batch, T, dtype=torch.bool)
        if padding:
            valid = torch.rand(c.batch, T, generator=self.random) < 0.7
        return {"q": q, "k": k, "v": v, "valid": valid}

    @rule(
        T=st.sampled_from([1, 1, 1, 1, 2, 3, 7, 30]),
        dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
        padding=st.booleans(),
        compared=st.sampled_from([True, False, False]),
    )
    def attend(self, T: int, dtype: torch.dtype, padding: bool, compared: bool) -> None:
        """A prompt, a chunk or a token; now and then beside the reference, from the same pages."""
        call = self.call(T, dtype, padding)
        other = self.other if compared else None
        if other is not None:
            other.load_state_dict(self.cache.state_dict())
            want = other.attend(0, **{n: x.clone() for n, x in call.items()})
        out = self.cache.attend(0, **call)
        self.changed = True
        self.seen += call["valid"].sum(1)
        self.columns += T
        assert out.shape == call["q"].shape
        assert out.dtype == dtype
        assert out.isfinite().all()
        assert not out.transpose(1, 2)[~call["valid"]].any(), "padding has an output"
        if other is not None:
            # Few bits round a hot row that lies between two codes to either.
            few = isinstance(self.cache.dtype, str) or self.cache.dtype == torch.int8
            assert_close(out, want, dtype, factor=4 if not few else 4e3 if T > 1 else 1e3)
            self.same_tokens(other)

    def same_tokens(self, other: LessKVCache) -> None:
        """Both keep the same tokens, but where scores tie within rounding."""
        mine, theirs = self.cache.positions(0).sort(-1), other.positions(0).sort(-1)
        assert torch.equal(self.cache.seen, other.seen)
        rows = (mine.values != theirs.values).any(-1).nonzero().tolist()
        for b, h in rows:
            scores = []
            for cache, own, foreign in (
                (self.cache, mine, theirs),
                (other, theirs, mine),
            ):
                alone = ~torch.isin(own.values[b, h], foreign.values[b, h])
                scores.append(cache.scores(0)[b, h][own.indices[b, h][alone]].sort().values)
            assert scores[0].shape == scores[1].shape
            if isinstance(self.cache.policy, SinkRecent):
                raise AssertionError(f"rows {b}, head {h}: other tokens stay under {other.policy}")
            if isinstance(self.cache.policy, H2O) and not self.cache.policy.per_age:
                torch.testing.assert_close(*scores, rtol=2e-2, atol=1e-4)

    @rule(T=st.sampled_from([1, 1, 5]), name=st.sampled_from(sorted(WRONG)))
    def wrong_call(self, T: int, name: str) -> None:
        """A call that is refused by name, and changes nothing."""
        changes, message = WRONG[name]
        call = self.call(changes.get("T", T), torch.float32, True)
        call["out"] = torch.full_like(call["q"], 7.0)
        if "same" in changes:
            call["out"] = call["q"]
        for argument, change in changes.items():
            if callable(change):
                call[argument] = change(call[argument])
        before = bits(self.cache)
        written = call["out"].clone()
        with pytest.raises((ValueError, TypeError, RuntimeError), match=f"attend: .*({message})"):
            self.cache.attend(changes.get("layer", 0), **call)
        assert all(map(torch.equal, before, bits(self.cache)))
        assert torch.equal(written, call["out"])

    # -- what moves pages ------------------------------------------------------------------------

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        """Rows become copies of rows."""
        B = self.cache.batch
        rows = torch.tensor(data.draw(st.lists(st.integers(0, B - 1), min_size=B, max_size=B)))
        before = bits(self.cache)
        self.cache.reorder(rows)
        assert all(torch.equal(x[rows], y) for x, y in zip(before, bits(self.cache), strict=True))
        self.seen, self.changed = self.seen[rows], True

    @rule(row=st.sampled_from([-1, 3]))
    def wrong_reorder(self, row: int) -> None:
        """Rows that are not there are refused."""
        before = bits(self.cache)
        with pytest.raises(ValueError, match="reorder: rows must be in"):
            self.cache.reorder(torch.full((self.cache.batch,), row))
        assert all(map(torch.equal, before, bits(self.cache)))

    @rule()
    def reset(self) -> None:
        """What was held is forgotten: the pages are those of a new cache."""
        self.cache.reset()
        assert all(map(torch.equal, self.empty, bits(self.cache)))
        self.seen.zero_()
        self.columns, self.changed = 0, True

    @rule(way=st.sampled_from(["snapshot", "deepcopy", "to"]))
    def carry(self, way: str) -> None:
        """Another cache with the same bits goes on."""
        before = self.cache.state_dict()
        if way == "snapshot":
            other = self.made(self.BACKEND)
            other.load_state_dict(before)
        elif way == "deepcopy":
            other = copy.deepcopy(self.cache)
            pools = zip(self.cache.pools.values(), other.pools.values(), strict=True)
            assert all(x.data_ptr() != y.data_ptr() for x, y in pools)
        else:
            other = self.cache.to("cpu")
        after = other.state_dict()
        assert before["columns"] == after["columns"]
        assert all(torch.equal(x, after["tensors"][n]) for n, x in before["tensors"].items())
        self.cache, self.changed = other, True

    @rule(T=st.sampled_from([1, 4]), padding=st.booleans(), data=st.data())
    def shuffled_pages(self, T: int, padding: bool, data: st.DataObject) -> None:
        """In another order in a larger pool, one row without a page, pages give the same bits."""
        B, layer, pool = self.cache.batch, self.cache.held[0], self.cache.pools[0]
        pages = torch.tensor(data.draw(st.permutations(range(B + 2)))[:B], dtype=torch.int32)
        large = torch.randint(0, 256, (B + 2, pool.shape[1]), generator=self.random).byte()
        large[pages.long()] = pool
        before = large.clone()
        absent = data.draw(st.integers(0, B))  # B: none
        call = self.call(T, torch.float32, padding)
        used = pages.clone()
        if absent < B:
            used[absent] = -1
            call["valid"][absent] = False
        got = layer.attend(large, **call, pages=PageRows(used))
        mine = pool.clone()
        want = layer.attend(mine, **call)
        for b in range(B):
            assert torch.equal(got[b], want[b])
            # A row that is all padding decays scores all the same; one without a page is untouched.
            there = before[int(pages[b])] if b == absent else mine[b]
            assert torch.equal(large[int(pages[b])], there)
        others = [n for n in range(B + 2) if n not in pages.tolist()]
        assert torch.equal(large[others], before[others])

    # -- what holds after every step -------------------------------------------------------------

    @precondition(lambda self: hasattr(self, "cache"))
    @invariant()
    def counts(self) -> None:
        """Tokens and bytes."""
        type(self).steps += 1
        cache = self.cache
        assert torch.equal(cache.seen, self.seen)
        assert cache.columns == self.columns
        if type(self).steps % 8 == 0:
            memory = cache.memory()
            assert memory["total"] == self.bytes
            assert memory["total"] == sum(
                memory[n] for n in ("slots", "state", "maps", "workspace", "native")
            )

    @precondition(lambda self: hasattr(self, "cache") and self.changed)
    @invariant()
    def slots(self) -> None:
        """Each head holds as many tokens as there were, up to its slots; none stands twice."""
        cache = self.cache
        positions = cache.positions(0)
        assert (positions >= -1).all()
        S = torch.tensor(cache.layouts[0].capacities)
        last = self.seen[:, None] - 1
        assert torch.equal((positions >= 0).sum(-1), (last + 1).minimum(S))
        newest = positions.amax(-1)
        if isinstance(cache.policy, HeavyValues):  # protects nobody
            assert (newest <= last).all()
        else:
            assert torch.equal(newest.long(), last.expand_as(newest))
        order = positions.sort(-1).values
        twice = (order[..., 1:] == order[..., :-1]) & (order[..., 1:] >= 0)
        assert not twice.any(), "a token stands twice"
        self.mass(positions < 0)

    def mass(self, empty: torch.Tensor) -> None:
        """Scores, weights and state are sums of what is not negative."""
        cache = self.cache
        self.changed = False
        scores, weights = cache.scores(0), cache.weights(0)
        assert scores.isfinite().all()
        assert (scores >= 0).all()
        assert not scores[empty].any()
        assert not weights[empty].any()
        if cache.victim == "merge":
            count = weights.double().exp().masked_fill(empty, 0).sum(-1)
            wanted = self.seen[:, None].double().expand_as(count)
            # Hot rows and protected tokens take no others in: a head that has few more forgets.
            if isinstance(cache.dtype, str) or not isinstance(cache.layouts[0].capacity, int):
                assert (count <= wanted * (1 + 1e-4)).all()
                assert (count >= (~empty).sum(-1) * (1 - 1e-4)).all()
            else:
                torch.testing.assert_close(count, wanted, rtol=1e-4, atol=1e-4)
        else:
            assert not weights.any()
        share = cache.stats()["memory_share"][0]
        assert 0.0 <= share <= 1.0
        if cache.victim == "fold":
            H, z = cache.state(0)
            assert H.isfinite().all()
            assert z.isfinite().all()
            assert (z >= 0).all()
            least = min(cache.layouts[0].capacities)
            assert bool(z.any()) <= bool((self.seen > least).any())
        else:
            assert share == 0.0
