"""Loops of a program that has only jumps.

A backward jump alone makes no loop: compilers move rare code to the end and jump back from there.
A loop is what a jump to a dominator closes: its head, and all that reaches the jump without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set


def natural_loops(
    addresses: Sequence[int], jumps: Mapping[int, Sequence[int]], ends: Set[int]
) -> list[frozenset[int]]:
    """The loops, each as the addresses in it; those that share a head are one.

    Args:
        addresses: Of the instructions, in order.
        jumps: Where each may jump to.
        ends: Instructions that the next one does not follow.
    """
    blocks = _blocks(addresses, jumps, ends)
    block_of = {address: i for i, block in enumerate(blocks) for address in block}
    after: list[list[int]] = []
    for i, block in enumerate(blocks):
        targets = [block_of[to] for to in jumps.get(block[-1], ())]
        if block[-1] not in ends and i + 1 < len(blocks):
            targets.append(i + 1)
        after.append(targets)
    before: list[list[int]] = [[] for _ in blocks]
    for i, targets in enumerate(after):
        for to in targets:
            before[to].append(i)
    dominators = _dominators(after, before)
    loops: dict[int, set[int]] = {}
    for i, targets in enumerate(after):
        for head in targets:
            if head in dominators.get(i, ()):
                loops.setdefault(head, set()).update(_body(head, i, before))
    return [frozenset(address for i in body for address in blocks[i]) for body in loops.values()]


def _blocks(
    addresses: Sequence[int], jumps: Mapping[int, Sequence[int]], ends: Set[int]
) -> list[list[int]]:
    """Runs of instructions that are entered at the first and left after the last."""
    heads = {to for targets in jumps.values() for to in targets}
    blocks: list[list[int]] = []
    new = True
    for address in addresses:
        if new or address in heads:
            blocks.append([])
        blocks[-1].append(address)
        new = bool(jumps.get(address)) or address in ends
    return blocks


def _dominators(
    after: Sequence[Sequence[int]], before: Sequence[Sequence[int]]
) -> dict[int, set[int]]:
    """For each block that can be reached, those that every way to it passes."""
    order: list[int] = []
    seen = {0} if after else set()
    stack = [(0, iter(after[0]))] if after else []
    while stack:
        at, rest = stack[-1]
        to = next((one for one in rest if one not in seen), None)
        if to is None:
            order.append(at)
            stack.pop()
        else:
            seen.add(to)
            stack.append((to, iter(after[to])))
    order.reverse()
    dominators: dict[int, set[int]] = {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            known = [dominators[one] for one in before[block] if one in dominators]
            new = set.intersection(*known) | {block}
            if dominators.get(block) != new:
                dominators[block] = new
                changed = True
    return dominators


def _body(head: int, jump: int, before: Sequence[Sequence[int]]) -> set[int]:
    body, stack = {head}, [jump]
    while stack:
        at = stack.pop()
        if at not in body:
            body.add(at)
            stack.extend(before[at])
    return body
