"""Barriers, fences, asynchronous copies, dependent launch."""

from __future__ import annotations

from ..operation import Operation
from .registry import family


@family("bar", "barrier")
def bar(x: Operation) -> str:
    if x.flag("cluster"):
        return _cluster(x)
    x.skip("aligned", "cta")
    if x.flag("warp"):
        x.need("sync")
        x.expect(1)
        return f"warp_sync({x.value(0, 'u32')}, {x.at});"
    what = x.need("sync", "arrive", "red")
    if what == "red":
        return _reduce(x)
    x.expect(1, 2)
    threads = x.value(1, "s32") if len(x.operands) == 2 else "0"
    call = "block_sync" if what == "sync" else "block_arrive"
    return f"{call}({x.value(0, 's32')}, {threads}, {x.at});"


def _cluster(x: Operation) -> str:
    x.expect(0)
    x.skip("aligned")
    if x.need("arrive", "wait") == "arrive":
        order = x.one_of("release", "relaxed")
        return f"cluster_arrive({'true' if order == 'relaxed' else 'false'}, {x.at});"
    x.skip("acquire")
    return f"cluster_wait({x.at});"


def _reduce(x: Operation) -> str:
    """Count how many of the block's threads, or tell whether all or any, have the predicate."""
    x.expect(3, 4)
    name = x.need("popc", "and", "or")
    kind = x.type()
    threads = x.value(2, "s32") if len(x.operands) == 4 else "0"
    vote = {"popc": "count", "and": "all", "or": "any"}[name]
    predicate = x.value(len(x.operands) - 1, "pred")
    call = f"block_barrier({x.value(1, 's32')}, {threads}, {predicate}, Vote::{vote}, {x.at})"
    return x.assign(0, call, kind)


@family("membar", "fence")
def fence(x: Operation) -> str:
    x.expect(0)
    if x.flag("mbarrier_init"):
        x.need("release")
        x.need("cluster")
        return "mbarrier_fence_init();"
    if x.flag("proxy"):
        x.need("async")
        x.skip("global", "shared::cta", "shared::cluster")
        return "fence(false);"
    x.skip("sc", "acq_rel")
    scope = x.need("gl", "gpu", "sys", "cta", "cluster")
    return f"fence({'true' if scope in ('gl', 'gpu', 'sys') else 'false'});"


@family("griddepcontrol")
def griddepcontrol(x: Operation) -> str:
    x.expect(0)
    if x.need("wait", "launch_dependents") == "wait":
        return f"grid_dependency_wait({x.at});"
    return f"grid_launch_dependents({x.at});"


@family("nanosleep")
def nanosleep(x: Operation) -> str:
    x.expect(1)
    x.type()
    return "maybe_preempt();"


@family("setmaxnreg")
def setmaxnreg(x: Operation) -> str:
    """Registers are as many as the host has."""
    x.skip("inc", "dec", "sync", "aligned")
    x.type()
    return ";"


def _bar(x: Operation, operand: int) -> str:
    return f"(uint64_t*){x.address(operand, 'shared')}"


@family("mbarrier")
def mbarrier(x: Operation) -> str:
    what = x.need("init", "inval", "arrive", "try_wait", "test_wait")
    x.space()
    x.need("b64")
    if what == "init":
        x.expect(2)
        return f"mbarrier_init({_bar(x, 0)}, {x.value(1, 'u32')}, {x.at});"
    if what == "inval":
        x.expect(1)
        return ";"
    if what == "arrive":
        x.skip("release", "cta")
        if x.flag("expect_tx"):
            x.expect(3)
            arrive = f"mbarrier_arrive({_bar(x, 1)}, {x.value(2, 'u32')}, {x.at});"
        else:
            x.expect(2)
            arrive = f"mbarrier_arrive({_bar(x, 1)}, 0, {x.at});"
        if x.operands[0] == "_":
            return arrive
        return f"{arrive} {x.assign(0, '0', 'b64')}"  # waits go by parity, never by state
    # A wait that may give up never does here: it returns when the phase is over.
    x.skip("acquire", "cta")
    x.need("parity")
    x.expect(3, 4)
    wait = f"mbarrier_wait({_bar(x, 1)}, {x.value(2, 'u32')}, {x.at});"
    return f"{wait} {x.assign(0, 'true', 'pred')}"


@family("cp")
def cp(x: Operation) -> str:
    x.need("async")
    if x.flag("bulk"):
        return _bulk(x)
    if x.flag("commit_group"):
        x.expect(0)
        return "copy_async_commit();"
    if x.flag("wait_all"):
        x.expect(0)
        return f"copy_async_commit(); copy_async_wait(0, {x.at});"
    if x.flag("wait_group"):
        x.expect(1)
        return f"copy_async_wait({x.value(0, 's32')}, {x.at});"
    x.need("ca", "cg")
    for name in ("shared", "shared::cta"):
        if x.flag(name):
            break
    else:
        raise x.fail("wanted .shared")
    x.need("global")
    x.skip("L2::64B", "L2::128B", "L2::256B")
    if x.flag("L2::cache_hint"):
        x.operands.pop()
    x.expect(3, 4)
    bytes_ = x.value(2, "u32")
    read = bytes_
    if len(x.operands) == 4:  # bytes that are read, or a predicate to read none
        last = x.operands[3].lstrip("!")
        if x.function.registers.get(last) == "pred":
            read = f"({x.value(3, 'pred')} ? 0u : {bytes_})"
        else:
            read = x.value(3, "u32")
    to, source = x.address(0, "shared"), x.address(1, "global")
    return f"copy_async({to}, {source}, {bytes_}, {read}, {x.at});"


def _bulk(x: Operation) -> str:
    if x.flag("prefetch"):
        x.skip("L2", "global", "L2::cache_hint")
        return ";"
    x.need("shared::cluster", "shared::cta")
    x.need("global")
    x.need("mbarrier::complete_tx::bytes")
    if x.flag("L2::cache_hint"):
        x.operands.pop()
    x.expect(4)
    to, source = x.address(0, "shared"), x.address(1, "global")
    return f"bulk_copy({to}, {source}, {x.value(2, 'u32')}, {_bar(x, 3)}, {x.at});"
