"""Timings: ``python -m bench.run`` for each op, ``make bench`` for a step against its rivals."""

from __future__ import annotations

import os

# Before anything loads torch: threads that spin while they wait for one whose core another program
# has make two of them many times slower than one (less/cli/threads.py).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
