"""Threads and processes, as docs/architecture.md promises them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from less import H2O, LessKVCache, Sidekick
from less.backend import ops
from tests.helpers import HeavyValues, random_maps

Q, K, D, B = 4, 2, 16, 2
BACKENDS = ["reference"] + (["native"] if ops.missing(torch.device("cpu")) is None else [])


def new(backend: str = BACKENDS[-1], policy: object = None) -> LessKVCache:
    maps = [random_maps(Q, K, D, 8, 4, "exp", i) for i in range(2)]
    return LessKVCache(
        2, Q, K, D, B, policy or H2O(4, 4), Sidekick(maps, kind="exp"), backend=backend
    )


def step(cache: LessKVCache, T: int, seed: int, layers: tuple[int, ...] = (0, 1)) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    outs = []
    for layer in layers:
        q, k, v = (torch.randn(B, heads, T, D, generator=g) for heads in (Q, K, K))
        outs.append(cache.attend(layer, q, k, v))
    return torch.stack(outs)


def text(cache: LessKVCache, seed: int, steps: int = 40) -> torch.Tensor:
    """A prompt, chunks and decode steps; every output and every byte at the end."""
    lengths = [19, *([1] * steps), 7]
    outs = [step(cache, T, 100 * seed + i).flatten() for i, T in enumerate(lengths)]
    return torch.cat([*outs, *(pool.flatten().float() for pool in cache.pools.values())])


@pytest.mark.parametrize("backend", BACKENDS)
def test_caches_in_threads_of_their_own_give_the_bits_of_one_thread(backend: str) -> None:
    want = [text(new(backend), seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda seed: text(new(backend), seed), range(4)))
    assert all(map(torch.equal, got, want))


class Waiting(HeavyValues):
    """A policy amid whose rank another thread may call."""

    entered = threading.Event()
    go_on = threading.Event()

    def rank(self, tokens: object) -> torch.Tensor:
        self.entered.set()
        assert self.go_on.wait(30)
        return super().rank(tokens)


CALLS: dict[str, Callable[[LessKVCache], object]] = {
    "attend": lambda cache: step(cache, 1, 5, layers=(0,)),
    "another layer": lambda cache: step(cache, 1, 5, layers=(1,)),
    "reorder": lambda cache: cache.reorder(torch.tensor([1, 0])),
    "advance": lambda cache: cache.advance(1),
    "reset": lambda cache: cache.reset(),
    "state_dict": lambda cache: cache.state_dict(),
    "to": lambda cache: cache._move(torch.device("cpu")),
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_thread_in_one_cache_is_refused_and_changes_nothing(backend: str) -> None:
    want = new(backend, HeavyValues(8))
    step(want, 3, 1, layers=(0,))
    cache = new(backend, Waiting(8))
    snapshot = cache.state_dict()
    Waiting.entered.clear()
    Waiting.go_on.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(step, cache, 3, 1, (0,))
        try:
            assert Waiting.entered.wait(30)
            for call in [*CALLS.values(), lambda cache: cache.load_state_dict(snapshot)]:
                with pytest.raises(RuntimeError, match="another thread is in a call of this cache"):
                    call(cache)
        finally:
            Waiting.go_on.set()
        first.result()
    assert all(map(torch.equal, cache.pools.values(), want.pools.values()))
    step(cache, 1, 5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_amid_a_call_is_found_by_the_next(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(HeavyValues):
        def rank(self, tokens: object) -> torch.Tensor:
            raise error

    cache = new(policy=Interrupted(8))
    with pytest.raises(error):
        step(cache, 3, 1)
    monkeypatch.setattr(Interrupted, "rank", HeavyValues.rank)
    for call in CALLS.values():
        if call is not CALLS["reset"]:
            with pytest.raises(RuntimeError, match=r"attend, stopped half way.*cache\.reset\(\)"):
                call(cache)
    cache.reset()
    assert torch.equal(step(cache, 3, 1), step(new(policy=HeavyValues(8)), 3, 1))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="NO fork")
def test_a_fork_goes_on_with_a_cache_of_its_own() -> None:
    cache = new()
    step(cache, 19, 1)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # the parent's threads are not here
        os.write(write, text(cache, 3, steps=4).numpy().tobytes())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        got = torch.frombuffer(bytearray(pipe.read()), dtype=torch.float32)
    assert os.waitpid(pid, 0)[1] == 0
    assert torch.equal(got, text(cache, 3, steps=4))


class Outputs(Dataset):
    """Item i is what a cache of its own gives of text i."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> torch.Tensor:
        return text(new(), i, steps=3)


def test_workers_of_a_data_loader_use_caches() -> None:
    workers = DataLoader(Outputs(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    for got, want in zip(workers, Outputs(), strict=False):
        assert torch.equal(got, want)


def test_models_in_threads_of_their_own_generate_what_they_generate_alone() -> None:
    pytest.importorskip("transformers")
    import less.hf
    from less.evaluate.families import build

    models = [build("llama"), build("gemma3_text")]
    ids = torch.arange(2, 13)[None]

    def generated(model: object) -> torch.Tensor:
        cache = less.hf.cache_for(model, H2O(heavy=4, recent=4))
        with less.hf.attach(model, cache):
            return model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False)

    want = [generated(model) for model in models]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            got = list(pool.map(generated, models))
            assert all(map(torch.equal, got, want))
