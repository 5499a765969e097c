"""What a bounded cache must do for every kind of model, cell by cell: ``less-kv matrix``.

A cell is one property of one model. The tests run these cells, so what the table says is what is
tested. Everything here runs tiny random models (``less.evaluate.families``): no download.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from less import reference
from less.cache import LessKVCache
from less.evaluate.families import FAMILIES, REFUSED, VOCAB, build, build_refused
from less.fit import LayerWalk, Recipe, train
from less.hf import attach, cache_for
from less.hf.models import UnsupportedModelError
from less.layer import Maps
from less.policies import H2O, Policy
from less.sidekick import Sidekick
from less.sidekick.identity import kv_heads_of

SMALL = H2O(heavy=4, recent=4)
WIDE = H2O(heavy=64, recent=64)  # no text here is longer
NEW = 12  # tokens generated
TOLERANCE = 1e-5  # of the largest entry, float32


class MatrixError(Exception):
    """A cell does not hold; the message says what differs."""


# -- texts and runs ------------------------------------------------------------------------------


def prompt(length: int, seed: int = 0, rows: int = 1) -> Tensor:
    """Random tokens, none of them padding: int64 [rows, length]."""
    g = torch.Generator().manual_seed(100 + seed)
    return torch.randint(2, VOCAB, (rows, length), generator=g)


def left_padded(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Rows of different lengths as ``input_ids`` and ``attention_mask``, padded on the left."""
    width = max(len(r) for r in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def generate(
    model: Any,
    cache: LessKVCache,
    inputs: Tensor | dict[str, Tensor],
    new: int = NEW,
    **kwargs: Any,
) -> Any:
    """``model.generate`` on an attached cache, greedily unless told otherwise."""
    if isinstance(inputs, Tensor):
        inputs = {"input_ids": inputs}
    options = {"max_new_tokens": new, "do_sample": False, **kwargs}
    with attach(model, cache):
        return model.generate(**inputs, past_key_values=cache, **options)


def feed(model: Any, cache: LessKVCache, ids: Tensor, **kwargs: Any) -> Tensor:
    """Logits of one forward pass on an attached cache."""
    with attach(model, cache), torch.no_grad():
        logits: Tensor = model(ids, past_key_values=cache, **kwargs).logits
    return logits


class Spy:
    """Notes what passes through a cache's ``attend``."""

    def __init__(self, cache: LessKVCache) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.attend = cache.attend
        cache.attend = self  # type: ignore[method-assign]

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """``attend``, noted."""
        result = self.attend(layer, q, k, v, valid, out)
        self.calls.append((layer, q.clone(), k.clone(), v.clone(), result.clone()))
        return result

    def layer(self, layer: int) -> list[Tensor]:
        """q, k, v and the output of all calls of a layer, one after the other."""
        mine = [c[1:] for c in self.calls if c[0] == layer]
        return [torch.cat(x, 2) for x in zip(*mine, strict=True)]


def bounded_layers(cache: LessKVCache) -> list[int]:
    """The layers that attend through the cache."""
    return [i for i in range(cache.layers) if i not in cache.native]


def sidekick_for(model: Any, kind: str = "exp") -> Sidekick:
    """Random feature maps of a model's shape."""
    shape = cache_for(model, SMALL, backend="reference")
    return Sidekick.random(
        shape.layers,
        shape.q_heads,
        kv_heads_of(model.config),
        shape.head_dim,
        rank=4,
        hidden=16,
        kind=kind,
        generator=torch.Generator().manual_seed(5),
    )


# -- cells ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model, and the backend that its caches run on."""

    model: Any
    backend: str | None = None

    def cache(
        self, policy: Policy, sidekick: Sidekick | None = None, batch: int = 1
    ) -> LessKVCache:
        """An empty cache of the model's shape."""
        return cache_for(self.model, policy, sidekick, batch=batch, backend=self.backend)

    def own(self, inputs: dict[str, Tensor], **kwargs: Any) -> Any:
        """What the model generates without a bounded cache."""
        options = {"max_new_tokens": NEW, "do_sample": False, **kwargs}
        return self.model.generate(**inputs, **options)


_LOGITS = {"output_logits": True, "return_dict_in_generate": True}


def full_budget(case: Case) -> None:
    """With a budget as long as the text, tokens and logits are the model's own."""
    ids = {"input_ids": prompt(20)}
    want = case.own(ids, **_LOGITS)
    cache = case.cache(WIDE, sidekick_for(case.model))
    got = generate(case.model, cache, ids, **_LOGITS)
    _same("tokens", got.sequences, want.sequences)
    _close("logits", torch.stack(got.logits), torch.stack(want.logits))


def small_budget(case: Case, kinds: Sequence[str] = ("exp", "")) -> None:
    """With a small budget every bounded layer is the reference on the model's own q, k and v.

    Once with feature maps of each kind; "" is eviction alone.
    """
    for kind in kinds:
        follow_reference(case, sidekick_for(case.model, kind) if kind else None)


def follow_reference(case: Case, sidekick: Sidekick | None) -> None:
    """Generate with a small budget: every bounded layer is the reference on the same q, k and v.

    Raises:
        MatrixError: one is not.
    """
    kind = "no" if sidekick is None else sidekick.kind
    cache = case.cache(SMALL, sidekick)
    spy = Spy(cache)
    generate(case.model, cache, prompt(20))
    bounded = bounded_layers(cache)
    if {c[0] for c in spy.calls} != set(bounded):
        raise MatrixError(f"layers {bounded} should have attended through the cache")
    for layer in bounded:
        q, k, v, out = spy.layer(layer)
        if q.shape[2] != 20 + NEW - 1:  # the last token sampled is never fed
            raise MatrixError(f"layer {layer} saw {q.shape[2]} tokens")
        want = reference.run(
            q,
            k,
            v,
            SMALL,
            None if sidekick is None else Maps(sidekick.kind, sidekick[layer]),
            prompt=20,
            scale=cache.scale,
            softcap=cache.softcap or 0.0,
        )
        where = f"layer {layer}, {kind} maps"
        _close(f"output of {where}", out, want.out)
        _same(
            f"positions kept in {where}",
            cache.positions(layer).sort(2)[0],
            want.positions[-1].sort(2)[0],
        )


def padded_batch(case: Case) -> None:
    """A left-padded batch is its rows run alone, with a small budget and a low-rank state."""
    rows = [prompt(n, seed=n)[0] for n in (20, 3, 11, 16)]
    sidekick = sidekick_for(case.model)
    got = generate(case.model, case.cache(SMALL, sidekick, 4), left_padded(rows), **_LOGITS)
    for i, row in enumerate(rows):
        want = generate(case.model, case.cache(SMALL, sidekick), row[None], **_LOGITS)
        _same(f"tokens of row {i}", got.sequences[i, 20:], want.sequences[0, len(row) :])
        mine, alone = torch.stack(got.logits)[:, i], torch.stack(want.logits)[:, 0]
        _close(f"logits of row {i}", mine, alone, factor=3)


def beams(case: Case) -> None:
    """Beam search over a padded batch finds what the model itself finds."""
    inputs = left_padded([prompt(n, seed=n)[0] for n in (18, 9)])
    options = {"num_beams": 3, "num_return_sequences": 2}
    got = generate(case.model, case.cache(WIDE, batch=6), inputs, **options)
    _same("sequences", got, case.own(inputs, **options))


def chunked_prompt(case: Case) -> None:
    """A prompt in chunks is those chunks fed by hand; and the model's own with a long budget."""
    ids, sidekick = prompt(30), sidekick_for(case.model)
    cache = case.cache(SMALL, sidekick)
    got = generate(case.model, cache, ids, new=2, prefill_chunk_size=7, **_LOGITS)
    by_hand = case.cache(SMALL, sidekick)
    logits = [feed(case.model, by_hand, c) for c in ids.split(7, 1)]
    _close("logits", got.logits[0], logits[-1][:, -1])
    inputs = left_padded([prompt(n, seed=n)[0] for n in (25, 4, 13)])  # chunks of padding alone
    wide = generate(case.model, case.cache(WIDE, batch=3), inputs, prefill_chunk_size=6)
    _same("tokens", wide, case.own(inputs))


def snapshot(case: Case) -> None:
    """A snapshot amid a text goes on bit for bit, in this cache and in another one."""
    text, sidekick = prompt(26, rows=2), sidekick_for(case.model)
    cache = case.cache(SMALL, sidekick, 2)
    feed(case.model, cache, text[:, :17])
    kept = cache.state_dict()
    want = [feed(case.model, cache, c) for c in text[:, 17:].split(1, 1)]
    other = case.cache(SMALL, sidekick, 2)
    for one in (cache, other):
        one.load_state_dict(kept)
        for i, c in enumerate(text[:, 17:].split(1, 1)):
            _same(f"logits of step {i}", feed(case.model, one, c), want[i])


def training(case: Case) -> None:
    """Training sees the q, k, v and outputs that the cache sees; what it makes serves the model."""
    ids = prompt(20, rows=2)
    cache = case.cache(WIDE, batch=2)
    spy = Spy(cache)
    feed(case.model, cache, ids)
    with tempfile.TemporaryDirectory() as folder:
        walk = LayerWalk(case.model, ids, folder)
        for layer in bounded_layers(cache):
            walk.seek(layer)
            c = walk.capture(layer)
            for name, got, want in zip(
                ("q", "k", "v", "out"), (c.q, c.k, c.v, c.out), spy.layer(layer), strict=True
            ):
                _close(f"{name} of layer {layer}", got, want)
            if (c.scale, c.softcap) != (cache.scale, cache.softcap or 0.0):
                raise MatrixError(
                    f"layer {layer} has scale {c.scale} and soft-cap {c.softcap}, the cache "
                    f"{cache.scale} and {cache.softcap}"
                )
    recipe = Recipe(rank=2, hidden=4, steps=2, rows=4, held_rows=4)
    sidekick = train(case.model, ids, SMALL, recipe=recipe)  # one layer with maps, or more
    cache = case.cache(SMALL, sidekick, batch=2)
    for chunk in ids.split(10, 1):
        feed(case.model, cache, chunk)
    shares = cache.stats()["memory_share"]
    present = [layer for layer in bounded_layers(cache) if layer not in sidekick.absent]
    idle = [layer for layer in present if not shares[layer] > 0]
    if idle:
        raise MatrixError(f"the trained maps of layers {idle} have no part in attention")


CELLS: dict[str, Callable[[Case], None]] = {
    "full budget": full_budget,
    "small budget": small_budget,
    "padded batch": padded_batch,
    "beams": beams,
    "chunked prompt": chunked_prompt,
    "snapshot": snapshot,
    "training": training,
}


def _same(what: str, got: Tensor, want: Tensor) -> None:
    if not torch.equal(got, want):
        raise MatrixError(f"{what} differ: {_short(got)} instead of {_short(want)}")


def _close(what: str, got: Tensor, want: Tensor, factor: float = 1.0) -> None:
    error = float((got.double() - want.double()).abs().max() / want.double().abs().max())
    if not error <= factor * TOLERANCE:
        raise MatrixError(f"{what} differ by {error:.2g} of the largest")


def _short(x: Tensor) -> str:
    text = str(x.tolist())
    return text if len(text) <= 60 else text[:57] + "..."


# -- the table -----------------------------------------------------------------------------------

PASS = "pass"


@dataclass
class Row:
    """A model's line: what became of each cell, or why it is refused."""

    name: str
    attention: str = ""
    cells: dict[str, str] = field(default_factory=dict)
    refused: str = ""

    @property
    def holds(self) -> bool:
        """Every cell passes, or the model is refused by name."""
        return bool(self.refused) or (
            len(self.cells) == len(CELLS) and all(c == PASS for c in self.cells.values())
        )


def run_family(name: str, backend: str | None = None) -> Row:
    """Run every cell of a model that works; an error is the cell's text."""
    row = Row(name, FAMILIES[name].attention)
    # Whatever a model or a version of transformers comes up with is the cell's, not the table's.
    try:
        case = Case(build(name), backend)
    except Exception as error:
        row.cells = dict.fromkeys(CELLS, _first_line(error))
        return row
    for cell, check in CELLS.items():
        try:
            check(case)
            row.cells[cell] = PASS
        except Exception as error:
            row.cells[cell] = _first_line(error)
    return row


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def run_refused(name: str) -> Row:
    """Ask for a cache of a model that cannot work; the row has no cells where it is granted."""
    row = Row(name)
    try:
        cache_for(build_refused(name), SMALL, backend="reference")
    except UnsupportedModelError as error:
        if REFUSED[name].message in str(error):
            row.refused = str(error).split("): ", 1)[1]
    return row


def expected() -> list[Row]:
    """The table as it is when every cell passes; the refusals are asked for."""
    works = [Row(n, f.attention, dict.fromkeys(CELLS, PASS)) for n, f in FAMILIES.items()]
    return works + [run_refused(name) for name in REFUSED]


def as_markdown(rows: Iterable[Row]) -> str:
    """Two tables: models and cells, and models and why they are refused."""
    rows = list(rows)
    lines = []
    if any(row.cells for row in rows):
        lines += [_line("model_type", "layers", *CELLS), _line(*["---"] * (2 + len(CELLS)))]
        for row in rows:
            if row.cells:
                cells = [row.cells.get(cell, "") for cell in CELLS]
                lines.append(_line(f"`{row.name}`", row.attention, *cells))
    if any(not row.cells for row in rows):
        lines += ["", _line("refused", "because"), _line("---", "---")]
        for row in rows:
            if not row.cells:
                lines.append(_line(f"`{row.name}`", row.refused or "NOT REFUSED"))
    return "\n".join(lines).strip()


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
