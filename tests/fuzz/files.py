"""Damaged files: mutations of what safetensors and JSON files consist of."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

HUGE = [-1, 0, 1, 2, 2**31, 2**63, 2**64, 10**30, 0.5, True, None, "", "../x", [], {}, [[]], "²"]


def raw(of: random.Random, content: bytes) -> bytes:
    """Bytes cut off, put in, exchanged, repeated or appended."""
    at = of.randrange(len(content) + 1)
    way = of.randrange(6)
    if way == 0:
        return content[:at]
    if way == 1:
        return content[:at] + of.randbytes(of.randrange(1, 9)) + content[at:]
    if way == 2 and content:
        at = min(at, len(content) - 1)
        return content[:at] + bytes([content[at] ^ 1 << of.randrange(8)]) + content[at + 1 :]
    if way == 3:
        return content[:at] + content[at + of.randrange(1, 65) :]
    if way == 4:
        return content + of.randbytes(of.randrange(1, 33))
    return of.randbytes(of.randrange(64))


def paths(value: Any) -> list[tuple[Any, ...]]:
    """Where every value of a JSON tree stands."""
    found: list[tuple[Any, ...]] = [()]
    if not isinstance(value, (dict, list)):
        return found
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        found += [(key, *rest) for rest in paths(inner)]
    return found


def changed(of: random.Random, value: Any) -> Any:
    """A JSON tree with one value replaced, removed, renamed or moved a level down."""
    value = json.loads(json.dumps(value))
    path = of.choice([p for p in paths(value) if p] or [()])
    if not path:
        return of.choice(HUGE)
    at = value
    for key in path[:-1]:
        at = at[key]
    key, way = path[-1], of.randrange(4)
    if way == 0:
        at[key] = of.choice(HUGE)
    elif way == 1:
        del at[key]
    elif way == 2 and isinstance(at, dict):
        at[of.choice(["../x", "", str(key) + "x", "__class__", "0" * 40])] = at.pop(key)
    else:
        at[key] = {str(key): at[key]}
    return value


def json_file(of: random.Random, content: bytes) -> bytes:
    """A damaged JSON file."""
    way = of.randrange(7)
    if way == 0:
        return raw(of, content)
    if way == 1:  # a key twice
        text = content.decode()
        head, brace, rest = text.partition("{")
        key = of.choice(list(json.loads(text)))
        return f"{head}{brace}{json.dumps(key)}: {json.dumps(of.choice(HUGE))}, {rest}".encode()
    if way == 2:  # deep
        depth = of.choice([10, 2000, 100_000])
        return b'{"format": ' + b"[" * depth + b"]" * depth + b"}"
    if way == 3:
        return content.replace(b": ", b": " + of.choice([b"NaN, ", b"Infinity", b"1e999"]), 1)
    if way == 4:
        return content.replace(b"1", b"1" * of.choice([50, 5000]), 1)
    tree = json.loads(content)
    for _ in range(of.randrange(1, 4)):
        tree = changed(of, tree) if isinstance(tree, (dict, list)) else tree
    return json.dumps(tree).encode()


def json_lines(of: random.Random, content: bytes) -> bytes:
    """A file of JSON lines of which one is damaged."""
    lines = content.splitlines(keepends=True)
    n = of.randrange(len(lines))
    lines[n] = json_file(of, lines[n].rstrip()).replace(b"\n", b"") + b"\n"
    return b"".join(lines)


def safetensors_file(of: random.Random, content: bytes) -> bytes:
    """A damaged safetensors file: its length, its header, its data."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    way = of.randrange(6)
    if way == 0:
        return raw(of, content)
    if way == 1:
        wrong = of.choice([0, 1, length - 1, length + 8, len(content), 2**31, 2**63, 2**64 - 1])
        return struct.pack("<Q", wrong) + header + data
    if way == 2:
        header = json_file(of, header.rstrip())
    elif way == 3:
        tree = json.loads(header)
        name = of.choice([n for n in tree if n != "__metadata__"])
        entry = tree[name]
        field = of.choice(["dtype", "shape", "data_offsets"])
        if field == "dtype":
            entry[field] = of.choice(["F64", "F16", "I64", "U8", "BOOL", "F8_E4M3", "X"])
        elif field == "shape":
            sizes = [*entry[field], 1]
            sizes[of.randrange(len(sizes))] = of.choice(HUGE)
            entry[field] = of.choice([sizes, sizes[:-1], sizes[::-1]])
        else:
            entry[field][of.randrange(2)] = of.choice([-1, 0, 1, len(data), len(data) + 4, 2**64])
        header = json.dumps(tree).encode()
    elif way == 4:
        tree = json.loads(header)
        names = [n for n in tree if n != "__metadata__"]
        a, b = of.choice(names), of.choice(names)
        tree[a], tree[b] = tree[b], tree[a]
        if of.random() < 0.5:
            tree[of.choice(["../x", "layers.00.k_w1", "layers.99.k_w1", ""])] = tree.pop(a)
        header = json.dumps(tree).encode()
    else:
        return content[: 8 + length] + raw(of, data)
    return struct.pack("<Q", len(header)) + header + data


def not_regular(of: random.Random, path: Path, content: bytes) -> None:
    """In a file's place: a pipe, a device, a folder, a link to nowhere or to itself."""
    way = of.randrange(5)
    path.unlink()
    if way == 0:
        os.mkfifo(path)
    elif way == 1:
        path.symlink_to("/dev/zero")
    elif way == 2:
        path.mkdir()
    elif way == 3:
        path.symlink_to(path.with_name("nowhere"))
    else:
        path.symlink_to(path)


def restore(path: Path, content: bytes) -> None:
    """The file as it was."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    path.write_bytes(content)


MUTATIONS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    ".json": json_file,
    ".jsonl": json_lines,
    ".safetensors": safetensors_file,
    ".txt": raw,
}
