"""The table of methods at equal bytes, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import memory
from less import Calibration
from tests.tiny_model import TEXT, save_tiny, tiny_calibration, tiny_sidekick


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    """A model, a text, a calibration whose heads differ, and a sidekick, by option."""
    found = {name: tmp_path / name for name in ("model", "text", "calibration", "sidekick")}
    save_tiny(found["model"])
    found["text"].write_text(TEXT * 30)
    plain = tiny_calibration()
    layers = [
        {**layer, "curve": torch.tensor([[9.0, 3.0, 1.0], [0.9, 0.3, 0.1]])}
        for i in range(2)
        for layer in [plain[i]]
    ]
    calibration = Calibration(layers, plain.config, capacities=(32, 64, 128), length=256)
    calibration.save_pretrained(found["calibration"])
    tiny_sidekick(hidden=2).save_pretrained(found["sidekick"])
    return {f"--{name}": str(path) for name, path in found.items()}


def test_no_method_takes_more_bytes_than_plain_h2o(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for pair in folders.items() for word in pair]
    words += ["--length", "140", "--chunks", "2", "--copy", "2", "--tokens", "60"]
    memory.main([*words, "--model-dtype", "float32"])
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    assert {len(line) for line in lines} == {7}
    _, _, full, plain, *others = lines
    assert float(full[6]) > 1
    assert float(plain[2]) == 60
    assert float(plain[5].split("±")[0]) == 0
    room = int(plain[3].replace(",", ""))
    assert len({row[1] for row in others}) == 4
    for row in others:
        assert 0.8 * room < int(row[3].replace(",", "")) <= room
        assert float(row[2]) > 60
    memory.main([*words, "--model-dtype", "float32", "--only", "fold"])
    again = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[3:]]
    folds = next(row for row in others if row[1].strip().startswith("fold"))
    assert [row[:4] for row in again] == [plain[:4], folds[:4]]
