"""What ``less-kv calibrate`` measures, writes and reads back."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

from less import H2O, LessConfig
from less.calibration import (
    CONFIG_FILE,
    CURVE,
    NAMES,
    TENSORS_FILE,
    Calibration,
)
from less.cli import main
from less.files import shipped_calibrations
from less.fit import calibrate
from less.fit.calibrate import measure
from less.fit.capture import Captured
from less.hf import attach, cache_for
from less.sidekick import Sidekick, shipped
from tests.tiny_model import TEXT, save_tiny, tiny_model


def captured(N=2, Q=4, K=2, T=200, D=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    k = torch.randn(N, K, T, D, generator=g) * torch.linspace(0.5, 4, D) + 7
    v = torch.randn(N, K, T, D, generator=g) - 3
    q = torch.randn(N, Q, T, D, generator=g) * torch.linspace(3, 1, D)
    weight = torch.randn(64, Q * D, generator=g)
    return Captured(q, k, v, torch.zeros_like(q), weight, D**-0.5)


def test_means_and_scales_are_those_of_float64():
    got = captured()
    measured = measure(got)
    k, q, v = (x[:, :, 4:].double() for x in (got.k, got.q, got.v))
    K, D = k.shape[1], k.shape[3]
    mean = k.mean((0, 2))
    assert torch.allclose(measured["key_mean"].double(), mean, atol=1e-6)
    assert torch.allclose(measured["value_mean"].double(), v.mean((0, 2)), atol=1e-6)
    for name, weight, x in (
        ("key_scale", q.view(2, K, 2, -1, D).square().sum((0, 2, 3)), k),
        ("value_scale", got.o_weight.double().square().sum(0).view(K, 2, D).sum(1), v),
    ):
        wanted = (weight / x.var((0, 2), correction=0)) ** 0.25
        wanted = wanted / wanted.log().mean(1, keepdim=True).exp()
        assert torch.allclose(measured[name].double(), wanted, rtol=1e-5)


def test_a_channel_without_variance_gets_a_finite_scale():
    got = captured()
    got.k[..., 3] = 5.0
    scale = measure(got)["key_scale"]
    assert bool(scale.isfinite().all())
    assert float(scale.max()) <= 32.0001


def test_a_model_is_calibrated_and_its_folder_comes_back_the_same(tmp_path):
    model = tiny_model()
    ids = torch.randint(0, 256, (2, 160), generator=torch.Generator().manual_seed(1))
    steps = []
    calibration = calibrate(model, ids, source="noise", show=lambda *at: steps.append(at))
    assert steps[-1] == (2, 2)
    assert calibration.config["tokens"] == 320
    calibration.save_pretrained(tmp_path)
    read = Calibration.from_pretrained(tmp_path)
    assert read.digest == calibration.digest
    assert read.config == calibration.config
    for layer in range(2):
        for name in NAMES:
            assert torch.equal(read[layer][name], calibration[layer][name])
        assert torch.equal(read.curve(layer), calibration.curve(layer))
    cache = cache_for(
        model, H2O(heavy=20, recent=20), dtype="k4v4", calibration=read, sinks=2, hot=6
    )
    with attach(model, cache):
        out = model.generate(
            ids[:1], past_key_values=cache, max_new_tokens=4, do_sample=False, pad_token_id=257
        )
    assert out.shape[1] > 160


def test_too_few_tokens_are_refused():
    with pytest.raises(ValueError, match="256 tokens or more"):
        calibrate(tiny_model(), torch.zeros(1, 100, dtype=torch.long))


def test_another_models_calibration_is_refused_by_name():
    ids = torch.randint(0, 256, (2, 160))
    calibration = calibrate(tiny_model(), ids, name="tiny")
    other = tiny_model(head_dim=32)
    with pytest.raises(ValueError, match="measured on tiny, not on"):
        cache_for(other, H2O(heavy=20, recent=20), dtype="k4v4", calibration=calibration)


def test_a_process_gets_its_heads_calibration():
    whole = curved()
    second = whole.shard(1, 2)
    assert second.kv_heads == 1
    assert torch.equal(second[0]["key_mean"][0], whole[0]["key_mean"][1])
    assert torch.equal(second.curve(0)[0], whole.curve(0)[1])
    assert (second.capacities, second.length) == (whole.capacities, whole.length)


def curved():
    layer = measure(captured()) | {CURVE: torch.tensor([[3.0, 2, 1], [9, 4, 0]])}
    return Calibration([layer, None], {"text": "noise"}, [8, 16, 40], 160)


def test_curves_come_back_and_are_no_part_of_a_snapshots_digest(tmp_path):
    whole = curved()
    plain = Calibration([measure(captured()), None])
    assert whole.digest == plain.digest
    assert plain.curve(0) is None
    whole.save_pretrained(tmp_path)
    read = Calibration.from_pretrained(tmp_path)
    assert (read.capacities, read.length) == ((8, 16, 40), 160)
    assert torch.equal(read.curve(0), whole.curve(0))
    assert read.curve(1) is None
    assert read.space(0) is not None
    assert "curves at 3 capacities" in repr(read)


def test_a_folder_of_version_1_is_read(tmp_path):
    plain = Calibration([measure(captured())])
    plain.save_pretrained(tmp_path)
    change(tmp_path, "version", 1)
    assert Calibration.from_pretrained(tmp_path).digest == plain.digest


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("capacities", None, "capacities must list two or more, got None"),
        ("capacities", [8], "capacities must list two or more"),
        ("capacities", [8, 16, 16], "capacities must ascend"),
        ("capacities", [8, "16", 40], r"capacities\[1\] must be a whole number"),
        ("capacities", [8, 16, 40, 80], r"curve must have shape \[2, 4\], got \[2, 3\]"),
        ("length", 0, "length must be a whole number >= 40"),
        ("length", 39, "length must be a whole number >= 40"),
        ("length", "long", "length must be a whole number >= 40"),
    ],
)
def test_a_header_that_contradicts_its_curves_is_refused_with_its_file(
    tmp_path, field, value, message
):
    curved().save_pretrained(tmp_path)
    change(tmp_path, field, value)
    with pytest.raises(ValueError, match=f"{CONFIG_FILE}: .*{message}"):
        Calibration.from_pretrained(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("length", 2**31), ("capacities", [1, 16, 32])])
def test_a_header_that_another_grid_would_fit_is_refused(tmp_path, field, value):
    """The file of tensors says once more, under its digest, where the curves were measured."""
    curved().save_pretrained(tmp_path)
    assert Calibration.from_pretrained(tmp_path).capacities != (1, 16, 32)
    change(tmp_path, field, value)
    with pytest.raises(ValueError, match="capacities and length must be .* as rows.safetensors"):
        Calibration.from_pretrained(tmp_path)


def test_curves_without_their_capacities_are_refused_with_their_file(tmp_path):
    curved().save_pretrained(tmp_path)
    header = json.loads((tmp_path / CONFIG_FILE).read_text())
    del header["capacities"], header["length"]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(header))
    with pytest.raises(ValueError, match=f"{CONFIG_FILE}: .*layer 0 must have .* got curve"):
        Calibration.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0])
def test_a_curve_that_is_no_error_is_refused(value):
    layer = measure(captured()) | {CURVE: torch.tensor([[3.0, 2], [9, value]])}
    with pytest.raises(ValueError, match="layer 0's curve must be finite and 0 or more"):
        Calibration([layer], {}, [8, 16], 160)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / TENSORS_FILE).write_bytes(b"short"), "damaged, or of another"),
        (lambda f: (f / CONFIG_FILE).write_text("{"), "truncated or not JSON"),
        (lambda f: (f / CONFIG_FILE).write_text("[]"), "not a calibration"),
        (lambda f: (f / TENSORS_FILE).unlink(), "no such file"),
        (lambda f: change(f, "version", 99), "version 99"),
        (lambda f: change(f, "layers", 10**9), "layers must be a number"),
        (lambda f: change(f, "sha256", "0"), "its sha256 must be 0"),
    ],
)
def test_a_damaged_folder_is_refused_by_what_is_wrong(tmp_path, harm, message):
    Calibration([measure(captured())]).save_pretrained(tmp_path)
    harm(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Calibration.from_pretrained(tmp_path)


def change(folder, field, value):
    header = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(header | {field: value}))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "one or more that do not slide"),
        ([None], "one or more that do not slide"),
        ([{"key_mean": torch.zeros(2, 8)}], "must have key_mean, key_scale"),
        ([dict.fromkeys(NAMES, torch.zeros(2, 8))], "above 0"),
        ([dict.fromkeys(NAMES, torch.full((2, 8), torch.nan))], "finite"),
    ],
)
def test_what_is_no_calibration_is_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        Calibration(layers)


def test_a_constant_added_to_all_keys_costs_nothing_where_its_mean_is_known():
    """The same cache on keys with a large bias and on those without: softmax sees no difference."""
    from less import LessKVCache

    g = torch.Generator().manual_seed(0)
    B, Q, K, T, D = 1, 4, 2, 200, 64
    q, k, v = (torch.randn(B, h, T, D, generator=g) for h in (Q, K, K))
    bias = (torch.randn(K, 1, D, generator=g) * 100).half().float()  # as a space holds it
    plain = {n: torch.full((K, D), float(n.endswith("scale"))) for n in NAMES}

    def run(keys, layer, policy):
        cache = LessKVCache(1, Q, K, D, B, policy, dtype="k4v4", calibration=layer)
        return cache.attend(0, q, keys, v), cache

    policy = H2O(heavy=60, recent=60, decay=0.98)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted, _ = run(k, Calibration([plain]), policy)
        got, cache = run(k + bias, Calibration([plain | {"key_mean": bias[:, 0]}]), policy)
    assert torch.allclose(got, wanted, atol=2e-3)
    with pytest.warns(UserWarning, match="less-kv calibrate"):
        lost, _ = run(k + bias, None, policy)
    step = (q[:, :, -1:], (k + bias)[:, :, -1:], v[:, :, -1:])
    assert cache.attend(0, *step).isfinite().all()
    assert float((lost - wanted).abs().max()) > 10 * float((got - wanted).abs().max())


def test_the_command_measures_a_folder_and_refuses_what_cannot_be(tmp_path, capsys):
    model = save_tiny(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 20)
    arguments = ["calibrate", "--model", str(model), "--text", str(text), "--out"]
    out = tmp_path / "rows"
    arguments[1:1] = ["--length", "200", "--chunks", "2", "--threads", "1"]
    picture = tmp_path / "map.svg"
    assert main([*arguments, str(out), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "Calibration(layers=2" in printed
    assert "slots of heads at a mean of 256, a line for each layer:" in printed
    assert "10th, 50th and 90th percentile" in printed
    assert "</svg>" in picture.read_text()
    calibration = Calibration.from_pretrained(out)
    assert len(calibration) == 2
    assert calibration.length == 200
    assert main([*arguments, str(out), "--no-budgets"]) == 0
    assert "slots of heads" not in capsys.readouterr().out
    assert Calibration.from_pretrained(out).capacities == ()
    assert main([*arguments, str(out), "--chunks", "2", "--length", "4096"]) == 2
    assert "--length 4096 is beyond" in capsys.readouterr().err
    assert main([*arguments, str(text)]) == 2
    assert "--out" in capsys.readouterr().err


# -- shipped ------------------------------------------------------------------------------------


def test_a_shipped_calibration_loads_by_name_and_is_small():
    assert shipped_calibrations()
    for name in shipped_calibrations():
        calibration = Calibration.from_pretrained(name)
        assert calibration.digest == Calibration.from_pretrained(shipped(name)).digest
        assert calibration.capacities
        assert calibration.config["model"] == {
            **calibration.config["model"],
            **Sidekick.from_pretrained(name).config["model"],
        }
        assert LessConfig(bytes=1, calibration=name).load_calibration().digest == calibration.digest
        files = [shipped(name) / file for file in (CONFIG_FILE, TENSORS_FILE)]
        assert sum(file.stat().st_size for file in files) < 100_000


def test_a_shipped_calibration_is_refused_for_another_model():
    config = LessConfig(bytes="1MiB", calibration=shipped_calibrations()[0])
    with pytest.raises(ValueError, match="measured on SmolLM2-135M-Instruct, not on"):
        config.cache(tiny_model())


def test_what_float16_holds_is_stored_in_it_and_comes_back_exact(tmp_path):
    fine = {n: torch.full((2, 8), 1.5) for n in NAMES}
    coarse = {**fine, "key_mean": torch.full((2, 8), 1 + 2**-20)}
    for layer, size in ((fine, 2), (coarse, 4)):
        Calibration([layer]).save_pretrained(tmp_path)
        stored = load_file(tmp_path / TENSORS_FILE)
        assert stored["layers.0.key_mean"].element_size() == size
        assert stored["layers.0.key_scale"].element_size() == 2
        read = Calibration.from_pretrained(tmp_path)
        assert torch.equal(read[0]["key_mean"], layer["key_mean"])
        assert read.digest == Calibration([layer]).digest
