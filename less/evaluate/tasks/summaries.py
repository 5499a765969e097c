"""Summaries under ROUGE: the paper's data sets, and XSum articles that a package carries."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch

from less.cache import LessKVCache
from less.evaluate.feeding import Progress, greedy
from less.evaluate.side_by_side import SideBySide
from less.evaluate.tasks.base import Block, Given, Metric, Scores, Task, UnavailableError, said
from less.evaluate.tasks.data import SUMMARIES, summaries
from less.fit.text import opening, tokens_of

_MARK = "@@"
_LOOKED_AT = 8  # documents for each one that is wanted, until enough of them fit the length


class Summary(Task):
    """Greedy summaries, the prompt taken in at once as in the paper."""

    metrics = (
        Metric("rouge1", "ROUGE-1", lower=False),
        Metric("rouge2", "ROUGE-2", lower=False),
        Metric("rougeL", "ROUGE-L", lower=False),
    )

    def __init__(self, data: str, worth: int) -> None:
        """Of a data set in ``SUMMARIES``."""
        self.data, self.worth, self.kind = data, worth, SUMMARIES[data]
        self.name = f"summaries:{data}"
        self.about = (
            f"ROUGE F-measures, in percent, of summaries of {data}, at most {self.kind.tokens} "
            "tokens, greedy; the prompt is taken in at once."
        )

    def blocks(self, given: Given, length: int) -> list[Block]:
        """A document each, of those whose prompt and summary fit into the length."""
        try:
            import rouge_score  # noqa: F401
        except ImportError as error:
            raise UnavailableError("ROUGE needs pip install 'less-kv[report]'") from error
        before, behind = self._prompt(given.tokenizer)
        found: list[Block] = []
        rows = islice(summaries(self.data, given.data.get(self.data)), _LOOKED_AT * given.count)
        for document, reference in rows:
            ids = [*before, *tokens_of(given.tokenizer, document.strip()), *behind]
            tokens = len(ids) + self.kind.tokens
            if tokens > length or not length // 2 < tokens:
                continue
            content = {
                "ids": torch.tensor([ids]),
                "reference": reference,
                "tokens": self.kind.tokens,
            }
            found.append(Block(length, tokens, content, steps=self.kind.tokens))
            if len(found) == given.count:
                break
        if not found:
            raise UnavailableError(
                f"none of {self.data}'s first {_LOOKED_AT * given.count} documents fills "
                f"{length // 2} to {length} tokens"
            )
        self._tokenizer = given.tokenizer
        return found

    def _prompt(self, tokenizer: Any) -> tuple[list[int], list[int]]:
        """What stands before and behind a document: a chat where there is a template."""
        prompt = self.kind.prompt.format(document=_MARK)
        if getattr(tokenizer, "chat_template", None):
            prompt = said(tokenizer, [{"role": "user", "content": prompt}])
        else:
            prompt += "\n\nSummary:"
        before, _, behind = prompt.partition(_MARK)
        return opening(tokenizer) + tokens_of(tokenizer, before), tokens_of(tokenizer, behind)

    def score(
        self,
        model: Any,
        block: Block,
        caches: Sequence[LessKVCache | None],
        progress: Progress | None = None,
    ) -> list[Scores]:
        """ROUGE of what each cache writes."""
        prompt, tokens = block.content["ids"], block.content["tokens"]
        end = _ends(model, self._tokenizer)
        bounded = [cache for cache in caches if cache is not None]
        written: list[list[int]] = []
        if bounded and (len(bounded) == 1 or not bounded[0].native):
            together = bounded[0] if len(bounded) == 1 else SideBySide(bounded)
            rows = prompt.repeat(len(bounded), 1)
            written = greedy(self.name, model, rows, together, tokens, end, progress=progress)
        else:
            for cache in bounded:
                written += greedy(self.name, model, prompt, cache, tokens, end)
        rest = iter(written)
        texts = [
            greedy(self.name, model, prompt, None, tokens, end)[0] if c is None else next(rest)
            for c in caches
        ]
        return [_rouge(block.content["reference"], self._tokenizer.decode(ids)) for ids in texts]


def _ends(model: Any, tokenizer: Any) -> set[int]:
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    return {token for token in (*several, tokenizer.eos_token_id) if token is not None}


def _rouge(reference: str, text: str) -> Scores:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    return {
        name: [100 * one.fmeasure] for name, one in scorer.score(reference, text.strip()).items()
    }


def tasks(given: Given) -> list[Task]:
    """One for each data set."""
    return [Summary(name, 15 if name in given.data else 32) for name in SUMMARIES]
