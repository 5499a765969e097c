"""Sidekicks: what is held, what is refused, and that files come back as they went."""

import json
import os
import struct

import pytest
import torch

from less import Sidekick
from less.layer import PackedMaps
from less.layer.kinds import KINDS, ORDER, MapKind
from less.sidekick import MATRICES, TENSORS, shipped, shipped_names
from less.sidekick.identity import model_identity
from tests.ops import flat_reference as reference
from tests.tiny_model import tiny_model

SIZES = {"Q": 4, "K": 2, "D": 8, "E": 6, "R": 3}


def layer(kind="exp", seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn([SIZES[c] for c in letters], generator=g).to(dtype)
        for name, letters in TENSORS[kind].items()
    }


def changed(kind="exp", **tensors):
    return {**layer(kind), **tensors}


def without(name, kind="exp"):
    return {n: t for n, t in layer(kind).items() if n != name}


@pytest.mark.parametrize("kind", ["exp", "centroid", "paper"])
def test_a_sidekick_holds_float32_copies_and_knows_its_sizes(kind):
    given = [layer(kind, 0, torch.float16), layer(kind, 1, torch.bfloat16)]
    sidekick = Sidekick(layers=given, kind=kind)
    assert (sidekick.layers, len(sidekick), sidekick.kind) == (2, 2, kind)
    sizes = (sidekick.q_heads, sidekick.kv_heads, sidekick.head_dim, sidekick.hidden, sidekick.rank)
    assert sizes == (4, 2, 8, 0 if kind == "centroid" else 6, 3)
    for held, source in zip(sidekick, given, strict=True):
        assert list(held) == list(TENSORS[kind])
        for name, tensor in held.items():
            assert tensor.dtype == torch.float32
            assert tensor.is_contiguous()
            assert torch.equal(tensor, source[name].float())
    name = KINDS[kind].matrices[0]
    given[0][name].zero_()
    assert sidekick[0][name].abs().sum() > 0
    assert sidekick.nbytes == sum(4 * t.numel() for held in sidekick for t in held.values())
    assert kind in repr(sidekick)


def test_a_layer_s_dict_is_the_reader_s_own():
    sidekick = Sidekick([layer()], kind="exp")
    sidekick[0].clear()
    assert list(sidekick[0]) == list(TENSORS["exp"])


@pytest.mark.parametrize("index", [-1, 1, 7])
def test_layers_outside_the_range_raise_index_error(index):
    with pytest.raises(IndexError, match=r"layer must be in 0\.\.0"):
        Sidekick([layer()], kind="exp")[index]


NAN = torch.full((4, 8, 6), float("nan"))
WRONG = {
    "unknown kind": (lambda: Sidekick([layer()], kind="relu"), "kind must be one of"),
    "kind of other tensors": (lambda: Sidekick([layer("exp")]), "these are the tensors of kind"),
    "no layers": (lambda: Sidekick([], kind="exp"), "at least one layer"),
    "a dict for layers": (lambda: Sidekick({0: layer()}, kind="exp"), "sequence of dicts"),
    "a tensor for a layer": (lambda: Sidekick([torch.ones(3)], kind="exp"), r"layers\[0\] must be"),
    "missing tensor": (lambda: Sidekick([without("k_bias")], kind="exp"), "missing: k_bias"),
    "unknown tensor": (
        lambda: Sidekick([changed(k_extra=torch.ones(1))], kind="exp"),
        "unknown: k_extra",
    ),
    "a list for a tensor": (lambda: Sidekick([changed(q_w1=[1.0])], kind="exp"), "a tensor"),
    "wrong rank": (lambda: Sidekick([changed(q_bias=torch.ones(4))], kind="exp"), r"\[Q, R\]"),
    "an empty size": (lambda: Sidekick([changed(q_w1=torch.ones(4, 0, 6))], kind="exp"), "0"),
    "hidden widths differ": (
        lambda: Sidekick([changed(k_w1=torch.ones(2, 8, 7))], kind="exp"),
        r"k_w1'\] must have shape \[K, D, E\] with E = 6",
    ),
    "mix is not square": (
        lambda: Sidekick([changed("paper", k_mix=torch.ones(2, 3, 4))], kind="paper"),
        r"k_mix'\].*R = 3",
    ),
    "layers differ": (
        lambda: Sidekick([layer(), changed(k_bias=torch.ones(1, 3))], kind="exp"),
        r"layers\[1\]\['k_bias'\].*K = 2",
    ),
    "heads do not divide": (
        lambda: Sidekick(
            [changed(k_w1=torch.ones(3, 8, 6), k_w2=torch.ones(3, 6, 3), k_bias=torch.ones(3, 3))],
            kind="exp",
        ),
        "multiple of kv heads, got 4",
    ),
    "integers": (
        lambda: Sidekick([changed(q_bias=torch.ones(4, 3, dtype=torch.int64))], kind="exp"),
        "int64",
    ),
    "int8 without a scale": (
        lambda: Sidekick([changed(q_w1=torch.ones(4, 8, 6, dtype=torch.int8))], kind="exp"),
        "missing: q_w1_scale",
    ),
    "a scale without int8": (
        lambda: Sidekick([changed(q_w1_scale=torch.ones(4, 6))], kind="exp"),
        "unknown: q_w1_scale",
    ),
    "a scale of another width": (
        lambda: Sidekick(
            [changed(q_w1=torch.ones(4, 8, 6).to(torch.int8), q_w1_scale=torch.ones(4, 8))],
            kind="exp",
        ),
        r"q_w1_scale'\] must have shape \[Q, E\] with E = 6",
    ),
    "an int8 bias": (
        lambda: Sidekick([changed(q_bias=torch.ones(4, 3, dtype=torch.int8))], kind="exp"),
        r"q_bias'\] must be float16/bfloat16/float32/float64, got torch.int8",
    ),
    "an unknown dtype": (
        lambda: Sidekick([layer()], kind="exp", dtype=torch.float64),
        "dtype must be one of float32, bfloat16, float16, int8, got torch.float64",
    ),
    "NaN": (lambda: Sidekick([changed(q_w1=NAN)], kind="exp"), r"q_w1'\] must be finite"),
    "infinity": (lambda: Sidekick([changed(q_w1=NAN.nan_to_num(1) / 0)], kind="exp"), "finite"),
    "float64 beyond float32": (
        lambda: Sidekick(
            [changed(k_bias=torch.full((2, 3), 1e300, dtype=torch.float64))], kind="exp"
        ),
        "finite",
    ),
    "a tensor on another device": (
        lambda: Sidekick([changed(q_bias=torch.ones(4, 3, device="meta"))], kind="exp"),
        r"q_bias'\] must be on cpu as the others are, got meta",
    ),
    "random: unknown kind": (lambda: Sidekick.random(1, 2, 1, 4, kind="x"), "kind must be"),
    "random: no rank": (lambda: Sidekick.random(1, 2, 1, 4, rank=0), "rank must be at least 1"),
    "random: no layers": (lambda: Sidekick.random(0, 2, 1, 4), "layers must be at least 1"),
    "shipped: unknown": (lambda: shipped("nobody"), "no sidekick named 'nobody'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_sidekicks_are_refused_by_name(case):
    call, message = WRONG[case]
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        call()


@pytest.mark.parametrize("kind", ["exp", "centroid", "paper"])
def test_random_is_seeded_and_every_term_matters(kind):
    one, same, other = (Sidekick.random(2, 4, 2, 8, 3, 6, kind, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a[n], b[n]) for a, b in zip(one, same, strict=True) for n in a)
    assert all(not torch.equal(one[0][n], other[0][n]) for n in one[0])
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    before = reference.phi(q, one[0], kind).repeat(1, 1, 1, 1), reference.psi(k, one[0], kind)
    for name, tensor in one[0].items():
        maps = {**one[0], name: tensor + 0.1}
        after = reference.phi(q, maps, kind), reference.psi(k, maps, kind)
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), name


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def rounded(tensor, dtype):
    if dtype == torch.int8:
        return reference.dequantize(*reference.quantize(tensor, -2), -2)
    return tensor.to(dtype).float()


@pytest.mark.parametrize("kind", ["exp", "centroid", "paper"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matrices_take_another_dtype_and_the_rest_stays_float32(kind, dtype):
    plain = Sidekick([layer(kind, i) for i in range(2)], kind=kind, config={"a": 1})
    sidekick = plain.to(dtype)
    assert (sidekick.dtype, sidekick.kind, sidekick.config) == (dtype, kind, {"a": 1})
    for held, source in zip(sidekick, plain, strict=True):
        for name, tensor in source.items():
            assert held[name].is_contiguous()
            if name in MATRICES:
                assert held[name].dtype == dtype
                assert (f"{name}_scale" in held) == (dtype == torch.int8)
            else:
                assert torch.equal(held[name], tensor), name
    back = sidekick.to(torch.float32)
    for held, source in zip(back, plain, strict=True):
        assert list(held) == list(source)
        for name in KINDS[kind].matrices:
            assert torch.equal(held[name], rounded(source[name], dtype)), name
    assert sidekick.nbytes == sum(t.nbytes for held in sidekick for t in held.values())
    again = Sidekick(list(sidekick), kind=kind, dtype=dtype)
    for held, source in zip(again, sidekick, strict=True):
        assert list(held) == list(source)
        assert all(torch.equal(held[n], source[n]) for n in source)


def test_a_device_and_a_dtype_may_be_given_together_or_apart():
    sidekick = Sidekick([layer()], kind="exp").to(torch.float16)
    assert sidekick.to("cpu").dtype == torch.float16
    assert sidekick.to("cpu", torch.int8).dtype == torch.int8
    assert sidekick.to(dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"Sidekick.to: dtype must be one of float32.*float64"):
        sidekick.to(torch.float64)
    with pytest.raises(ValueError, match="one dtype must be given"):
        sidekick.to(torch.float16, torch.float32)


@pytest.mark.parametrize("kind", ["exp", "centroid", "paper"])
def test_features_of_int8_maps_are_near_those_of_float32(kind):
    plain = Sidekick.random(1, 4, 2, 32, 8, 48, kind, 0)
    small = plain.to(torch.int8)
    x = torch.randn(2, 4, 9, 32)
    for side, rows in (("phi", x), ("psi", x[:, :2])):
        want = getattr(reference, side)(rows, plain[0], kind)
        got = getattr(reference, side)(rows, small[0], kind)
        assert not torch.equal(got, want)
        assert (got - want).abs().mean() < 0.02 * want.abs().mean()


@pytest.mark.parametrize("kind", ["exp", "centroid", "paper"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_saved_sidekick_comes_back(tmp_path, kind, dtype):
    record = {"policies": [{"name": "H2O", "heavy": 4}], "training": {"tokens": 7}}
    sidekick = Sidekick([layer(kind, i) for i in range(3)], kind=kind, config=record)
    folder = sidekick.save_pretrained(tmp_path / "new" / "folder", dtype=dtype)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    loaded = Sidekick.from_pretrained(folder)
    assert (loaded.kind, loaded.config, loaded.dtype) == (kind, record, dtype)
    again = Sidekick.from_pretrained(loaded.save_pretrained(tmp_path / "again"))
    wide = Sidekick.from_pretrained(folder, dtype=torch.float32)
    for i, wanted in enumerate(sidekick.to(dtype)):
        for other in (loaded, again):
            assert list(other[i]) == list(wanted)
            assert all(torch.equal(other[i][name], wanted[name]) for name in wanted)
        name = KINDS[kind].matrices[-1]
        assert torch.equal(wide[i][name], rounded(sidekick[i][name], dtype))


def test_files_of_int8_are_of_a_version_that_older_libraries_refuse(tmp_path):
    for dtype, version in ((torch.float16, 1), (torch.int8, 2)):
        folder = Sidekick([layer()], kind="exp").save_pretrained(tmp_path / str(dtype), dtype)
        config = json.loads((folder / "config.json").read_text())
        assert config["format_version"] == version
        assert config["dtype"] == str(dtype).removeprefix("torch.")


def test_float16_keeps_tiny_scales_exactly(tmp_path):
    tiny = torch.full((2, 3), 1.234e-8)
    sidekick = Sidekick([changed("paper", k_scale=tiny)], kind="paper")
    loaded = Sidekick.from_pretrained(sidekick.save_pretrained(tmp_path, torch.float16))
    assert torch.equal(loaded[0]["k_scale"], tiny)


def test_weights_beyond_float16_are_refused_and_nothing_is_written(tmp_path):
    sidekick = Sidekick([changed(q_w1=torch.full((4, 8, 6), 1e6))], kind="exp")
    with pytest.raises(ValueError, match=r"layers\[0\]\['q_w1'\].*beyond float16"):
        sidekick.save_pretrained(tmp_path / "s", torch.float16)
    assert not (tmp_path / "s").exists()
    with pytest.raises(ValueError, match=r"save_pretrained: dtype must be one of float32, bfl"):
        sidekick.save_pretrained(tmp_path / "s", torch.float64)


def saved(folder):
    return Sidekick([layer(), layer(seed=1)], kind="exp").save_pretrained(folder)


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def truncate(path, part=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])


def foreign_safetensors(folder):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, folder / "model.safetensors")


def marked_safetensors(folder, tensors):
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", metadata={"format": "less-sidekick"})


def flip_two_bytes(path):
    content = bytearray(path.read_bytes())
    for i in (-5, -300):
        content[i] ^= 1
    path.write_bytes(content)


BROKEN = {
    "two flipped bytes": (
        lambda f: flip_two_bytes(f / "model.safetensors"),
        r"model\.safetensors: damaged, or of another config\.json: its sha256 must be",
    ),
    "tensors of another sidekick": (
        lambda f: os.replace(
            Sidekick([layer(), layer(seed=2)], kind="exp").save_pretrained(f / "other")
            / "model.safetensors",
            f / "model.safetensors",
        ),
        r"model\.safetensors: damaged",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "no tensors": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "truncated config": (lambda f: truncate(f / "config.json"), "config.json: truncated"),
    "truncated tensors": (lambda f: truncate(f / "model.safetensors"), "safetensors: truncated"),
    "tensors cut in the header": (lambda f: truncate(f / "model.safetensors", 0.01), "truncated"),
    "empty tensors": (lambda f: (f / "model.safetensors").write_bytes(b""), "truncated"),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "truncated or"),
    "a model's config": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama"}'),
        "not a sidekick's config",
    ),
    "a list for a config": (lambda f: (f / "config.json").write_text("[]"), "not a sidekick's"),
    "a later format": (lambda f: edit_config(f, format_version=9), "format version 9"),
    "an unknown kind": (lambda f: edit_config(f, kind="tanh"), "kind must be one of"),
    "another kind": (lambda f: edit_config(f, kind="paper"), "these are the tensors of kind 'exp'"),
    "config of another rank": (lambda f: edit_config(f, rank=16), "rank = 16"),
    "config of other layers": (lambda f: edit_config(f, layers=3), "layers = 3"),
    "a model's tensors": (foreign_safetensors, "not a sidekick's"),
    "unknown tensor names": (
        lambda f: marked_safetensors(f, {"embed.weight": torch.ones(2)}),
        "unknown tensor 'embed.weight'",
    ),
    "a layer missing": (
        lambda f: marked_safetensors(f, {"layers.1.q_w1": torch.ones(2)}),
        "without a gap",
    ),
    "NaN in the file": (
        lambda f: marked_safetensors(f, {f"layers.0.{n}": t for n, t in changed(q_w1=NAN).items()}),
        r"model.safetensors.*q_w1'\] must be finite",
    ),
    "header of nonsense length": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}"),
        "truncated",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_and_foreign_files_are_refused_by_name(tmp_path, case):
    breaks, message = BROKEN[case]
    folder = saved(tmp_path / "sidekick")
    breaks(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Sidekick.from_pretrained(folder)


@pytest.mark.parametrize("shard", [(0, 1), (1, 2)])
def test_flipped_bytes_are_found_in_a_part_too_and_older_files_have_no_digest(tmp_path, shard):
    folder = saved(tmp_path / "sidekick")
    flip_two_bytes(folder / "model.safetensors")
    with pytest.raises(ValueError, match="damaged"):
        Sidekick.from_pretrained(folder, shard=shard)
    config = json.loads((folder / "config.json").read_text())
    del config["tensors_sha256"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "tensors_sha256" not in Sidekick.from_pretrained(folder, shard=shard).config


def test_a_sidekick_is_called_by_its_folder_or_its_model(tmp_path):
    assert Sidekick([layer()], kind="exp").name == "unnamed"
    trained = Sidekick([layer()], kind="exp", config={"model": {"name": "tiny"}})
    assert trained.name == "tiny"
    loaded = Sidekick.from_pretrained(trained.save_pretrained(tmp_path / "my-sidekick"))
    assert loaded.name == loaded.to(torch.float16).name == loaded.shard(0, 2).name == "my-sidekick"


def test_what_a_sidekick_was_trained_for_is_in_its_config():
    plain = Sidekick([layer()], kind="exp")
    assert (plain.trained_length, plain.trained_capacities) == (None, ())
    record = {"budgets": [64, 32], "training": {"text": {"chunk_tokens": 1024}}}
    trained = Sidekick([layer()], kind="exp", config=record)
    assert (trained.trained_length, trained.trained_capacities) == (1024, (32, 64))


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match="no folder '/nowhere/at/all'"):
        Sidekick.from_pretrained("/nowhere/at/all")


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_sidekicks_load_by_name_and_are_small(name):
    sidekick = Sidekick.from_pretrained(name)
    header = json.loads((shipped(name) / "config.json").read_text())
    assert sidekick.name == name
    assert header["tensors_sha256"]
    assert (sidekick.trained_length, sidekick.trained_capacities) == (1024, (32, 64, 128))
    assert sidekick.config["model"]["fingerprint"]
    assert sidekick.config["policies"]
    assert len(sidekick.config["training"]["layers"]) == sidekick.layers
    assert sum(f.stat().st_size for f in shipped(name).iterdir()) < 4 * 2**20


def test_a_sidekick_fits_the_model_that_it_names():
    model = tiny_model()
    sidekick = Sidekick.random(2, 4, 2, 16, 3, 8, "exp", 0)
    sidekick.check_model(model)
    sidekick.config["model"] = model_identity(model)
    sidekick.config["model"]["name"] = "a copy in another folder"
    sidekick.check_model(model)
    sidekick.check_model(model.config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "layers: sidekick 2, model 3"),
        ({"num_attention_heads": 8}, "q_heads: sidekick 4, model 8"),
        ({"num_key_value_heads": 4}, "kv_heads: sidekick 2, model 4"),
        ({"head_dim": 32}, "head_dim: sidekick 16, model 32"),
        ({"vocab_size": 300}, "vocab_size: sidekick 260, model 300"),
        ({"model_type": "mistral"}, "model_type: sidekick 'llama', model 'mistral'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope: .*500000"),
    ],
)
def test_another_model_is_refused_by_name(change, message):
    model = tiny_model()
    sidekick = Sidekick.random(2, 4, 2, 16, 3, 8, "exp", 0)
    sidekick.config["model"] = model_identity(model)
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=message):
        sidekick.check_model(model)


def test_what_is_no_decoder_has_no_identity():
    with pytest.raises(ValueError, match="num_hidden_layers must be a positive int"):
        model_identity(object())


# -- the authors' files ------------------------------------------------------------------------


def reference_state(q_heads=4, kv_heads=4, seed=0):
    """Tensors under the names and in the shapes of the released training script."""
    g = torch.Generator().manual_seed(seed)
    D, E, R = SIZES["D"], SIZES["E"], SIZES["R"]
    return {
        "kernel_q_mat1": torch.randn(q_heads, D, E, generator=g),
        "kernel_k_mat1": torch.randn(kv_heads, D, E, generator=g),
        "kernel_q_mat2": torch.randn(q_heads, E, R, generator=g),
        "kernel_k_mat2": torch.randn(kv_heads, E, R, generator=g),
        "interaction_k": torch.randn(kv_heads, R, R, generator=g),
        "scalingD": torch.randn(1, kv_heads, 1, R, generator=g) * 1e-4,
        "scalingD2": torch.randn(1, kv_heads, 1, R, generator=g) * 1e-4,
    }


def write_reference(folder, states):
    for i, state in enumerate(states):
        content = {"model_state_dict": state, "train_mses": torch.zeros(2), "config": {"lr": 1e-3}}
        torch.save(content, folder / f"layer_{i}.pth")
    return folder


def library_low_rank(q, k, maps):
    maps = {name: tensor.double() for name, tensor in maps.items()}
    return reference.phi(q, maps, "paper") @ reference.psi(k, maps, "paper").transpose(2, 3)


def released_low_rank(q, k, s):
    """phi(q) psi(k)^T in the order of operations of the released code, written out here anew."""
    gelu, s = torch.nn.functional.gelu, {name: tensor.double() for name, tensor in s.items()}
    a = gelu(gelu(q @ s["kernel_q_mat1"]) @ s["kernel_q_mat2"])
    b = s["scalingD"].abs() * gelu(gelu(k @ s["kernel_k_mat1"]) @ s["kernel_k_mat2"])
    b = b + (b @ s["interaction_k"]) * s["scalingD2"]
    return a.abs() @ b.abs().transpose(2, 3)


def test_reference_checkpoints_compute_what_the_released_code_computes(tmp_path):
    states = [reference_state(seed=i) for i in range(11)]  # layer_10 sorts after layer_9
    sidekick = Sidekick.from_reference_checkpoints(write_reference(tmp_path, states))
    assert (sidekick.kind, sidekick.layers, sidekick.kv_heads) == ("paper", 11, 4)
    q, k = torch.randn(2, 4, 5, 8).double(), torch.randn(2, 4, 7, 8).double()
    for maps, state in zip(sidekick, states, strict=True):
        wanted = released_low_rank(q, k, state)
        torch.testing.assert_close(library_low_rank(q, k, maps), wanted, rtol=1e-9, atol=0)


def test_multi_query_checkpoints_have_linear_layers_for_keys(tmp_path):
    state = reference_state(kv_heads=1)
    linear = {
        f"{n}.weight": state.pop(n)[0].t().contiguous()
        for n in ("kernel_k_mat1", "kernel_k_mat2", "interaction_k")
    }
    folder = write_reference(tmp_path, [{**state, **linear}])
    sidekick = Sidekick.from_reference_checkpoints(folder)
    assert (sidekick.q_heads, sidekick.kv_heads) == (4, 1)
    q, k = torch.randn(2, 4, 5, 8).double(), torch.randn(2, 1, 7, 8).double()
    wanted = released_low_rank(q, k, reference_state(kv_heads=1))
    got = library_low_rank(q, k, sidekick[0])
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=0)


def test_checkpoints_per_query_head_reduce_to_kv_heads_only_where_groups_agree(tmp_path):
    state = reference_state(kv_heads=2)
    for name in ("kernel_k_mat1", "kernel_k_mat2", "interaction_k"):
        state[name] = state[name].repeat_interleave(2, 0)
    for name in ("scalingD", "scalingD2"):
        state[name] = state[name].repeat_interleave(2, 1)
    same = write_reference(tmp_path, [state])
    assert Sidekick.from_reference_checkpoints(same).kv_heads == 4
    reduced = Sidekick.from_reference_checkpoints(same, kv_heads=2)
    assert reduced.kv_heads == 2
    assert torch.equal(reduced[0]["k_w1"], reference_state(kv_heads=2)["kernel_k_mat1"])
    write_reference(tmp_path, [reference_state()])
    with pytest.raises(ValueError, match=r"psi per query head \(4\), and the maps of a group"):
        Sidekick.from_reference_checkpoints(tmp_path, kv_heads=2)
    with pytest.raises(ValueError, match="cannot be shared among 3"):
        Sidekick.from_reference_checkpoints(tmp_path, kv_heads=3)


class Trap:
    """A pickle that would run code when read."""

    def __reduce__(self):
        return (os.mkdir, ("/tmp/less-trap-was-sprung",))


def drop(folder, name):
    content = torch.load(folder / "layer_0.pth", weights_only=True)
    del content["model_state_dict"][name]
    torch.save(content, folder / "layer_0.pth")


def replace(folder, name, tensor):
    content = torch.load(folder / "layer_0.pth", weights_only=True)
    content["model_state_dict"][name] = tensor
    torch.save(content, folder / "layer_0.pth")


BROKEN_REFERENCE = {
    "no files": (lambda f: [p.unlink() for p in f.iterdir()], "no files named layer_<i>.pth"),
    "a layer missing": (lambda f: (f / "layer_0.pth").unlink(), "layer_0.pth"),
    "truncated": (lambda f: truncate(f / "layer_0.pth"), "layer_0.pth: truncated"),
    "text": (lambda f: (f / "layer_0.pth").write_text("hello"), "layer_0.pth: truncated"),
    "code": (lambda f: torch.save({"x": Trap()}, f / "layer_0.pth"), "not a file of tensors"),
    "a tensor": (
        lambda f: torch.save(torch.ones(2), f / "layer_0.pth"),
        "wanted a dict of tensors",
    ),
    "a key missing": (lambda f: drop(f, "scalingD2"), "must hold a tensor 'scalingD2'"),
    "scale of another shape": (lambda f: replace(f, "scalingD", torch.ones(4, 3, 1)), "1, K, 1, R"),
    "NaN": (lambda f: replace(f, "kernel_q_mat1", NAN), r"q_w1'\] must be finite"),
}


@pytest.mark.parametrize("case", BROKEN_REFERENCE)
def test_broken_reference_checkpoints_are_refused_by_name(tmp_path, case):
    breaks, message = BROKEN_REFERENCE[case]
    write_reference(tmp_path, [reference_state(), reference_state(seed=1)])
    breaks(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Sidekick.from_reference_checkpoints(tmp_path)
    assert not os.path.exists("/tmp/less-trap-was-sprung")


def test_a_folder_of_reference_checkpoints_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        Sidekick.from_reference_checkpoints(tmp_path / "nobody")


# -- kinds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_every_tensor_of_a_kind_has_its_place_in_memory(name):
    kind = KINDS[name]
    assert set(ORDER) >= kind.tensors.keys() | kind.scales.keys()
    assert set(kind.matrices) <= kind.tensors.keys()
    assert all(len(kind.tensors[n]) == 3 for n in kind.matrices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_a_kind_may_have_no_hidden_layer(monkeypatch, tmp_path, dtype):
    row = MapKind(2, {"q_w2": "QDR", "k_w2": "KDR", "k_bias": "KR"}, ("q_w2", "k_w2"))
    monkeypatch.setitem(KINDS, "linear", row)
    made = Sidekick.random(2, 4, 2, 8, rank=3, kind="linear", generator=0).to(dtype)
    assert (made.hidden, made.rank, made.head_dim) == (0, 3, 8)
    made.save_pretrained(tmp_path)
    read = Sidekick.from_pretrained(tmp_path)
    assert read.dtype == dtype
    for before, after in zip(made, read, strict=True):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[n], after[n]) for n in before)
    packed = PackedMaps.pack(read[0], "linear")
    number, _, hidden, rank, present = packed.described()
    assert (number, hidden, rank, packed.rank) == (2, 0, 3, 3)
    assert [n for i, n in enumerate(ORDER) if present >> i & 1] == list(packed.tensors)
    assert packed.tensors.keys() == read[0].keys()


def test_a_tensor_that_the_kind_does_not_have_is_not_packed():
    maps = Sidekick.random(1, 2, 2, 8, kind="exp", generator=0)[0]
    with pytest.raises(ValueError, match="kind 'paper' has no tensors"):
        PackedMaps.pack(maps, "paper")
