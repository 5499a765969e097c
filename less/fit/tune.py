"""Tune centroid maps end to end: the whole model on bounded attention against itself on full.

Maps are trained layer by layer on what a full cache shows each layer. In use, a layer sees what the
bounded layers before it have made of the text. Here the model runs over windows of text with every
layer bounded, evicting by its own queries and keys, and all maps take steps together that bring its
outputs nearer to those of full attention: the Kullback-Leibler divergence of sampled tokens. The
capacities take turns. The model's own weights stay as they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from less import reference
from less._check import require_int
from less.calibration import Calibration
from less.config import LessConfig
from less.fit.capture import attend_fully, calling
from less.fit.eviction import Served, all_served
from less.fit.recipe import check_lr, half_cosine
from less.fit.schedule import schedule
from less.hf.models import ModelFacts, describe
from less.layer import Maps
from less.layer.kinds import KEY_MEAN
from less.policies import Policy
from less.sidekick import Sidekick

_UNITS = {"q_factor": "q_factor", "k_factor": "k_factor", "k_weight": "k_factor"}


@dataclass(frozen=True)
class Tuning:
    """How maps are tuned end to end.

    Attributes:
        steps: Of AdamW, one window each.
        lr: Peak learning rate; it rises over `warmup` steps and falls to 0 as a half cosine.
        window: Tokens of a window.
        rows: Sampled tokens of a window whose outputs are compared.
        warmup: Steps of linear rise.
        held: Windows of held-back text on which the maps are compared before and after.
        seed: Of all that is drawn.

    Raises:
        ValueError: A setting is out of range.
    """

    steps: int = 60
    lr: float = 2e-3
    window: int = 768
    rows: int = 256
    warmup: int = 10
    held: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings out of range, by name."""
        for name in ("steps", "window", "rows", "held"):
            require_int("Tuning", name, getattr(self, name), 1)
        check_lr(self)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return half_cosine(self.lr, step, self.steps, self.warmup)


def tune(
    model: Any,
    ids: Tensor,
    sidekick: Sidekick,
    policies: Sequence[Policy | LessConfig],
    settings: Tuning | None = None,
    *,
    held: int,
    calibration: Calibration | None = None,
    show: Callable[[int, int, float], None] = lambda step, steps, divergence: None,
) -> Sidekick:
    """Tune a sidekick of centroid maps.

    Args:
        model: The model that it was trained for, whole, on any device.
        ids: Token ids, int64 [chunks, tokens].
        sidekick: Layers without maps stay so.
        policies: What the cache will evict by, as in ``train``; they take turns, step by step.
        settings: How; `Tuning()` by default.
        held: Chunks at the end of `ids` that are not tuned on: the maps are compared on them.
        calibration: As in ``train``.
        show: Called with the steps done, all steps, and the step's divergence in nats a token.

    Returns:
        The tuned sidekick, in float32; the given one where the tuned maps diverge more on the
        held-back chunks. Its config's "training" has a "tuning" that says which, and both figures.

    Raises:
        ValueError: The maps are of another kind, or the chunks are too short.
    """
    settings = settings or Tuning()
    facts = describe(model, "tune")
    served = all_served(model, facts, policies, calibration, sidekick.kind, sidekick.rank)
    check_tuning(sidekick.kind, ids.shape[1], [x.budgets[0] for x in served], settings)
    window = min(settings.window, ids.shape[1])
    begun = time.perf_counter()
    generator = torch.Generator().manual_seed(settings.seed)
    run = _Run(model, facts, sidekick, settings.rows)
    train, test = ids[: len(ids) - held], ids[len(ids) - held :]
    windows = [test[i % held, :window] for i in range(settings.held)]
    with run.attending():
        before = run.divergences(windows, served)
        optimizer = torch.optim.AdamW(
            run.leaves(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0
        )
        queue: list[int] = []
        for step in range(settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(step)
            queue = queue or torch.randperm(len(train), generator=generator).tolist()
            first = int(torch.randint(ids.shape[1] - window + 1, (1,), generator=generator))
            turn = step % len(served)
            text = train[queue.pop(), first : first + window]
            rows = run.sample(window, generator)
            divergence = run.divergence(text, served[turn], rows)
            optimizer.zero_grad()
            # Relative to what it was, else the smallest budget alone would be tuned for.
            (divergence / max(before[turn], 1e-6)).backward()
            nn.utils.clip_grad_norm_(run.leaves(), 1.0)
            optimizer.step()
            show(step + 1, settings.steps, float(divergence.detach()))
        after = run.divergences(windows, served)
    kept = sum(after) < sum(before)
    record = {
        **dataclasses.asdict(settings),
        "window": window,
        "divergence_before": before,
        "divergence_after": after,
        "kept": kept,
        "seconds": round(time.perf_counter() - begun, 1),
    }
    training = dict(sidekick.config.get("training") or {})
    config = {**sidekick.config, "training": {**training, "tuning": record}}
    layers = run.layers() if kept else list(sidekick.to(torch.float32))
    return Sidekick(layers, kind=sidekick.kind, config=config)


def check_tuning(kind: str, length: int, budgets: Sequence[int], settings: Tuning) -> None:
    """Refuse maps and texts that cannot be tuned.

    Args:
        kind: Of the maps.
        length: Tokens of a chunk.
        budgets: Of each cache, the fewest slots of a head.
        settings: How.

    Raises:
        ValueError: The maps are of another kind than centroid, or windows evict nothing.
    """
    if kind != "centroid":
        raise ValueError(f"tune: maps must be of kind 'centroid', got {kind!r}")
    window, most = min(settings.window, length), max(budgets)
    if window <= most:
        raise ValueError(
            f"tune: windows must be longer than the largest budget, {most}, else nothing is "
            f"evicted; got {window} tokens"
        )


class _Run:
    """The model with every layer's maps as leaf tensors, in units in which one rate fits all."""

    def __init__(self, model: Any, facts: ModelFacts, sidekick: Sidekick, rows: int) -> None:
        self.model, self.facts, self.rows = model, facts, rows
        self._layer = {id(m): i for i, m in enumerate(facts.modules)}
        self._means: list[Tensor | None] = []
        self._units: list[dict[str, Tensor]] = []
        self._leaves: list[dict[str, Tensor]] = []
        self._served: Served | None = None
        for maps in sidekick.to(facts.device, torch.float32):
            self._means.append(maps.pop(KEY_MEAN, None))
            units = {
                name: maps[of].abs().clamp(min=1e-6).view(-1, *[1] * (maps[name].dim() - 1))
                for name, of in _UNITS.items()
                if maps
            }
            self._units.append(units)
            self._leaves.append(
                {n: (x / units[n] if n in units else x).requires_grad_() for n, x in maps.items()}
            )

    def leaves(self) -> list[Tensor]:
        """What the optimiser moves."""
        return [x for leaves in self._leaves for x in leaves.values()]

    def maps(self, layer: int) -> dict[str, Tensor]:
        """A layer's maps; empty where it has none."""
        units = self._units[layer]
        return {n: x * units[n] if n in units else x for n, x in self._leaves[layer].items()}

    def layers(self) -> list[dict[str, Tensor]]:
        """All layers as a sidekick has them."""
        found = []
        for i, mean in enumerate(self._means):
            maps = {n: x.detach().clone() for n, x in self.maps(i).items()}
            found.append(maps if mean is None else {**maps, KEY_MEAN: mean})
        return found

    def sample(self, window: int, generator: torch.Generator) -> Tensor:
        """Tokens of a window to compare, ascending; of its last four fifths."""
        first = window // 5
        order = torch.randperm(window - first, generator=generator)[: self.rows]
        return order.sort().values + first

    def divergences(self, windows: Sequence[Tensor], served: Sequence[Served]) -> list[float]:
        """Mean divergence over windows, per cache."""
        rows = self.sample(len(windows[0]), torch.Generator().manual_seed(0))
        with torch.no_grad():
            return [
                sum(float(self.divergence(text, one, rows)) for text in windows) / len(windows)
                for one in served
            ]

    def divergence(self, text: Tensor, served: Served, rows: Tensor) -> Tensor:
        """Nats a token, at the sampled tokens, between the outputs of full and bounded attention.

        Args:
            text: Token ids, int64 [T].
            served: The cache.
            rows: int64 [n].
        """
        with torch.no_grad():
            wanted = self._log_odds(text, None, rows)
        got = self._log_odds(text, served, rows)
        return nn.functional.kl_div(got, wanted, reduction="none", log_target=True).sum(-1).mean()

    def _log_odds(self, text: Tensor, served: Served | None, rows: Tensor) -> Tensor:
        self._served = served
        device = self.facts.device
        logits = self.model(
            input_ids=text[None].to(device), use_cache=False, logits_to_keep=rows.to(device)
        ).logits[0]
        odds: Tensor = logits.float().log_softmax(-1)
        return odds

    @contextlib.contextmanager
    def attending(self) -> Iterator[None]:
        """Let the model's attention be this object's, its weights without gradients."""
        wanted = [p for p in self.model.parameters() if p.requires_grad]
        training = self.model.training
        self.model.eval()
        for p in wanted:
            p.requires_grad_(False)
        try:
            with calling(self.model, self.facts, self._attend):
                yield
        finally:
            self.model.train(training)
            for p in wanted:
                p.requires_grad_(True)

    def _attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float,
        softcap: float,
    ) -> Tensor:
        layer = self._layer[id(module)]
        eviction = None if self._served is None else self._served.layers[layer]
        if eviction is None:
            return attend_fully(q, k, v, mask, scale, softcap)
        left = schedule(q.detach(), k.detach(), v.detach(), eviction, scale, softcap)
        taken = eviction.cold(k.detach(), v.detach())
        error = (taken[0] - k.detach(), taken[1] - v.detach())
        given = (q, k, v, left, self.maps(layer), self._means[layer], scale, softcap, error)
        if not torch.is_grad_enabled():
            return bounded(*given).to(q.dtype)
        # Computed again in the backward pass: a window's [T, T] of every layer are gigabytes.
        out: Tensor = checkpoint(bounded, *given, use_reentrant=False)
        return out.to(q.dtype)


def bounded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: Tensor,
    maps: Mapping[str, Tensor],
    mean: Tensor | None,
    scale: float,
    softcap: float,
    error: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention over what is kept, and over the state of what has left, at every token of a text.

    ``less.reference.parallel`` of centroid maps; with a gradient for maps, q, k and v.

    Args:
        q: [B, Q, T, D].
        k: [B, K, T, D].
        v: [B, K, T, D].
        left: From ``schedule``, int64 [B, K, T].
        maps: The layer's; empty: eviction alone.
        mean: Of keys, which psi takes without it [K, D]; None: 0.
        scale: Factor of q.k.
        softcap: What scale q.k is held within; 0: nothing.
        error: What rows make of keys and values until they leave, [B, K, T, D] each: the state
            takes these with it, what is kept is taken as it is. None: nothing.

    Returns:
        float32 [B, Q, T, D].
    """
    B, K, T, D = k.shape
    Q = q.shape[1]
    q, k, v = q.float(), k.float(), v.float()
    if mean is not None:
        k = k - mean[:, None]
    token = torch.arange(T, device=k.device)
    gone = left[:, :, None, None, :] <= token[:, None]
    hidden = token > token[:, None] if maps else gone | (token > token[:, None])
    grouped = (B, K, Q // K, T, T)
    logits = reference.capped(q.reshape(B, K, -1, D) @ k.transpose(2, 3) * scale, softcap)
    logits = logits.view(grouped)
    if maps:
        # What has left weighs by its features: of one softmax with what is kept.
        taken = k if error is None else k + error[0]
        phi, psi = (
            reference.phi(q, Maps("centroid", maps)),
            reference.psi(taken, Maps("centroid", maps)),
        )
        low = phi.reshape(B, K, Q // K * T, -1) @ psi.transpose(2, 3)
        low = low.clamp(min=torch.finfo(torch.float32).tiny).log()
        logits = torch.where(gone, low.view(grouped), logits)
    weight = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    out = weight.view(B, K, -1, T) @ v
    if error is not None and maps:
        out = out + (weight * gone).view(B, K, -1, T) @ error[1]
    return out.view(B, Q, T, D)
