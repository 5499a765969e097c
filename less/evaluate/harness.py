"""Tasks x methods x budgets on a model, in units that a kill loses one of at most.

A unit is one block of one task, for all methods at all budgets: their caches run side by side in
one pass over the model. Units are ordered so that every task has its first block before any has its
second; whatever the time allows is balanced. A unit's cells are written when it is done, and a cell
that is there already is never computed again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import less
from less.cache import LessKVCache
from less.evaluate.cells import Cell, Cells, key_of
from less.evaluate.named import Budget, NamedMethod
from less.evaluate.tasks.base import Block, Given, Task, UnavailableError
from less.hf.models import ModelFacts, describe
from less.hf.weights import note_weights
from less.sidekick.identity import model_identity

# What a cell costs, in tokens of a row that come in pieces: a step of one token, and each row of
# it. Of a model of 135M parameters on two cores; rates correct it as soon as a task has run.
_CALL, _ROW = 12, 3

#: Called with words, units done, units in all, and seconds left, which may be unknown (None).
Say = Callable[[str, int, int, "float | None"], None]


@dataclass(frozen=True)
class Model:
    """A model under measurement.

    Attributes:
        name: As reports have it.
        model: With its weights.
        longest: Tokens of its context; None: unbounded.
    """

    name: str
    model: Any
    longest: int | None = None

    def facts(self) -> ModelFacts:
        """Its shape."""
        return describe(self.model, "report")

    def identity(self) -> dict[str, Any]:
        """JSON-ready: shape, dtype and a few of the weights."""
        facts = self.facts()
        identity = {k: v for k, v in model_identity(self.model).items() if k != "name"}
        return {**identity, "dtype": str(facts.dtype), "weights": note_weights(facts)}


@dataclass(frozen=True)
class Unit:
    """What is measured at once.

    Attributes:
        task: The task.
        index: Number of the block among those of the task and length.
        block: The block.
        keys: Each pair of a method and a budget -> key of its cell; no budget for the full cache.
    """

    task: Task
    index: int
    block: Block
    keys: dict[tuple[NamedMethod, Budget | None], str]

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.task.name}, {self.block.length:,} tokens, block {self.index + 1}"


@dataclass
class Left:
    """What was not measured, and why.

    Attributes:
        tasks: Name of a task, and the length -> one sentence.
        methods: Method, budget and task -> one sentence.
        units: Task -> blocks that the time did not allow.
        failed: Task -> an error that nobody expected.
        warned: What caches warned of.
    """

    tasks: dict[str, str] = field(default_factory=dict)
    methods: dict[str, str] = field(default_factory=dict)
    units: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    warned: list[str] = field(default_factory=list)


def plan(
    model: Model,
    tasks: Sequence[Task],
    given: Given,
    methods: Sequence[NamedMethod],
    budgets: Sequence[Budget],
    left: Left,
) -> list[Unit]:
    """All units, in the order of measuring; tasks that cannot run are noted in ``left``."""
    whose = model.identity()
    identities = {method.name: method.identity() for method in methods}
    units: list[Unit] = []
    for task in tasks:
        for length in given.lengths:
            try:
                blocks = task.blocks(given, length)
            except UnavailableError as error:
                left.tasks[f"{task.name}, {length:,} tokens"] = str(error)
                continue
            too_long = next((b.tokens for b in blocks if b.tokens > (model.longest or math.inf)), 0)
            if too_long:
                left.tasks[f"{task.name}, {length:,} tokens"] = (
                    f"an example takes {too_long:,} tokens, beyond the model's context of "
                    f"{model.longest:,}"
                )
                continue
            for index, block in enumerate(blocks):
                common = {
                    "task": [task.name, task.version],
                    "block": block.digest,
                    "rows": block.rows,
                    "model": whose,
                    "less": less.__version__,
                }
                keys = {
                    (method, budget): key_of(
                        {
                            **common,
                            "method": identities[method.name],
                            "tokens": budget and budget.tokens(block.tokens),
                        }
                    )
                    for method in methods
                    for budget in (budgets if method.config is not None else [None])
                }
                units.append(Unit(task, index, block, keys))
    return sorted(units, key=lambda unit: (unit.index, unit.task.worth))


class Clock:
    """How long units take, learned from those that are done.

    Args:
        seconds: That may be used; None: as many as it takes.
    """

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        self._rates: dict[tuple[str, int], float] = {}  # seconds of a unit of work

    def done(self, unit: Unit, cells: int, seconds: float) -> None:
        """Note what a unit took."""
        rate = seconds / self._work(unit, cells)
        self._rates[unit.task.name, unit.block.length] = rate

    def estimate(self, unit: Unit, cells: int) -> float | None:
        """Seconds of a unit; None where nothing was measured yet."""
        if not self._rates:
            return None
        mean = sum(self._rates.values()) / len(self._rates)
        rate = self._rates.get((unit.task.name, unit.block.length), mean)
        return rate * self._work(unit, cells)

    def allows(self, unit: Unit, cells: int) -> bool:
        """Whether a unit will be done in time, as far as is known."""
        if self._end is None:
            return True
        return time.monotonic() + (self.estimate(unit, cells) or 0.0) < self._end

    def _work(self, unit: Unit, cells: int) -> int:
        block = unit.block
        single = block.steps * (_CALL + _ROW * block.rows)
        return max(1, cells) * (block.rows * block.tokens + single)


def pending(unit: Unit, cells: Cells) -> list[tuple[NamedMethod, Budget | None]]:
    """The methods and budgets of a unit that have no cell yet."""
    return [who for who, key in unit.keys.items() if key not in cells.known]


def measure(
    model: Model,
    units: Sequence[Unit],
    cells: Cells,
    left: Left,
    clock: Clock,
    say: Say,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Measure what has no cell yet, and write each unit's cells as soon as it is done.

    Args:
        model: Whose units they are.
        units: From ``plan``.
        cells: Where results are looked up and written.
        left: Takes what was not measured.
        clock: The time that there is.
        say: Called before each unit.
        progress: Called within a unit.
    """
    facts = model.facts()
    todo = [unit for unit in units if pending(unit, cells)]
    for number, unit in enumerate(todo):
        wanted = pending(unit, cells)
        if unit.task.name in left.failed:
            continue
        if not clock.allows(unit, len(wanted)):
            left.units[unit.task.name] = left.units.get(unit.task.name, 0) + 1
            continue
        built = _built(model, facts, unit, wanted, left)
        if not built:
            continue
        rest = [clock.estimate(other, len(pending(other, cells))) for other in todo[number:]]
        known = [seconds for seconds in rest if seconds is not None]
        say(unit.name, number, len(todo), sum(known) if known else None)
        start = time.monotonic()
        try:
            done = _cells(model, facts, unit, built, progress)
        except UnavailableError as error:
            left.tasks[f"{unit.task.name}, {unit.block.length:,} tokens"] = str(error)
            continue
        except Exception as error:  # one task's fault must not end the others
            left.failed[unit.task.name] = f"{type(error).__name__}: {error}"
            continue
        seconds = time.monotonic() - start
        for cell in done:
            cell["seconds"] = round(seconds / len(done), 3)
        cells.add(done)
        clock.done(unit, len(done), seconds)


Built = list[tuple[NamedMethod, "Budget | None", "LessKVCache | None"]]


def _built(
    model: Model,
    facts: ModelFacts,
    unit: Unit,
    wanted: Sequence[tuple[NamedMethod, Budget | None]],
    left: Left,
) -> Built:
    """The caches of methods and budgets; whose bytes are too few is noted in ``left``."""
    block = unit.block
    built: Built = []
    for method, budget in wanted:
        room = 0 if budget is None else budget.room(facts, block.tokens)
        try:
            built.append((method, budget, method.cache(model.model, block.rows, room)))
        except ValueError as error:
            assert budget is not None  # the full cache is none
            where = f"{method.name} at {budget.text}, {block.length:,} tokens"
            left.methods.setdefault(where, str(error))
    return built


def _cells(
    model: Model,
    facts: ModelFacts,
    unit: Unit,
    built: Built,
    progress: Callable[[int, int], None] | None,
) -> list[Cell]:
    """A cell for each cache, once its block is scored."""
    block = unit.block
    caches = [cache for _, _, cache in built]
    scores = unit.task.score(model.model, block, caches, progress)
    return [
        {
            "kind": "cell",
            "key": unit.keys[method, budget],
            "model": model.name,
            "task": unit.task.name,
            "length": block.length,
            "block": block.digest,
            "index": unit.index,
            "method": method.name,
            "budget": "" if budget is None else budget.text,
            "tokens": block.tokens if budget is None else budget.tokens(block.tokens),
            "bytes": _bytes(facts, block, cache),
            "scores": score,
        }
        for (method, budget, cache), score in zip(built, scores, strict=True)
    ]


def _bytes(facts: ModelFacts, block: Block, cache: LessKVCache | None) -> dict[str, int]:
    """Bytes of a row at the end of a block: what grows or is held per row, and what is shared."""
    if cache is None:
        layers = facts.layers - len(facts.windows)
        keys = layers * facts.kv_heads * facts.head_dim * 2 * 2 * block.tokens  # 16 bits
        return {"row": keys + facts.kv_heads * facts.window_bytes, "shared": 0}
    held = cache.memory()
    rows = held["slots"] + held["state"] + held["native"]
    return {"row": rows // cache.batch, "shared": held["maps"]}
