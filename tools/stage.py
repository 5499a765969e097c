"""Runs a long stage of make's and shows what it does and the time left, on a terminal or in a log.

    python tools/stage.py "2/3 packages and kernels" 100 "pip install ..." "python setup.py ..."

Several commands run at the same time. A line every few seconds has the time left: of a command that
counts its steps, as Ninja does with [3/40], by its count, else by the seconds that the stage takes
on two idle cores. What the commands say is shown where one fails; besides that only the lines of
less's own build ("-- less: CUDA off ...").

It needs nothing but Python, because it runs before any package is installed.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

EVERY = 10.0  # seconds between two lines
COUNTED = re.compile(r"^\[(\d+)/(\d+)\] (?!Re-checking)")
OURS = "-- less: "
# What a line tells of a command that counts nothing.
DOING = (
    (re.compile(r"^Collecting ([\w.-]+)"), "fetching {}"),
    (re.compile(r"^Installing collected packages"), "installing packages"),
    (re.compile(r"^Converting and de-quantizing"), "converting the model"),
)


class Command:
    """A shell command at work; a thread of its own reads what it says."""

    def __init__(self, line: str) -> None:
        """Start it, without make's flags: its job slots are not ours; variables are exported."""
        env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
        self.line, self.doing, self.part = line, "", 0.0
        self.said: list[str] = []
        self.process = subprocess.Popen(
            line, shell=True, env=env, text=True, errors="replace", start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for said in self.process.stdout:
            self.said.append(said)
            line = said.strip()
            counted = COUNTED.match(line)
            if counted:
                done, of = int(counted[1]), int(counted[2])
                self.part, self.doing = done / of, f"step {done} of {of} of the build"
            elif line.startswith(OURS):
                print(f"  {line.removeprefix('-- ')}", flush=True)
            for pattern, words in DOING:
                found = pattern.match(line)
                if found:
                    self.doing = words.format(*found.groups())

    def end(self) -> None:
        """End it and what it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, after at most so long."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        self.reader.join(5)
        return True


def seconds_left(part: float, passed: float, usual: float) -> float:
    """Seconds that a command has left.

    Args:
        part: Of its counted steps done, 0 where it has not counted.
        passed: Seconds since its begin.
        usual: Seconds that it usually takes.
    """
    whole = max(usual, passed)
    if part > 0.0:
        trust = min(1.0, part / 0.3)  # the first steps tell little
        whole = trust * passed / part + (1 - trust) * whole
    return whole - passed


def in_words(seconds: float) -> str:
    """Seconds in words: "about 2 min 10 s left"."""
    if seconds < 5:
        return "a few seconds left, or longer than usual"
    minutes, rest = divmod(5 * round(seconds / 5), 60)
    return "about " + " ".join(
        [f"{minutes} min"] * bool(minutes) + [f"{rest} s"] * bool(rest)
    ) + " left"  # fmt: skip


def run(title: str, usual: float, lines: Sequence[str]) -> int:
    """Run the commands side by side; the exit status of the first that failed, else 0."""
    print(f"{title}: {in_words(usual)}", flush=True)
    start = time.monotonic()
    running = [Command(line) for line in lines]
    try:
        return _follow(title, usual, running, start)
    finally:
        for command in running:
            command.end()


def _follow(title: str, usual: float, commands: Sequence[Command], start: float) -> int:
    shown = start
    running = list(commands)
    while running:
        for command in list(running):
            if not command.wait(0.2):
                continue
            running.remove(command)
            if command.process.returncode:
                print(f"{title}: `{command.line}` failed; it said:\n", file=sys.stderr)
                print("".join(command.said), file=sys.stderr, flush=True)
                return command.process.returncode
        now = time.monotonic()
        if running and now - shown >= EVERY:
            shown = now
            left = max(seconds_left(x.part, now - start, usual) for x in running)
            doing = "; ".join(x.doing for x in running if x.doing)
            print(f"{title}: {in_words(left)}{f' ({doing})' if doing else ''}", flush=True)
    print(f"{title}: done in {time.monotonic() - start:.0f} s", flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="stage", description=__doc__.splitlines()[0])
    parser.add_argument("title", help='such as "2/3 packages and kernels"')
    parser.add_argument("seconds", type=float, help="that it usually takes on two idle cores")
    parser.add_argument("commands", nargs="+", help="shell commands, run at the same time")
    args = parser.parse_args(argv)
    try:
        return run(args.title, args.seconds, args.commands)
    except KeyboardInterrupt:
        print(f"\n{args.title}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
