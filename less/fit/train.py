"""Train a sidekick: layer by layer, independently, on q, k, v captured with a full cache.

    text -> pool of chunks -> [layer 0: capture, schedules, Adam] -> [layer 1: ...] -> Sidekick

The objective is the paper's (l2 after the output projection under the policy's mask). What differs
from its recipe, and what each change was measured to bring, is in docs/training.md: queries are
sampled, several budgets are trained at once, the start is mass-matched, and the "exp" maps exist.

Source: arXiv:2402.09398, section 3.3.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from less.calibration import Calibration
from less.config import LessConfig
from less.files import read_json, require_regular, write_whole
from less.fit.capture import LayerWalk
from less.fit.eviction import Eviction, Served, all_served
from less.fit.one_layer import fit_layer
from less.fit.recipe import LayerRecord, Progress, Recipe
from less.fit.text import Pool, identity, sample_chunks
from less.fit.tune import Tuning, check_tuning, tune
from less.hf.models import describe
from less.hf.weights import FIELD, note_weights
from less.layer.kinds import KINDS
from less.policies import Policy, policy_to_dict
from less.sidekick import Sidekick
from less.sidekick.identity import model_identity

_RUN = "run.json"
_RECIPE_VERSION = 2  # raise it when the same settings would train something else


def train(
    model: Any,
    text: Tensor | Pool | str | Iterable[str],
    policies: Policy | LessConfig | Sequence[Policy | LessConfig],
    *,
    tokenizer: Any = None,
    calibration: Calibration | None = None,
    recipe: Recipe | None = None,
    chunks: int = 48,
    chunk_tokens: int = 1024,
    held: int | None = None,
    work: str | os.PathLike[str] | None = None,
    source: str = "",
    name: str | None = None,
    start: Sidekick | None = None,
    tuning: Tuning | None = None,
    show: Callable[[Progress], None] = lambda progress: None,
) -> Sidekick:
    """Train a sidekick for a model, a policy (or several at once) and a text.

    Each finished layer is a file in `work`. A run that is killed continues there, from the layer
    it was in, and ends with the same sidekick bit for bit as a run that was not (same machine and
    thread count): everything random is seeded per layer.

    A layer whose maps lose more than eviction alone on the held-back chunks is left without maps
    (``Sidekick.absent``), and evicts alone.

    Layers that slide are not trained: they bound themselves, and a cache leaves them as they are
    (`less.hf`). Their entries in the sidekick are zeros, and they have no record.

    Args:
        model: A transformers causal language model that a bounded cache can serve
            (``less.hf.SUPPORTED``), on any device.
        text: Token ids, int64 [chunks, tokens], used as they are, or the ``Pool`` of them that
            ``sample_chunks`` made; or a text, or texts in any iterable (consumed once, never held
            together), of which `chunks` chunks are sampled.
        policies: What the cache will evict by. Several of the same rule at different budgets make
            one sidekick that serves all of them, and budgets between. In place of a policy, a
            ``LessConfig`` without a sidekick: maps are trained for the slots, rows and heads of its
            cache. All have the same rows.
        tokenizer: The model's, where `text` is text.
        calibration: Of the configs' rows and heads. Centred maps are trained on keys without its
            means, and serve beside it alone.
        recipe: How each layer is trained; `Recipe()` by default.
        chunks: Chunks sampled, held-back ones included. Of every chunk one layer's q, k, v and
            output are held in memory, and one layer boundary on disk; nothing grows with the text.
        chunk_tokens: Tokens of a chunk.
        held: Chunks never trained on, for the reported losses; an eighth by default.
        work: Folder of the unfinished run; a temporary one, that nothing can resume, by default.
            Emptied of the run's files at its end.
        source: Where the text comes from, for the record.
        name: The model's name, for the record; the last part of its path by default.
        start: A sidekick of this model, kind and rank: training begins at its maps, and keeps its
            means of keys. One that was trained on shorter texts, say. None: maps are drawn.
        tuning: How the maps of all layers are tuned together at the end (``less.fit.tune``), of
            centroid maps; None: they are not.
        show: Called as the work proceeds.

    Returns:
        The sidekick. Its `config` holds the model's identity and a few of its weights, the policies
        and the training record.

    Raises:
        TypeError: the model is none of transformers.
        ValueError: an argument is wrong, the text is too short, no bounded cache can serve the
            model, or `work` holds another run (the message says what differs).
    """
    recipe = recipe or Recipe()
    given = [policies] if isinstance(policies, (Policy, LessConfig)) else list(policies)
    if not given or not all(isinstance(p, (Policy, LessConfig)) for p in given):
        raise ValueError(f"train: policies must be one Policy or several, got {given!r}")
    for policy in given:
        if isinstance(policy, Policy):
            policy_to_dict(policy)  # what cannot be written is refused before anything else
    ids, record = _pool(text, tokenizer, chunks, chunk_tokens, recipe.seed)
    facts = describe(model, "train")
    served = all_served(model, facts, given, calibration, recipe.kind, recipe.rank)
    written = [policy_to_dict(x.policy) for x in served]
    budgets = sorted({n for x in served for n in x.budgets})
    fewest = [x.budgets[0] for x in served]
    held = held_chunks(fewest, ids.shape[0], ids.shape[1], held)
    if tuning is not None:
        check_tuning(recipe.kind, ids.shape[1], fewest, tuning)
    if start is not None:
        _check_start(start, model, recipe, served)
        start = start.to(torch.float32)
    folder = Path(tempfile.mkdtemp(prefix="less-train-")) if work is None else Path(work)
    begun = time.perf_counter()
    try:
        walk = LayerWalk(model, ids, folder)  # refuses a model before anything is written
        model_record = model_identity(model)
        if name is not None:
            model_record["name"] = name
        run = {
            "recipe_version": _RECIPE_VERSION,
            "recipe": dataclasses.asdict(recipe),
            "policies": written,
            "budgets": budgets,
            "text": {k: record[k] for k in ("chunks", "chunk_tokens", "sha256")},
            "held": held,
            "model": {k: v for k, v in model_record.items() if k != "name"},
        }
        if start is not None:
            run["start"] = start.digest
        if calibration is not None:
            run["calibration"] = calibration.digest
        folder.mkdir(parents=True, exist_ok=True)
        _claim(folder, run)
        layers, records = _train_layers(walk, served, recipe, held, folder, show, start)
        config = {
            "model": model_record,
            FIELD: note_weights(walk.facts),
            "policies": run["policies"],
            "budgets": budgets,
            "training": {
                "text": {"source": source, **record},
                "tokens": ids.numel(),
                "held_chunks": held,
                "recipe": run["recipe"],
                "seconds": round(time.perf_counter() - begun, 1),
                "layers": [dataclasses.asdict(r) for r in records],
            },
        }
        sidekick = Sidekick(layers, kind=recipe.kind, config=_rounded(config))
        if tuning is not None:
            total = len(walk.layers)

            def tuned(done: int, steps: int, _divergence: float) -> None:
                show(Progress(total, total, "tune", done / steps))

            sidekick = tune(
                model, ids, sidekick, given, tuning, held=held, show=tuned, calibration=calibration
            )
            sidekick.config = _rounded(sidekick.config)
    except BaseException:
        if work is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    walk.close()
    # Of earlier runs too, which were killed while they wrote.
    parts = [*folder.glob(".layer-*.safetensors"), *folder.glob(f".{_RUN}.*")]
    for path in [*parts, *folder.glob("layer-*.safetensors"), folder / _RUN]:
        path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
    return sidekick


def held_chunks(budgets: Sequence[int], chunks: int, tokens: int, held: int | None) -> int:
    """How many chunks are held back: `held`, an eighth for None.

    Args:
        budgets: Of each cache that is trained for, the fewest slots of a head.
        chunks: All of them.
        tokens: Of a chunk.
        held: As asked for.

    Raises:
        ValueError: that leaves none to train on, or nothing is evicted in chunks of `tokens`.
    """
    held = max(1, chunks // 8) if held is None else held
    if not 1 <= held < chunks:
        raise ValueError(f"train: held must be in 1..{chunks - 1} (chunks - 1), got {held}")
    if tokens <= max(budgets):
        raise ValueError(
            f"train: chunks must be longer than the largest budget {max(budgets)}, else nothing is "
            f"evicted; got {tokens} tokens"
        )
    return held


def _train_layers(
    walk: LayerWalk,
    served: Sequence[Served],
    recipe: Recipe,
    held: int,
    folder: Path,
    show: Callable[[Progress], None],
    start: Sidekick | None,
) -> tuple[list[dict[str, Tensor]], list[LayerRecord]]:
    total = len(walk.layers)
    trained: dict[int, dict[str, Tensor]] = {}
    records: list[LayerRecord] = []
    for layer in range(total):
        if layer in walk.sliding:  # walked through on the way to the next
            continue
        path = folder / f"layer-{layer}.safetensors"
        resumed = path.exists()
        if resumed:
            maps, record = _read_layer(path)
        else:
            begin = None if start is None or layer in start.absent else start[layer]
            own = [x.layers[layer] for x in served]
            maps, record = _train_layer(walk, own, recipe, held, layer, show, begin)
            _write_layer(path, maps, record)
        for passed in walk.boundaries:
            if passed <= layer and (layer + 1 in walk.boundaries):
                walk.release(passed)
        trained[layer] = maps if record.helps else {}
        records.append(record)
        show(Progress(layer, total, "done", 1.0, record, resumed))
    # A sidekick has an entry for each layer of the model; those of sliding layers are not used.
    if not any(trained.values()):
        raise ValueError(
            "train: no layer's maps are better than eviction alone on the held-back chunks; train "
            "for more steps, or on more text"
        )
    some = next(maps for maps in trained.values() if maps)
    unused = {n: torch.zeros_like(t) for n, t in some.items()}
    return [trained.get(layer, unused) for layer in range(total)], records


def _train_layer(
    walk: LayerWalk,
    evictions: Sequence[Eviction | None],
    recipe: Recipe,
    held: int,
    layer: int,
    show: Callable[[Progress], None],
    start: dict[str, Tensor] | None,
) -> tuple[dict[str, Tensor], LayerRecord]:
    """Capture and train; of a layer's time about a sixth is the capture's."""
    begun, total, caught = time.perf_counter(), len(walk.layers), 0

    def captured_one() -> None:
        nonlocal caught
        caught += 1
        show(Progress(layer, total, "capture", 0.15 * caught / len(walk.ids)))

    walk.seek(layer)
    captured = walk.capture(layer, captured_one)
    maps, record = fit_layer(
        captured,
        [e for e in evictions if e is not None],
        recipe,
        layer,
        held,
        lambda fraction: show(Progress(layer, total, "train", 0.15 + 0.85 * fraction)),
        start,
    )
    return maps, dataclasses.replace(record, seconds=time.perf_counter() - begun)


def _pool(
    text: Tensor | Pool | str | Iterable[str], tokenizer: Any, chunks: int, length: int, seed: int
) -> Pool:
    if isinstance(text, Pool):
        return text
    if isinstance(text, Tensor):
        if text.dim() != 2 or text.dtype != torch.int64 or 0 in text.shape:
            raise ValueError(
                "train: token ids must be int64 [chunks, tokens], got "
                f"{text.dtype} {list(text.shape)}"
            )
        return Pool(text, identity(text))
    if tokenizer is None:
        raise ValueError("train: text needs tokenizer=, the model's; or give token ids")
    texts = [text] if isinstance(text, str) else text
    return sample_chunks(tokenizer, texts, length, chunks, seed)


def _check_start(start: Sidekick, model: Any, recipe: Recipe, served: Sequence[Served]) -> None:
    """Refuse a sidekick that training cannot begin at."""
    start.check_model(model)
    for name in ("kind", "rank"):
        if getattr(start, name) != getattr(recipe, name):
            raise ValueError(
                f"train: start must have the recipe's {name}, {getattr(recipe, name)!r}, got "
                f"{getattr(start, name)!r}"
            )
    if start.hidden not in (0, recipe.hidden):
        raise ValueError(
            f"train: start must have the recipe's hidden, {recipe.hidden}, got {start.hidden}"
        )
    if not KINDS[start.kind].centred:
        return
    for layer, eviction in enumerate(served[0].layers):
        space = None if eviction is None else eviction.space
        mean = None if layer in start.absent else start.key_mean(layer)
        if mean is not None and space is not None and not torch.equal(mean.half(), space.key_mean):
            raise ValueError(
                f"train: start must have the calibration's key_mean, and has another in layer "
                f"{layer}"
            )


def _claim(folder: Path, run: dict[str, Any]) -> None:
    """Write down what this folder's run is, or refuse if it is another's."""
    path = folder / _RUN
    wanted = json.loads(json.dumps(run))
    if path.exists():
        try:
            found = read_json(f"train: {path}", path)
            if not isinstance(found, dict):
                raise ValueError(f"train: {path}: must hold an object")
        except ValueError as error:
            raise ValueError(f"train: {path} is damaged; delete the folder ({error})") from None
        differing = [k for k in wanted if found.get(k) != wanted[k]]
        if differing:
            raise ValueError(
                f"train: {folder} holds an unfinished run of other settings (they differ in "
                f"{', '.join(differing)}); repeat its settings, choose another folder or delete it"
            )
        return
    write_whole(path, json.dumps(wanted, indent=2) + "\n")


def _write_layer(path: Path, maps: dict[str, Tensor], record: LayerRecord) -> None:
    from safetensors.torch import save

    tensors = {n: t.cpu().contiguous() for n, t in maps.items()}
    write_whole(path, save(tensors, {"record": json.dumps(dataclasses.asdict(record))}))


def _read_layer(path: Path) -> tuple[dict[str, Tensor], LayerRecord]:
    from safetensors import SafetensorError, safe_open

    try:
        require_regular(f"train: {path}", path)
        with safe_open(path, framework="pt") as file:
            record = LayerRecord(**json.loads((file.metadata() or {})["record"]))
            return {n: file.get_tensor(n) for n in file.keys()}, record  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"train: {path} is damaged ({error}); delete it, and its layer is trained again"
        ) from None


def _rounded(x: Any) -> Any:
    """Losses and times to six digits: a config is read by people too."""
    if isinstance(x, dict):
        return {k: _rounded(v) for k, v in x.items()}
    if isinstance(x, list):
        return [_rounded(v) for v in x]
    return float(f"{x:.6g}") if isinstance(x, float) else x
