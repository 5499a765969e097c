"""A cache of any rows, simulated: what it would lose, before a kernel for it exists."""
