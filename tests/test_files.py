"""Files are written whole or not at all, and read only where reading ends."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from less import files

PRODUCT = Path(files.__file__).parent
#: What writes a file, as a method or as a function's name.
WRITERS = {"write_text", "write_bytes", "savefig", "save_file", "touch"}
#: Who may: the helper itself; a log that grows by whole lines; a model's conversion, which writes
#: into a folder of its own and renames that; and /proc.
ALLOWED = {"files.py", "evaluate/assets.py", "evaluate/machine.py"}


def test_everything_is_written_by_one_helper() -> None:
    found = []
    for path in PRODUCT.rglob("*.py"):
        name = path.relative_to(PRODUCT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
            opened = node.func.attr == "open" and any(
                isinstance(m, str) and set(m) & set("wx+") for m in modes
            )
            if opened or node.func.attr in WRITERS:
                found.append((name, node.lineno, node.func.attr))
    # A lambda that write_whole calls with its own file is the helper's work.
    found = [x for x in found if x[2] != "savefig"]
    assert [x for x in found if x[0] not in ALLOWED] == []


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_whole(path, "old")

    def half(part: Path) -> None:
        part.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        files.write_whole(path, half)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(FileNotFoundError):
        files.write_whole(tmp_path / "nowhere" / "a", "x")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="NO /dev/full")
def test_a_full_disk_is_an_error_that_names_it(tmp_path: Path) -> None:
    link = tmp_path / "full"
    link.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        files.write_whole(link, "x")
    assert link.is_symlink()


def test_a_device_is_written_and_not_replaced(tmp_path: Path) -> None:
    before = os.stat(os.devnull)
    files.write_whole(Path(os.devnull), "x")
    after = os.stat(os.devnull)
    assert (before.st_mode, before.st_rdev) == (after.st_mode, after.st_rdev)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    link.symlink_to(real)
    files.write_whole(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"


def test_somebody_elses_link_is_not_followed(tmp_path: Path, monkeypatch: object) -> None:
    """Whoever can write into the folder could otherwise have any file of the user's overwritten."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    part = files._parts.__reduce__()[1][0]  # the next number
    (tmp_path / f".a.{os.getpid()}.{part}").symlink_to(victim)
    with pytest.raises(FileExistsError):
        files.write_whole(tmp_path / "a", "x")
    assert victim.read_text() == "mine"


def test_two_threads_may_write_one_file(tmp_path: Path) -> None:
    path, wrong = tmp_path / "a", []
    texts = ["a" * 100_000, "b" * 100_000]

    def write(text: str) -> None:
        for _ in range(30):
            try:
                files.write_whole(path, text)
                if path.read_text() not in texts:
                    wrong.append("half")
            except OSError as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert os.listdir(tmp_path) == ["a"]


def test_a_kill_while_writing_leaves_one_of_the_files_whole(tmp_path: Path) -> None:
    # less.files imports neither torch nor the package's other modules.
    program = (
        "import sys, importlib.util, pathlib\n"
        f"spec = importlib.util.spec_from_file_location('files', {files.__file__!r})\n"
        "files = importlib.util.module_from_spec(spec); spec.loader.exec_module(files)\n"
        "n = 0\n"
        "while True:\n"
        "    n += 1\n"
        "    files.write_whole(pathlib.Path(sys.argv[1]), str(n % 10) * 300_000)\n"
        "    print(n, flush=True)\n"
    )
    path = tmp_path / "a"
    for wait in (0.0, 0.003, 0.011):
        with subprocess.Popen(
            [sys.executable, "-c", program, path], stdout=subprocess.PIPE
        ) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(wait)
            child.send_signal(signal.SIGKILL)
        text = path.read_text()
        assert len(text) == 300_000
        assert set(text) == {text[0]}


JSON = [
    (b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
    (b'{"a": NaN}', "NaN is no number"),
    (b'{"a": [Infinity]}', "Infinity is no number"),
    (b'{"a": ' + b"[" * 100_000, "too many levels"),
    (b'{"a": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
    (b'{"a": "\xff"}', "codec can't decode"),
    (b'{"a"', "truncated or not JSON"),
]


@pytest.mark.parametrize(("text", "message"), JSON, ids=[m for _, m in JSON])
def test_what_is_not_plain_json_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=f"^reader: .*{message}"):
        files.read_json("reader", path)


def test_a_file_that_never_ends_is_not_begun(tmp_path: Path) -> None:
    pipe, zero, large = tmp_path / "pipe", tmp_path / "zero", tmp_path / "large"
    os.mkfifo(pipe)
    zero.symlink_to("/dev/zero")
    large.write_bytes(b" " * 101)
    for path in (pipe, zero):
        with pytest.raises(ValueError, match="must be a regular file"):
            files.read_json("reader", path)
        with pytest.raises(ValueError, match=f"text: {path}: must be a regular file"):
            files.read_text(path)
    with pytest.raises(ValueError, match="reader: must have at most 100 bytes, got 101"):
        files.read_json("reader", large, most=100)
