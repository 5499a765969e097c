"""Real weights: a batch as its texts alone, and a prompt far longer than the budget."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("transformers")

import less.hf
from less import H2O, Sidekick
from less.evaluate import assets
from less.sidekick import shipped, shipped_names

pytestmark = pytest.mark.slow

PROMPTS = [
    "The capital of France is",
    "Water boils at a hundred degrees, and ice melts at",
    "Once upon a time there was a fox who",
    "A list of all the planets, beginning with the one that is nearest to the sun:",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "In the year 1969 the first men walked on the moon. They came back with stones and dust, and",
    "To bake bread you need flour, water, salt and yeast. Mix the flour with the salt first. Then "
    "stir the yeast into lukewarm water and wait until it foams. After that",
    "Dear Sir or Madam, I am writing to you about the parcel that I ordered three weeks ago. It "
    "has not arrived, although the shop told me that it had been sent on the same day. I have "
    "called your office twice; both times I was told to wait a little longer. I would like to",
]


@pytest.fixture(scope="module")
def smollm2():
    try:
        return assets.load_model()
    except assets.AssetError as error:
        pytest.skip(str(error))


def test_eight_padded_prompts_give_the_text_of_each_alone(smollm2):
    model, tokenizer = smollm2
    sidekick = Sidekick.from_pretrained(shipped(shipped_names()[0]))
    policy = H2O(heavy=8, recent=8)
    tokenizer.padding_side = "left"
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    lengths = inputs["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) == len(PROMPTS)
    options = {"max_new_tokens": 24, "do_sample": False}
    cache = less.hf.cache_for(model, policy, sidekick, batch=len(PROMPTS))
    with less.hf.attach(model, cache):
        together = model.generate(**inputs, past_key_values=cache, **options)
    assert min(cache.stats()["evictions"]) > 100
    for i, length in enumerate(lengths):
        ids = inputs["input_ids"][i : i + 1, -length:]
        alone = less.hf.cache_for(model, policy, sidekick)
        with less.hf.attach(model, alone):
            want = model.generate(ids, past_key_values=alone, **options)[0, length:].tolist()
        got = together[i, inputs["input_ids"].shape[1] :].tolist()
        assert got[: len(want)] == want, tokenizer.decode(got)
        assert set(got[len(want) :]) <= {tokenizer.pad_token_id}  # it had finished before others


MEASURE = """
import json, resource, sys, torch
import less.hf
from less import H2O, Sidekick
from less.evaluate import assets
from less.sidekick import shipped, shipped_names

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

model, tokenizer = assets.load_model()
sidekick = Sidekick.from_pretrained(shipped(shipped_names()[0]))
text = sys.argv[1] + chr(10)
ids = tokenizer(text, return_tensors="pt")["input_ids"]
ids = ids.repeat(1, 6000 // ids.shape[1] + 1)[:, :6000]
cache = less.hf.cache_for(model, H2O(heavy=128, recent=128), sidekick)
empty = cache.memory()
peaks = []
for length in (1024, 6000):
    cache.reset()
    with less.hf.attach(model, cache):
        model.generate(ids[:, :length], past_key_values=cache, prefill_chunk_size=512,
                       max_new_tokens=2, do_sample=False)
    peaks.append(peak())
print(json.dumps({"peaks": peaks, "empty": empty, "after": cache.memory(),
                  "seen": cache.seen.tolist(), "kept": cache.stats()["kept"]}))
"""


def test_a_prompt_of_6000_tokens_in_chunks_takes_the_memory_of_slots_and_state(smollm2):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, "\n".join(PROMPTS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    assert got["seen"] == [6001]
    assert set(got["kept"]) == {256}
    full = got["after"].pop("full")
    assert full == 6001 * 30 * 2 * 3 * 64 * 4
    del got["empty"]["full"]
    assert got["after"] == got["empty"]  # what was allocated at the start, and no more
    # And no more of the process: from 1,024 tokens on it grew by a fraction of what a full cache
    # of the others would have taken, 229 MB.
    grown = got["peaks"][1] - got["peaks"][0]
    assert grown < full / 10, f"{grown / 1e6:.0f} MB for 4,976 tokens more"
