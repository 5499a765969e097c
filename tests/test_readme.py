"""The README's examples, as they stand."""

from pathlib import Path

import pytest
import torch

from less import PageLayout

BLOCKS = (Path(__file__).parent.parent / "README.md").read_text().split("```python\n")[1:]
EXAMPLES = [block.split("```")[0] for block in BLOCKS]


def test_the_decoding_loop_runs(capsys):
    exec(EXAMPLES[1], {})
    assert capsys.readouterr().out.startswith("torch.Size([1, 8, 256]) {'slots': ")


def test_the_rows_of_four_bits_take_no_more_bytes(capsys):
    exec(EXAMPLES[2], {})
    assert 0 < int(capsys.readouterr().out) <= PageLayout(8, 128, 256, torch.float16).nbytes


@pytest.mark.slow
def test_three_lines_around_generate_run(capsys):
    pytest.importorskip("gguf")
    names: dict[str, object] = {}
    exec(EXAMPLES[0], names)
    memory = names["cache"].memory()
    assert memory["slots"] + memory["state"] < memory["full"]
    assert "'full': " in capsys.readouterr().out
