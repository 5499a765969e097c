"""Caches whose steps are launched: on the emulated GPU, and on a GPU where there is one."""

import re

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from less import H2O, Full, LessKVCache, Sidekick, SinkRecent, reference
from less.dtypes import EIGHT_BITS
from tests.helpers import assert_close, random_maps, random_qkv

pytest.importorskip("less._C")
from less.backend import ops

B, Q, K, D, E, R = 2, 4, 2, 16, 8, 4
FP8 = torch.float8_e4m3fn


def build(
    device, policy, *, kind="exp", dtype=torch.float32, backend="native", softcap=None, **changed
):
    sizes = {"layers": 1, "q_heads": Q, "kv_heads": K, "head_dim": D, "batch": B} | changed
    sidekick = None
    if kind:
        maps = random_maps(sizes["q_heads"], sizes["kv_heads"], sizes["head_dim"], E, R, kind)
        sidekick = Sidekick([maps] * sizes["layers"], kind=kind)
    return LessKVCache(
        **sizes,
        policy=policy,
        sidekick=sidekick,
        dtype=dtype,
        device=device,
        backend=backend,
        softcap=softcap,
    )


# -- what is missing, by name ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("built_for", "capability", "served"),
    [
        (["80", "90a", "100", "120+PTX"], (8, 0), True),
        (["80", "90a", "100", "120+PTX"], (8, 9), True),  # code of 8.0 runs on 8.9
        (["80", "90a", "100", "120+PTX"], (9, 0), True),
        (["80", "90a", "100", "120+PTX"], (12, 1), True),
        (["80", "90a", "100", "120+PTX"], (13, 0), True),  # compiled from PTX when it is loaded
        (["80", "90a", "100", "120+PTX"], (7, 5), False),
        (["90a"], (10, 0), False),
        (["90a"], (8, 0), False),
        (["103"], (10, 0), False),
        (["100f"], (10, 3), True),
        (["80+PTX"], (9, 0), True),
    ],
)
def test_a_gpu_is_served_by_its_architectures_code_or_by_ptx(built_for, capability, served):
    reason = ops._unserved(built_for, capability)
    assert (reason is None) == served
    if not served:
        major, minor = capability
        assert f"this GPU is {major}{minor}; build with LESS_CUDA_ARCHS={major}{minor}" in reason
        assert built_for[0] in reason


def test_what_keeps_a_cache_off_the_gpu_is_named(monkeypatch):
    def refusal():
        with pytest.raises(ValueError, match="LessKVCache: backend 'native' is not available") as e:
            build("cuda", H2O(4, 4))
        return str(e.value)

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert re.search(r"this torch, .*, was built without CUDA", refusal())
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds no GPU" in refusal()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ops, "_cuda_built", False)
    assert "less was built without CUDA" in refusal()
    monkeypatch.setattr(ops, "_cuda_built", True)
    monkeypatch.setattr(ops._C, "build_facts", lambda: {"cuda_archs": ["80"]})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "architectures 80, and this GPU is 75" in refusal()


# -- what a GPU is asked, without one --------------------------------------------------------------


class Asked(TorchDispatchMode):
    """Notes every op, and the kinds of device that its tensors lie on.

    The constants of a layer, int64 [R + 1, S, n], are the host's own: an op reads them there.
    """

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if str(func).startswith("less."):
            tensors = [x for x in tensors if x.dtype != torch.int64 or x.dim() != 3]
        self.ops.append((str(func), {x.device.type for x in tensors if x.dim()}))
        return out


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, FP8], ids=str)
@pytest.mark.parametrize("kind", ["exp", "centroid", "paper", ""])
@pytest.mark.parametrize("policy", [H2O(4, 4), SinkRecent(recent=4, sinks=2), Full(60)], ids=repr)
def test_calls_on_a_gpu_meet_no_tensor_of_the_cpu_and_wait_for_nothing(
    monkeypatch, policy, kind, dtype
):
    """On tensors without values: to ask one for its value, which would wait, is an error."""
    monkeypatch.setattr(ops, "missing", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(ops, "decode_step_workspace", lambda *args: 64)
    maps = random_maps(Q, K, D, E, R, kind)
    sidekick = Sidekick([maps], kind=kind) if kind else None
    at = "cuda:0"  # by number: torch without CUDA cannot tell which is the current one
    with FakeTensorMode(allow_non_fake_inputs=True), Asked() as asked:
        cache = LessKVCache(
            layers=1, q_heads=Q, kv_heads=K, head_dim=D, batch=B, policy=policy, sidekick=sidekick,
            dtype=dtype, device=at,
        )  # fmt: skip
        for T in (13, 1, 5, 1):
            for valid in (None, torch.ones(B, T, dtype=torch.bool, device=at)):
                q, k, v = (
                    torch.zeros(B, heads, T, D, dtype=torch.float16, device=at)
                    for heads in (Q, K, K)
                )
                out = torch.empty_like(q) if T == 1 else None
                asked.ops.clear()
                assert cache.attend(0, q, k, v, valid, out).device == torch.device(at)
                assert asked.ops
                assert all(kinds <= {"cuda"} for _, kinds in asked.ops), asked.ops
                if T == 1:  # nothing beside the launch, and nothing new
                    assert [name for name, _ in asked.ops] == ["less.decode_step.default"]
        asked.ops.clear()
        cache.reset()
        cache.state_dict()
        assert all(kinds <= {"cuda"} for _, kinds in asked.ops), asked.ops


# -- steps without Python --------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [H2O(4, 4), SinkRecent(recent=4, sinks=2)], ids=repr)
def test_a_given_output_is_written_and_returned(policy):
    caches = [build("cpu", policy, backend=name) for name in ("native", "native", "reference")]
    for step, T in enumerate((5, 1, 1, 3)):
        q, k, v = random_qkv(B, Q, K, T, D, seed=step)
        want = caches[0].attend(0, q, k, v)
        for cache in caches[1:]:
            out = torch.full_like(q, torch.nan)
            assert cache.attend(0, q, k, v, out=out) is out
            assert_close(out, want, torch.float32)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(B, Q, 2, D), r"out must have shape \[2, 4, 1, 16\]"),
        (
            torch.empty(B, Q, 1, D, dtype=torch.float16),
            "out must have contiguous rows of q's dtype",
        ),
        (torch.empty(B, Q, 1, 2 * D)[..., ::2], "out must have contiguous rows"),
    ],
)
def test_an_output_that_does_not_fit_is_refused(out, message):
    cache = build("cpu", H2O(4, 4))
    with pytest.raises(ValueError, match=f"attend: {message}"):
        cache.attend(0, *random_qkv(B, Q, K, 1, D), out=out)
    assert cache.columns == 0


def test_replayed_steps_are_counted_when_the_cache_is_told():
    seen, told = (build("cpu", H2O(4, 4)) for _ in range(2))
    for step in range(12):
        qkv = random_qkv(B, Q, K, 1, D, seed=step)
        seen.attend(0, *qkv)
        told.attend(0, *qkv)
        told.session.columns = [0]  # as if a graph had done it
    told.advance(12)
    assert told.columns == seen.columns == 12
    chunk = random_qkv(B, Q, K, 3, D, seed=99)
    assert torch.equal(told.attend(0, *chunk), seen.attend(0, *chunk))
    with pytest.raises(ValueError, match="advance: steps must be a whole number >= 0, got -1"):
        told.advance(-1)


# -- fp8 -------------------------------------------------------------------------------------------


def test_fp8_rows_are_within_a_sixteenth_of_a_number_and_exact_where_they_can_be():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(5, 33, generator=g, dtype=torch.float64)
    eight, scale = reference.quantize(x, dtype=FP8)
    assert eight.dtype == FP8
    back = reference.dequantize(eight, scale)
    assert ((back - x).abs() <= torch.maximum(x.abs() / 16, scale[:, None] * 2**-10)).all()
    assert torch.allclose(back.abs().amax(-1), x.abs().amax(-1), rtol=1e-12)
    again, same = reference.quantize(back, dtype=FP8)
    torch.testing.assert_close(reference.dequantize(again, same), back)
    for bad in (torch.nan, torch.inf):
        x[0, 0] = bad
        eight, scale = reference.quantize(x, dtype=FP8)
        assert not scale[0].isfinite()
        assert (eight[0].float() == 0).all()


@pytest.mark.parametrize("kind", ["", "exp"])
def test_a_cache_of_fp8_slots_gives_what_a_cache_gives_that_is_fed_the_rounded_rows(kind):
    policy = H2O(heavy=4, recent=4)
    eight = build("cpu", policy, kind=kind, dtype=FP8, backend="reference")
    plain = build("cpu", policy, kind=kind, backend="reference")
    for step in range(40):
        q, k, v = random_qkv(B, Q, K, 6 if step == 0 else 1, D, seed=step)
        rounded = (reference.dequantize(*reference.quantize(x, dtype=FP8)) for x in (k, v))
        assert_close(eight.attend(0, q, k, v), plain.attend(0, q, *rounded), torch.float32)
        assert torch.equal(eight.positions(0), plain.positions(0))
    saved = eight.state_dict()
    eight.reorder(torch.tensor([1, 0]))
    assert torch.equal(eight.positions(0)[0], plain.positions(0)[1])
    eight.reset()
    eight.load_state_dict(saved)
    assert torch.equal(eight.positions(0), plain.positions(0))
    memory = eight.memory()
    (layout,) = eight.layouts
    assert memory["slots"] == B * (layout.nbytes - layout.header_bytes) - memory["state"]
    assert memory["full"] == B * K * 2 * D * 2 * eight.columns


def test_fp8_slots_are_refused_by_name_where_there_are_no_kernels():
    with pytest.raises(ValueError, match="with the native backend on cpu, got torch.float8_e4m3fn"):
        build("cpu", H2O(4, 4), dtype=FP8)


# -- whole decodes on the launched kernels ---------------------------------------------------------

RUNS = {
    "h2o": (500, H2O(heavy=10, recent=6, decay=0.98), "exp", torch.float32),
    "paper maps, per age": (500, H2O(heavy=8, recent=8, per_age=True), "paper", torch.float32),
    "int8": (500, H2O(heavy=10, recent=6, decay=0.98), "exp", torch.int8),
    "sinks": (100, SinkRecent(recent=12, sinks=4), "exp", torch.float32),
    "eviction alone": (100, H2O(heavy=10, recent=6), "", torch.float32),
    "fp16": (100, H2O(heavy=10, recent=6, decay=0.98), "exp", torch.float16),
    "bf16": (100, H2O(heavy=10, recent=6, decay=0.98), "exp", torch.bfloat16),
    "fp8": (100, H2O(heavy=10, recent=6, decay=0.98), "exp", FP8),
    "soft cap": (100, H2O(heavy=10, recent=6), "exp", torch.float32),
}


def steps_of(B, Q, K, D, dtype, steps):
    for step in range(steps):
        q, k, v = random_qkv(B, Q, K, 1, D, seed=step)
        if dtype not in EIGHT_BITS:
            q, k, v = (x.to(dtype) for x in (q, k, v))
        yield q, k, v


@pytest.mark.parametrize("run", RUNS)
def test_every_step_loses_the_same_tokens_as_the_reference(launched, run):
    steps, policy, kind, dtype = RUNS[run]
    sizes = {"q_heads": 4, "kv_heads": 2, "head_dim": 64, "batch": 1}
    sizes["softcap"] = 1.5 if run == "soft cap" else None
    cache = build(launched, policy, kind=kind, dtype=dtype, **sizes)
    plain = build("cpu", policy, kind=kind, dtype=torch.float64, backend="reference", **sizes)
    bar = dtype if dtype.itemsize > 1 else torch.float32
    for q, k, v in steps_of(1, 4, 2, 64, dtype, steps):
        out = cache.attend(0, q.to(launched), k.to(launched), v.to(launched)).cpu()
        if dtype in EIGHT_BITS:
            k, v = (reference.dequantize(*reference.quantize(x, dtype=dtype)) for x in (k, v))
        want = plain.attend(0, q.double(), k.double(), v.double())
        assert_close(out, want, bar)
        assert torch.equal(cache.positions(0).cpu(), plain.positions(0))
    if kind:
        for got, state in zip(cache.state(0), plain.state(0), strict=True):
            assert_close(got.cpu(), state, torch.float32, factor=5)
    assert_close(cache.scores(0).cpu(), plain.scores(0), torch.float32, factor=5)
    assert cache.stats()["evictions"] == plain.stats()["evictions"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8], ids=str)
def test_prompts_chunks_and_padded_rows_are_the_references(launched, dtype):
    sizes = {"q_heads": 4, "kv_heads": 2, "head_dim": 64, "batch": 2}
    policy = H2O(heavy=10, recent=6, decay=0.98)
    cache = build(launched, policy, dtype=dtype, **sizes)
    plain = build("cpu", policy, dtype=torch.float64, backend="reference", **sizes)
    for call, T in enumerate((21, 1, 7, 1, 30)):
        qkv = random_qkv(2, 4, 2, T, 64, seed=call, dtype=torch.float32)
        if dtype == torch.float16:
            qkv = tuple(x.half() for x in qkv)
        q, k, v = qkv
        valid = torch.ones(2, T, dtype=torch.bool)
        valid[1, : T // 3] = False
        out = cache.attend(0, *(x.to(launched) for x in (q, k, v, valid))).cpu()
        if dtype == torch.int8:
            k, v = (reference.dequantize(*reference.quantize(x)) for x in (k, v))
        want = plain.attend(0, q.double(), k.double(), v.double(), valid)
        assert_close(out, want, dtype if dtype.itemsize > 1 else torch.float32)
        assert torch.equal(cache.seen.cpu(), plain.seen)
        held = [x.positions(0).cpu().sort(-1).values for x in (cache, plain)]
        assert torch.equal(*held)
    for got, state in zip(cache.state(0), plain.state(0), strict=True):
        assert_close(got.cpu(), state, torch.float32, factor=5)
    share = [x.stats()["memory_share"][0] for x in (cache, plain)]
    assert abs(share[0] - share[1]) < 1e-3


def test_a_model_generates_what_it_does_with_the_reference(launched):
    pytest.importorskip("transformers")
    from less.hf import attach, cache_for
    from tests.tiny_model import tiny_model

    model = tiny_model(head_dim=64).to(launched)
    sidekick = Sidekick.random(2, 4, 2, 64, R, E, "exp", torch.Generator().manual_seed(0))
    ids = torch.randint(250, (2, 24), generator=torch.Generator().manual_seed(1)).to(launched)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    texts = []
    for backend in ("native", "reference"):
        cache = cache_for(model, H2O(heavy=8, recent=8), sidekick, batch=2, backend=backend)
        with attach(model, cache):
            texts.append(
                model.generate(
                    ids, attention_mask=mask, past_key_values=cache, max_new_tokens=12,
                    min_new_tokens=12, do_sample=False,
                )
            )  # fmt: skip
    assert torch.equal(*texts)
    assert texts[0].shape == (2, 36)


def test_emulated_blocks_that_meet_in_memory_find_their_scratch_in_the_cache(emulator, monkeypatch):
    monkeypatch.setenv("LESS_EMULATOR_ARCHITECTURE", "80")  # no clusters
    sizes = {"q_heads": 4, "kv_heads": 2, "head_dim": 64, "batch": 1, "layers": 2}
    policy = H2O(heavy=40, recent=40)
    cache = build("cpu", policy, **sizes)
    plain = build("cpu", policy, backend="reference", **sizes)
    scratch = cache.memory()["workspace"] - plain.memory()["workspace"]
    (backend,) = {layer.backend for layer in cache.held}
    assert scratch == backend.workspace > 0
    held = backend._scratch
    for q, k, v in steps_of(1, 4, 2, 64, torch.float32, 90):
        for layer in range(2):
            out = cache.attend(layer, q, k, v)
            assert_close(out, plain.attend(layer, q, k, v), torch.float32)
    assert backend._scratch is held
    assert torch.equal(cache.positions(1), plain.positions(1))


def test_emulated_scratch_that_is_too_small_is_refused(emulator, monkeypatch):
    monkeypatch.setenv("LESS_EMULATOR_ARCHITECTURE", "80")
    cache = build("cpu", H2O(heavy=40, recent=40), q_heads=4, kv_heads=2, head_dim=64, batch=1)
    cache.held[0].backend._scratch = torch.zeros(8, dtype=torch.uint8)
    q, k, v = next(steps_of(1, 4, 2, 64, torch.float32, 1))
    with pytest.raises(RuntimeError, match="decode_step: workspace must have at least .* got 8"):
        cache.attend(0, q, k, v)


# -- on a GPU alone --------------------------------------------------------------------------------


def steps_on(device, steps):
    for qkv in steps_of(2, 8, 2, 64, torch.float16, steps):
        yield [x.to(device) for x in qkv]


def build_on(device):
    sizes = {"q_heads": 8, "kv_heads": 2, "head_dim": 64, "batch": 2}
    return build(device, H2O(heavy=40, recent=40), dtype=torch.float16, **sizes)


def test_a_graph_on_cuda_replays_the_very_steps(cuda):
    eager, captured = build_on(cuda), build_on(cuda)
    for qkv in steps_on(cuda, 100):  # into the steady state; the launches are warm by then
        assert torch.equal(captured.attend(0, *qkv), eager.attend(0, *qkv))
    q, k, v = (x.clone() for x in next(steps_on(cuda, 1)))
    out = torch.empty_like(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.attend(0, q, k, v, out=out)
    assert captured.columns == 100
    for qkv in steps_on(cuda, 300):
        for static, x in zip((q, k, v), qkv, strict=True):
            static.copy_(x)
        graph.replay()
        assert torch.equal(out, eager.attend(0, *qkv))
    captured.advance(300)
    assert captured.columns == eager.columns == 400
    assert torch.equal(captured.positions(0), eager.positions(0))
    assert torch.equal(captured.seen, eager.seen)


def test_a_step_on_cuda_neither_synchronises_nor_allocates(cuda):
    cache = build_on(cuda)
    steps = list(steps_on(cuda, 100))
    out = torch.empty_like(steps[0][0])
    cache.attend(0, *steps[0], out=out)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats(cuda)["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for qkv in steps[1:]:
            cache.attend(0, *qkv, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats(cuda)["allocation.all.allocated"] == before


def test_another_stream_on_cuda_goes_on_where_the_first_left_off(cuda):
    one, two = build_on(cuda), build_on(cuda)
    side = torch.cuda.Stream(cuda)
    for step, qkv in enumerate(steps_on(cuda, 120)):
        want = one.attend(0, *qkv)
        stream = side if step % 2 else torch.cuda.default_stream(cuda)
        stream.wait_stream(torch.cuda.default_stream(cuda))
        with torch.cuda.stream(stream):
            got = two.attend(0, *qkv)
        torch.cuda.default_stream(cuda).wait_stream(stream)
        assert torch.equal(got, want)
