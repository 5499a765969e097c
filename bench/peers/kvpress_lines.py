"""Runs in kvpress's own environment: presses on blocks, a JSON line per press, share and block.

    python kvpress_lines.py MODEL_FOLDER OUT NAME

OUT/blocks.json is what ``bench.peers`` wrote; OUT/kvpress.jsonl is written. Nothing of less is
imported here.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import kvpress
import torch
from transformers import AutoModelForCausalLM, DynamicCache


def scores(model: Any, block: dict[str, Any], press: Any) -> tuple[dict[str, list[float]], int]:
    """Nats of an answer token, share of answers that greedy decoding writes; bytes of k and v.

    Args:
        model: With its weights.
        block: Of ``blocks.json``.
        press: Of kvpress; None: nothing is compressed.
    """
    ids, asked = torch.tensor([block["ids"]]), torch.tensor(block["asked"])
    context, length = block["context"], len(asked)
    cache = DynamicCache()
    nats, greedy = torch.zeros(length), torch.zeros(length, dtype=torch.bool)
    with torch.inference_mode():
        with press(model) if press is not None else contextlib.nullcontext():
            logits = model(ids[:, :context], past_key_values=cache).logits[0, -1]
        for t in range(context, length):
            target = int(ids[0, t])
            nats[t] = -logits.float().log_softmax(-1)[target]
            greedy[t] = int(logits.argmax()) == target
            position = torch.tensor([t])
            logits = model(
                ids[:, t : t + 1], past_key_values=cache, position_ids=position[None],
                cache_position=position,
            ).logits[0, -1]  # fmt: skip
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    numbers = range(1, int(asked.max()) + 1)
    recall = sum(bool(greedy[asked == n].all()) for n in numbers) / len(numbers)
    return {"nats": [float(nats[asked > 0].mean())], "recall": [recall]}, held


def main() -> None:
    """Run every press at every share on every block."""
    folder, out, name = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    work = json.loads((out / "blocks.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    runs: list[tuple[str, float | None]] = [("full", None)]
    runs += [(press, share) for press in work["presses"] for share in work["shares"]]
    with (out / "kvpress.jsonl").open("w", encoding="utf-8") as file:
        for block in work["blocks"]:
            for press, share in runs:
                length = block["context"]
                made = None if share is None else getattr(kvpress, press)(1.0 - share)
                found, held = scores(model, block, made)
                line = {
                    "kind": "cell",
                    "key": f"kvpress {press} {share} {block['block']}",
                    "model": name,
                    **{key: block[key] for key in ("task", "length", "index", "block")},
                    "method": press if share is None else f"kvpress {press}",
                    "budget": "" if share is None else f"{100 * share:g}%",
                    "tokens": length if share is None else round(share * length),
                    "bytes": {"row": held, "shared": 0},
                    "scores": found,
                }
                file.write(json.dumps(line) + "\n")
                file.flush()
                print(f"{block['task']} {block['index']}: {press} {share} {found}", flush=True)


if __name__ == "__main__":
    main()
