"""``python -m bench.serving PART``: step, room, load or storm. All but step want vLLM."""

from __future__ import annotations

import argparse
import importlib
import sys

DEFAULT = '{"tokens": 256}'


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    step = parts.add_parser("step", help="a layer's decode step, at once and one by one")
    step.add_argument("--slots", type=int, default=256)
    step.add_argument("--rounds", type=int, default=200)
    room = parts.add_parser("room", help="sequences that memory holds")
    load = parts.add_parser("load", help="vLLM's benchmark client, with us and without")
    load.add_argument("--prompts", type=int, nargs="+", default=[512, 2048, 4096])
    load.add_argument("--new", type=int, default=128, help="tokens of an answer")
    load.add_argument("--rounds", type=int, default=3)
    storm = parts.add_parser("storm", help="requests of random lengths, some of them cancelled")
    storm.add_argument("--pages", type=int, default=6, help="of the pool: fewer than requests")
    storm.add_argument("--apart", type=float, default=0.05, help="seconds between requests, mean")
    storm.add_argument("--seed", type=int, default=0)
    for part in (room, load, storm):
        part.add_argument("--model", required=True, help="folder")
        part.add_argument("--less", default=DEFAULT, help="settings, as JSON")
        part.add_argument("--dtype", default="bfloat16")
    for part in (room, load):
        part.add_argument("--memory", type=int, default=512, help="MiB of cache")
    for part, requests, threads in ((step, 16, 1), (load, 8, 2), (storm, 500, 1)):
        part.add_argument("--requests", type=int, default=requests)
        part.add_argument("--threads", type=int, default=threads)
    args = parser.parse_args()
    print("python -m bench.serving", *sys.argv[1:], flush=True)
    importlib.import_module(f"bench.serving.{args.part}").run(args)


if __name__ == "__main__":
    main()
