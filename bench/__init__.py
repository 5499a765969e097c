"""Timings: ``python -m bench.run`` for each op, ``make bench`` for a step against its rivals."""
