"""Policies: who stays, in words, and the protocol by which a user adds one."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from less import H2O, Candidates, LessKVCache, Policy, SinkRecent
from less.policies import policy_from_dict
from tests.helpers import random_qkv


def run(policy, T=60, prompt=30, seed=0, **kw):
    cache = LessKVCache(1, 4, 2, 8, 1, policy, **kw)
    q, k, v = random_qkv(1, 4, 2, T, 8, seed=seed)
    cache.attend(0, q[:, :, :prompt], k[:, :, :prompt], v[:, :, :prompt])
    for t in range(prompt, T):
        yield t, cache
        cache.attend(0, *(x[:, :, t : t + 1] for x in (q, k, v)))
    yield T, cache


def kept(cache):
    return [sorted(p for p in head if p >= 0) for head in cache.positions(0)[0].tolist()]


@pytest.mark.parametrize("per_age", [False, True])
def test_h2o_never_evicts_recent_tokens_nor_sinks(per_age):
    for n, cache in run(H2O(heavy=6, recent=5, sinks=2, per_age=per_age, decay=0.9)):
        for head in kept(cache):
            assert set(range(n - 5, n)) <= set(head)
            assert {0, 1} <= set(head)
            assert len(head) == 11


def test_h2o_lets_exactly_one_token_per_head_go_per_step():
    before = None
    for _, cache in run(H2O(heavy=6, recent=5)):
        now = [set(h) for h in kept(cache)]
        if before is not None:
            for a, b in zip(before, now, strict=True):
                assert len(a - b) == 1
                assert len(b - a) == 1
        before = now


def test_evicted_tokens_never_come_back():
    gone = [set(), set()]
    for n, cache in run(H2O(heavy=6, recent=5, decay=0.8)):
        for head, lost in zip(kept(cache), gone, strict=True):
            assert not lost & set(head)
            lost |= set(range(n)) - set(head)


def test_sink_recent_keeps_the_first_and_the_last():
    for n, cache in run(SinkRecent(sinks=3, recent=7)):
        assert kept(cache) == [[0, 1, 2, *range(n - 7, n)]] * 2


def test_h2o_without_heavy_is_a_window():
    windows = [kept(c) for _, c in run(H2O(heavy=0, recent=7))]
    assert windows == [kept(c) for _, c in run(SinkRecent(sinks=0, recent=7))]


def test_keys_differ_between_heads_but_budgets_do_not():
    *_, (_, cache) = run(H2O(heavy=6, recent=5), seed=3)
    a, b = kept(cache)
    assert a != b
    assert len(a) == len(b) == 11


@pytest.mark.parametrize(
    "policy", [H2O(3, 4, sinks=1, decay=0.5, per_age=True), SinkRecent(2, 9)], ids=str
)
def test_a_policy_survives_being_written_down(policy):
    assert policy_from_dict(policy.to_dict()) == policy
    with pytest.raises(ValueError, match="policy: bad settings for"):
        policy_from_dict({**policy.to_dict(), "speed": 1})
    with pytest.raises(ValueError, match="policy: name must be one of"):
        policy_from_dict({"name": "LRU"})


def policy_of_the_docs():
    text = (Path(__file__).parent.parent / "docs" / "policies.md").read_text()
    names: dict[str, type[Policy]] = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    return names["SmallestKeys"]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_users_policy_decides_who_stays(backend):
    if backend == "native":
        pytest.importorskip("less._C")
    q, k, v = random_qkv(1, 4, 2, 40, 8)
    cache = LessKVCache(1, 4, 2, 8, 1, policy_of_the_docs()(12), backend=backend)
    cache.attend(0, q, k, v)
    for head, held in enumerate(kept(cache)):
        small = k[0, head, :32].norm(dim=-1).argsort()[:4].tolist()
        assert held == sorted([*small, *range(32, 40)])


@dataclass(frozen=True)
class OwnH2O(Policy):
    """H2O, ranked in Python."""

    heavy: int
    recent: int
    decay: float = 1.0

    @property
    def capacity(self) -> int:
        return self.heavy + self.recent

    def rank(self, tokens: Candidates) -> torch.Tensor:
        return H2O(self.heavy, self.recent).rank(tokens)


def test_a_ranking_in_python_equals_the_native_rule():
    native = [c.positions(0) for _, c in run(H2O(6, 5, decay=0.9))]
    python = [c.positions(0) for _, c in run(OwnH2O(6, 5, decay=0.9))]
    assert all(torch.equal(a, b) for a, b in zip(native, python, strict=True))


def test_a_policy_whose_rank_an_inherited_rule_would_replace_is_refused():
    with pytest.raises(ValueError, match="Flat: rank is overridden, but rule is inherited"):

        class Flat(H2O):
            def rank(self, tokens):
                return torch.zeros_like(tokens.score)

    class Ranked(H2O):
        rule = None

        def rank(self, tokens):
            return torch.zeros_like(tokens.score)

    assert Ranked(4, 4).rule is None
