"""``less-kv chat``: talk with a model on one bounded cache, and watch what it holds."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from less.cli import checks, measuring, rows, threads

if TYPE_CHECKING:
    from rich.console import Console

    from less import LessKVCache
    from less.integrations.chat import Chat, Sampling

_COMMANDS = {
    "/reset": "forget the conversation",
    "/stats": "what the cache holds, by layers",
    "/read FILE": "say what is in a file: a long prompt",
    "/help": "these lines",
    "/quit": "leave, as Ctrl-D does",
}
_REFRESH = 0.25  # seconds between two looks at the cache while text streams


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "chat",
        help="talk with a model on one bounded cache",
        description="A conversation in the terminal, streamed, on one cache that never grows. "
        "Ctrl-C stops an answer and keeps what was said. Commands: "
        + "; ".join(f"{name}: {what}" for name, what in _COMMANDS.items())
        + ".",
    )
    measuring.add_model(parser, rows.one)
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--budget", type=measuring.positive, default=256, metavar="C",
        help="tokens kept per head (default: %(default)s)",
    )  # fmt: skip
    budget.add_argument("--bytes", metavar="N", help="in place of it: of slots and state, as 4MiB")
    budget.add_argument("--config", metavar="FOLDER", help="in place of it: of a less_config.json")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "--max-new-tokens", type=measuring.positive, default=256, metavar="N",
        help="of an answer (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--prefill", type=measuring.positive, default=512, metavar="T",
        help="tokens per call while a prompt is read (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy, the default")
    parser.add_argument("--top-p", type=float, default=0.95, help="default: %(default)s")
    parser.add_argument("--seed", type=int, help="of sampling")


def run(args: argparse.Namespace) -> int:
    """Talk until the input ends."""
    needed = {"transformers": "transformers", "rich": "rich"}
    checks.check_packages("less-kv chat", needed)
    from less.evaluate import sources

    if args.config is not None and args.sidekick is not None:
        raise ValueError("--sidekick: the config of --config names one, or none")
    if args.config is not None and args.rows is not None:
        raise ValueError("--rows: the config of --config has them already")
    rows.check(args)
    sources.check_model_name(args.model)
    sources.check_template(args.model)
    checks.check_sidekick(args.sidekick)
    from less.integrations.chat import Sampling

    sampling = Sampling(args.temperature, args.top_p, args.max_new_tokens)
    console = measuring.console_for()
    with _Interrupts() as interrupts:
        chat = _open(args, console, interrupts)
        while (line := _ask(console)) is not None:
            if line.startswith("/read "):
                line = _file(line.removeprefix("/read ").strip(), console)
            elif line.startswith("/"):
                if line in ("/quit", "/exit"):
                    break
                _command(line, chat, console)
                continue
            if line.strip():
                _answer(line, chat, sampling, console, interrupts)
    return 0


def _open(args: argparse.Namespace, console: Console, interrupts: _Interrupts) -> Chat:
    import torch

    from less import LessConfig
    from less.evaluate import assets
    from less.integrations.chat import Chat, check_template

    sidekick = None
    if args.config is not None:
        config = LessConfig.from_pretrained(args.config)
        sidekick = config.load_sidekick()
    else:
        budget = {"tokens": args.budget} if args.bytes is None else {"bytes": args.bytes}
        config = LessConfig(**budget, **rows.settings(args))
    found = assets.find_model(args.model)
    check_template(found.tokenizer, args.system)
    if args.config is None:
        sidekick, _ = measuring.sidekicks_for(args.sidekick, found.config)
    elif sidekick is not None:
        sidekick.check_model(found.config)
    calibration = rows.read_calibration(config.calibration, found.config)
    config.policies(found.skeleton(), sidekick=sidekick)
    threads.set_threads(args, console)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    model = found.load(getattr(torch, args.model_dtype))
    cache = config.cache(model, sidekick=sidekick, calibration=calibration)
    console.print(
        f"{args.model}: {_held(cache)}. /help for commands, Ctrl-D to leave.",
        style="dim", markup=False, soft_wrap=True,
    )  # fmt: skip
    return Chat(model, found.tokenizer, cache, args.system, args.prefill, interrupts.seen)


def _held(cache: LessKVCache) -> str:
    """What a cache takes, in words; it is the same from the first token to the last."""
    from less.dtypes import format_name
    from less.evaluate.report import size

    memory = cache.memory()
    layout = next(x for x in cache.layouts if x is not None)
    text = f"the cache holds {size(memory['slots'] + memory['state'])} from the first token to the "
    text += f"last, rows in {format_name(cache.dtype)}"
    if layout.hot_slots:
        text += (
            f", the first {layout.sinks} and the last {layout.hot} tokens in "
            f"{format_name(layout.hot_dtype)}"
        )
    if cache.sidekick is not None:
        return f"{text}; maps {size(memory['maps'])}"
    weights = f"; means and scales {size(memory['maps'])}" if memory["maps"] else ""
    return f"{text}{weights}; no sidekick: eviction alone"


class _Interrupts:
    """Ctrl-C while the model works is noted, and asked for between two steps.

    So no forward pass is cut in the middle, which would leave some layers ahead of others. A second
    one before the first was heeded interrupts at once.
    """

    def __init__(self) -> None:
        self.working = False
        self._noted = False

    def seen(self) -> bool:
        return self._noted

    def _handle(self, number: int, frame: Any) -> None:
        if not self.working or self._noted:
            raise KeyboardInterrupt
        self._noted = True

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        self._noted, self.working = False, True
        try:
            yield
        finally:
            self._noted, self.working = False, False

    def __enter__(self) -> _Interrupts:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)


def _ask(console: Console) -> str | None:
    """The user's next line; None at the end of the input."""
    while True:
        try:
            if sys.stdin.isatty():
                with contextlib.suppress(ImportError):
                    import readline  # noqa: F401  # arrows and history
                return console.input("[bold cyan]you ▸ [/]")
            line = sys.stdin.readline()
            if not line:
                return None
            console.print("you ▸ " + line.rstrip("\n"), style="cyan", markup=False, soft_wrap=True)
            return line.rstrip("\n")
        except EOFError:
            console.print()
            return None
        except KeyboardInterrupt:
            console.print("\n(Ctrl-D or /quit leaves)", style="dim")


def _file(name: str, console: Console) -> str:
    from less.files import read_text

    try:
        return read_text(Path(name).expanduser())
    except (OSError, ValueError) as error:
        console.print(str(error), style="red", markup=False)
        return ""


def _command(line: str, chat: Chat, console: Console) -> None:
    if line == "/reset":
        chat.reset()
        console.print("forgotten", style="dim")
    elif line == "/stats":
        console.print(_status(chat), markup=False, soft_wrap=True)
        console.print(_stats(chat))
    else:
        if line != "/help":
            console.print(f"no command {line.split()[0]!r}:", style="red", markup=False)
        for name, what in _COMMANDS.items():
            console.print(f"  {name:<12}{what}", markup=False)


def _answer(
    line: str, chat: Chat, sampling: Sampling, console: Console, interrupts: _Interrupts
) -> None:
    """Read the message, stream the answer, and say how the cache stands."""
    from less.evaluate.progress import progress
    from less.integrations.chat import Interrupted

    with interrupts.work(), contextlib.ExitStack() as leave:
        reading: list[Any] = []

        def read(done: int, total: int) -> None:
            if not reading:
                reading.append(leave.enter_context(progress(console, "reading, tokens")))
            reading[0](done, total)
            if done == total:
                leave.close()

        try:
            with _Screen(console, chat) as screen:
                for piece in chat.stream(line, sampling, read):
                    screen.write(piece)
            if interrupts.seen():
                console.print("(stopped)", style="dim")
        except Interrupted:
            leave.close()
            console.print("(taken back: the conversation is as before)", style="dim")
        except KeyboardInterrupt:  # the second one
            leave.close()
            console.print("(interrupted)", style="dim")
        except ValueError as error:
            leave.close()
            console.print(str(error), style="red", markup=False)
    console.print(_status(chat), style="dim", markup=False, soft_wrap=True)


class _Screen:
    """Streams an answer: whole lines go up, the last one stays above a status line.

    Where the output is no terminal, text is written as it comes, without a status.
    """

    def __init__(self, console: Console, chat: Chat) -> None:
        self.console, self.chat = console, chat
        self.line = ""
        self.live: Any = None
        self.status = ""
        self.looked = 0.0

    def __enter__(self) -> _Screen:
        return self

    def write(self, piece: str) -> None:
        if not self.console.is_terminal:
            print(piece, end="", flush=True)
            self.line += piece
            return
        if self.live is None:  # not before the prompt is read: its bar is live too
            from rich.live import Live

            self.live = Live(console=self.console, auto_refresh=False, transient=True)
            self.live.start()
        *whole, self.line = (self.line + piece).split("\n")
        for line in whole:
            self.console.print(line, markup=False)
        now = time.monotonic()
        if now - self.looked >= _REFRESH:
            self.status, self.looked = _status(self.chat), now
        from rich.console import Group
        from rich.text import Text

        self.live.update(Group(Text(self.line), Text(self.status, style="dim")), refresh=True)

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()
            self.console.print(self.line, markup=False)
        elif self.line:
            print(flush=True)


def _status(chat: Chat) -> str:
    """One line: bytes, tokens seen, evictions, the state's part, speed."""
    from less.evaluate.report import size

    memory, stats = chat.cache.memory(), chat.cache.stats()
    layers = chat.cache.layers
    held = memory["slots"] + memory["state"] + memory["native"]
    evicted = sum(stats["evictions"]) / layers
    share = sum(stats["memory_share"]) / layers
    parts = [
        f"{size(held)} held, a full cache {size(memory['full'])}",
        f"{chat.cache.columns:,} tokens seen",
        f"{evicted:,.0f} evicted",
    ]
    if chat.cache.sidekick is not None:
        parts.append(f"{share:.1%} of attention from the state")
    if chat.tokens_per_second:
        parts.append(f"{chat.tokens_per_second:.1f} tok/s")
    return " · ".join(parts)


def _stats(chat: Chat) -> Any:
    """A row per layer."""
    from rich.table import Table

    stats = chat.cache.stats()
    table = Table("layer", "policy")
    for name in ("kept", "evicted", "state's share"):
        table.add_column(name, justify="right")
    above = ""
    for layer, policy in enumerate(chat.cache.policies):
        name = "sliding window" if policy is None else str(policy)
        table.add_row(
            str(layer),
            "" if name == above else name,
            f"{stats['kept'][layer]:,}",
            f"{stats['evictions'][layer]:,}",
            f"{stats['memory_share'][layer]:.1%}",
        )
        above = name
    return table
