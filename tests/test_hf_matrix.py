"""Every cell of the matrix that ``less-kv matrix`` prints; and that the docs print the same."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import less.hf
from less import cli
from less.evaluate import matrix
from less.evaluate.families import FAMILIES, REFUSED
from less.evaluate.matrix import CELLS, PASS, Case, Row
from less.hf.models import ARCHITECTURES
from less.hf.models import REFUSED as REFUSED_TYPES
from tests.helpers import held
from tests.test_hf import BACKENDS, footprint

DOCS = Path(__file__).parents[1] / "docs" / "transformers.md"
build = functools.cache(matrix.build)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_does_what_the_matrix_says(family, cell):
    model = build(family)
    before = footprint(model)
    # A backend is told q, k and v, not whose they are.
    backends = BACKENDS if family in ("llama", "gemma3_text") else BACKENDS[-1:]
    for backend in backends:
        CELLS[cell](Case(model, backend))
    assert footprint(model) == before


def test_the_papers_maps_equal_the_reference_too():
    matrix.small_budget(Case(build("llama"), BACKENDS[-1]), kinds=["paper"])


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_work_is_refused_by_name(name):
    model = matrix.build_refused(name)
    with pytest.raises(less.hf.UnsupportedModelError) as error:
        less.hf.cache_for(model, matrix.SMALL, backend="reference")
    assert REFUSED[name].message in str(error.value)
    assert f"{type(model).__name__} (model_type '{model.config.model_type}')" in str(error.value)


def test_every_type_that_is_known_is_in_the_matrix():
    types = {build(family).config.model_type for family in FAMILIES}
    assert types == set(ARCHITECTURES)
    refused = {matrix.build_refused(name).config.model_type for name in REFUSED}
    assert refused >= set(REFUSED_TYPES)


# -- the command ---------------------------------------------------------------------------------


def test_the_tables_in_the_docs_are_what_the_command_prints():
    text = DOCS.read_text()
    found = re.search(r"<!-- less-kv matrix --markdown -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert found, "docs/transformers.md has no table between its two marks"
    assert found[1] == matrix.as_markdown(matrix.expected())


def test_the_command_prints_the_cells_of_the_models_that_are_asked_for(capsys):
    assert cli.main(["matrix", "--only", "gpt2", "--only", "mpt", "--backend", "reference"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"\bpass\b", out)) == len(CELLS)
    assert "refused: its attention does not go through" in out
    assert "1 model passes every cell, 1 is refused by name" in out


def test_a_cell_that_fails_is_shown_and_is_the_exit_status(capsys, monkeypatch):
    def broken(case):
        raise matrix.MatrixError("tokens differ")

    monkeypatch.setitem(matrix.CELLS, "beams", broken)
    assert cli.main(["matrix", "--only", "gpt2", "--backend", "reference"]) == 1
    out = capsys.readouterr().out
    assert "FAILS" in out
    assert "gpt2, beams: MatrixError: tokens differ" in out


def test_a_model_that_cannot_be_built_fails_in_every_cell(monkeypatch):
    def missing(name):
        raise AttributeError("no such class\nin this version")

    monkeypatch.setattr(matrix, "build", missing)
    row = matrix.run_family("gpt2")
    assert set(row.cells) == set(CELLS)
    assert set(row.cells.values()) == {"AttributeError: no such class"}
    assert not row.holds


def test_a_model_that_should_be_refused_and_is_not_fails(capsys, monkeypatch):
    monkeypatch.setitem(matrix.REFUSED, "mpt", matrix.REFUSED["bloom"])
    monkeypatch.setattr(matrix, "build_refused", lambda name: build("llama"))
    assert cli.main(["matrix", "--only", "mpt", "--backend", "reference"]) == 1
    assert "NOT REFUSED" in capsys.readouterr().out


def test_an_unknown_model_is_refused(capsys):
    assert cli.main(["matrix", "--only", "nothing"]) == 2
    assert "--only must be one of apertus, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cell", "spoil"),
    [
        ("full budget", lambda out: out * 1.001),
        ("small budget", lambda out: out * 1.001),
        ("padded batch", lambda out: out + out.shape[0] * 1e-3),
        ("beams", lambda out: out.flip(0)),
        ("chunked prompt", lambda out: -out),
    ],
)
def test_a_cell_notices_wrong_attention(monkeypatch, cell, spoil):
    attend = less.LessKVCache.attend
    monkeypatch.setattr(less.LessKVCache, "attend", lambda *a, **k: spoil(attend(*a, **k)))
    with pytest.raises(matrix.MatrixError, match="differ"):
        CELLS[cell](Case(build("llama"), "reference"))


def test_a_snapshot_that_loses_something_is_noticed(monkeypatch):
    load = less.LessKVCache.load_state_dict

    def forgetful(self, d):
        load(self, d)
        held(self, 0)["score"].zero_()

    monkeypatch.setattr(less.LessKVCache, "load_state_dict", forgetful)
    with pytest.raises(matrix.MatrixError, match="logits of step"):
        matrix.snapshot(Case(build("llama"), "reference"))


def test_a_row_without_all_cells_does_not_hold():
    assert not Row("x").holds
    assert not Row("x", cells={"beams": PASS}).holds
    assert Row("x", refused="because").holds
