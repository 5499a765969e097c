"""The PTX tier's memory, warps, barriers, copies and calls; and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .ptx_program import Program, entry, module, ptx2cpp

ARRAYS = {"in": "u64", "out": "u64"}
# %w8 becomes the thread's offset in arrays of u32, and %in and %out point at its elements.
MINE = "mul.wide.u32 %w8, %tid, 4; add.s64 %in, %in, %w8; add.s64 %out, %out, %w8;\n"
LOAD = MINE + "ld.global.u32 %a1, [%in];\n"
STORE = "st.global.u32 [%out], %a2;"

KERNELS = {
    # memory
    "vectors": entry("vectors", ARRAYS, """
        mul.wide.u32 %w8, %tid, 16; add.s64 %in, %in, %w8; add.s64 %out, %out, %w8;
        ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {%a1, %a2, %a3, %a4}, [%in];
        st.global.cs.v2.b32 [%out], {%a4, %a3};
        st.global.b64 [%out+8], %w8;
        st.global.b16 [%out+8], 7;"""),
    "narrow": entry("narrow", ARRAYS, MINE + """
        ld.global.s8 %h1, [%in]; cvt.s32.s16 %a1, %h1;
        ld.global.u8 %a2, [%in+1]; ld.global.s16 %a3, [%in+2];
        add.s32 %a1, %a1, %a2; add.s32 %a2, %a1, %a3;""" + STORE),
    "local": entry("local", ARRAYS, """
        .local .align 16 .b8 depot[64];
        .reg .b64 %SP, %SPL;
        mov.u64 %SPL, depot; cvta.local.u64 %SP, %SPL;""" + LOAD + """
        st.local.v2.u32 [depot+8], {%a1, 5};
        add.u64 %w1, %SPL, 8; ld.local.u32 %a2, [%w1];
        ld.u32 %a3, [%SP+12]; add.s32 %a2, %a2, %a3;""" + STORE),
    "constant": entry("constant", ARRAYS, LOAD + """
        mov.u64 %w1, table; and.b32 %a3, %a1, 3; mul.wide.u32 %w2, %a3, 4; add.s64 %w1, %w1, %w2;
        ld.const.u32 %a2, [%w1]; ld.const.u32 %a3, [table+4]; add.u32 %a2, %a2, %a3;""" + STORE),
    "by_value": entry("by_value", {"out": "u64"}, """
        mul.wide.u32 %w8, %tid, 4; add.s64 %out, %out, %w8;
        ld.param.v2.u32 {%a1, %a3}, [by_value_s+8]; ld.param.u8 %a4, [by_value_s];
        add.u32 %a2, %a1, %a3; add.u32 %a2, %a2, %a4;""" + STORE).replace(
        "by_value_out)", "by_value_out, .param .align 8 .b8 by_value_s[24])"),
    "generic": entry("generic", ARRAYS, """
        .shared .align 16 .b8 here[128];""" + LOAD + """
        mul.wide.u32 %w1, %tid, 4; mov.u64 %w2, here; cvta.shared.u64 %w3, %w2;
        add.s64 %w1, %w1, %w3; st.u32 [%w1], %a1; bar.warp.sync 0xffffffff;
        cvta.to.shared.u64 %w4, %w1; cvt.u32.u64 %a3, %w4; xor.b32 %a3, %a3, 4;
        ld.shared.u32 %a2, [%a3];""" + STORE),
    "atomics": entry("atomics", ARRAYS, """
        atom.global.add.u32 %a1, [%out], 2; red.relaxed.gpu.global.max.s32 [%out+4], %tid;
        atom.acq_rel.gpu.global.inc.u32 %a3, [%out+8], 9;
        atom.global.cas.b32 %a4, [%out+12], 0, 77; atom.global.add.f32 %a5, [%out+16], 0f3F800000;
        atom.global.exch.b32 %a6, [%out+20], 5; red.global.or.b32 [%out+24], %tid;
        atom.global.add.u64 %w1, [%out+32], 4294967296;"""),
    # control
    "loop": entry("loop", ARRAYS, LOAD + """
        mov.u32 %a2, 0;
        $again: setp.eq.u32 %p1, %a1, 0; @%p1 bra $done;
        add.u32 %a2, %a2, %a1; sub.u32 %a1, %a1, 1; bra.uni $again;
        $done:""" + STORE),
    "scopes": entry("scopes", ARRAYS, LOAD + """
        {.reg .pred p; .reg .b32 t; setp.gt.u32 p, %a1, 9; @p bra L; mov.b32 t, 1; bra M;
         L: mov.b32 t, 2; M: mov.b32 %a2, t;}
        {.reg .pred p; .reg .b32 t; setp.gt.u32 p, %a1, 5; @!p bra L; add.u32 %a2, %a2, 10; L: }
        """ + STORE),
    "table": entry("table_jump", ARRAYS, LOAD + """
        $T: .branchtargets $A, $B, $C;
        brx.idx %a1, $T;
        $A: mov.u32 %a2, 10; bra $E;
        $B: mov.u32 %a2, 20; bra $E;
        $C: mov.u32 %a2, 30;
        $E:""" + STORE),
    "call": entry("calls", ARRAYS, LOAD + """
        { .param .b32 p0; .param .align 8 .b8 p1[16]; .param .b32 r0;
          st.param.b32 [p0], %a1; st.param.v2.b32 [p1+8], {3, 4};
          call.uni (r0), combine, (p0, p1); ld.param.b32 %a2, [r0]; }
        """ + STORE),
    # warps
    "shuffles": entry("shuffles", ARRAYS, LOAD + """
        shfl.sync.up.b32 %a2|%p1, %a1, 3, 0, -1; st.global.u32 [%out], %a2;
        shfl.sync.down.b32 %a2, %a1, 3, 31, 0xffffffff; st.global.u32 [%out+128], %a2;
        shfl.sync.bfly.b32 %a2, %a1, 5, 31, -1; st.global.u32 [%out+256], %a2;
        shfl.sync.idx.b32 %a2, %a1, 9, 0x181f, -1; st.global.u32 [%out+384], %a2;
        selp.u32 %a3, 1, 0, %p1; st.global.u32 [%out+512], %a3;"""),
    "votes": entry("votes", ARRAYS, LOAD + """
        setp.gt.u32 %p1, %a1, 20; vote.sync.ballot.b32 %a2, %p1, -1; st.global.u32 [%out], %a2;
        vote.sync.any.pred %p2, %p1, -1; selp.u32 %a2, 1, 0, %p2; st.global.u32 [%out+128], %a2;
        vote.sync.all.pred %p2, !%p1, -1; selp.u32 %a2, 1, 0, %p2; st.global.u32 [%out+256], %a2;
        vote.sync.uni.pred %p2, %p1, -1; selp.u32 %a2, 1, 0, %p2;
        st.global.u32 [%out+384], %a2;"""),
    "matches": entry("matches", ARRAYS, LOAD + """
        and.b32 %a3, %a1, 3; match.any.sync.b32 %a2, %a3, -1; st.global.u32 [%out], %a2;
        match.all.sync.b32 %a2|%p1, %a3, -1; st.global.u32 [%out+128], %a2;
        redux.sync.add.s32 %a2, %a1, -1; st.global.u32 [%out+256], %a2;
        redux.sync.min.u32 %a2, %a1, -1; st.global.u32 [%out+384], %a2;
        redux.sync.xor.b32 %a2, %a1, -1; st.global.u32 [%out+512], %a2;
        elect.sync %a3|%p1, 0xffffffff; selp.u32 %a2, 1, 0, %p1; st.global.u32 [%out+640], %a2;"""),
    "product": entry("product", ARRAYS, """
        .extern_shared_placeholder
        mul.wide.u32 %w8, %tid, 16; add.s64 %in, %in, %w8; mov.u32 %a8, dynamic;
        shl.b32 %a7, %tid, 4; add.u32 %a8, %a8, %a7;
        ld.global.v4.b32 {%a1, %a2, %a3, %a4}, [%in]; st.shared.v4.b32 [%a8], {%a1, %a2, %a3, %a4};
        setp.gt.u32 %p1, %tid, 15; @%p1 bra $wait;
        ld.global.v4.b32 {%a1, %a2, %a3, %a4}, [%in+512];
        st.shared.v4.b32 [%a8+512], {%a1, %a2, %a3, %a4};
        $wait: bar.warp.sync -1;
        .reg .b32 %x<4>, %y<2>, %d<4>;
        // lane l brings row l%16 of a, from column 8*(l/16) on
        mov.u32 %a8, dynamic; and.b32 %a1, %tid, 15; shl.b32 %a1, %a1, 5; shr.u32 %a2, %tid, 4;
        shl.b32 %a2, %a2, 4; add.u32 %a3, %a8, %a1; add.u32 %a3, %a3, %a2;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%x0, %x1, %x2, %x3}, [%a3];
        // b has rows of 8 halves: lane l brings row l%16
        and.b32 %a1, %tid, 15; shl.b32 %a1, %a1, 4; add.u32 %a3, %a8, %a1;
        ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%y0, %y1}, [%a3+512];
        mma.sync.aligned.m16n8k16.row.col.f32.TYPE.TYPE.f32 {%d0, %d1, %d2, %d3},
          {%x0, %x1, %x2, %x3}, {%y0, %y1}, {0f3F000000, 0f3F000000, 0f3F000000, 0f3F000000};
        // rows tid/4 and tid/4+8, columns 2*(tid%4) and the next
        shr.u32 %a1, %tid, 2; shl.b32 %a1, %a1, 5; and.b32 %a2, %tid, 3; shl.b32 %a2, %a2, 3;
        add.u32 %a1, %a1, %a2; cvt.u64.u32 %w1, %a1; add.s64 %out, %out, %w1;
        st.global.v2.b32 [%out], {%d0, %d1}; st.global.v2.b32 [%out+256], {%d2, %d3};"""
        ).replace(".extern_shared_placeholder", ""),
    "product_s8": entry("product_s8", ARRAYS, """
        .reg .b32 %x<4>, %y<2>, %d<4>;
        // four bytes from row tid/4, column 4*(tid%4) on, of rows of 32 bytes; so of d
        shr.u32 %a1, %tid, 2; shl.b32 %a1, %a1, 5; and.b32 %a2, %tid, 3; shl.b32 %a3, %a2, 2;
        add.u32 %a3, %a3, %a1; cvt.u64.u32 %w1, %a3; add.s64 %in, %in, %w1;
        ld.global.u32 %x0, [%in]; ld.global.u32 %x1, [%in+256];
        ld.global.u32 %x2, [%in+16]; ld.global.u32 %x3, [%in+272];
        ld.global.u32 %y0, [%in+512]; ld.global.u32 %y1, [%in+528];
        mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%d0, %d1, %d2, %d3},
          {%x0, %x1, %x2, %x3}, {%y0, %y1}, {7, 7, 7, 7};
        shl.b32 %a2, %a2, 3; add.u32 %a1, %a1, %a2; cvt.u64.u32 %w1, %a1; add.s64 %out, %out, %w1;
        st.global.v2.b32 [%out], {%d0, %d1}; st.global.v2.b32 [%out+256], {%d2, %d3};"""),
    # clocks
    "chase": entry("chase", ARRAYS, """
        ld.global.u64 %w1, [%in]; add.s64 %w2, %in, %w1;
        ld.global.u64 %w3, [%w2]; add.s64 %w4, %in, %w3;
        ld.global.u64 %w5, [%w4]; st.global.u64 [%out], %w5;"""),
    "side_by_side": entry("side_by_side", ARRAYS, """
        ld.global.u64 %w1, [%in]; ld.global.u64 %w2, [%in+64]; ld.global.u64 %w3, [%in+128];
        add.s64 %w4, %w1, %w2; add.s64 %w5, %w4, %w3; st.global.u64 [%out], %w5;"""),
    "met": entry("met", ARRAYS, """
        .shared .align 16 .b8 copied[16];
        setp.ge.u32 %p1, %tid, 32; @%p1 bra $meet;
        mov.u32 %a1, copied; setp.ne.u32 %p2, %tid, 0; @%p2 bra $copied;
        cp.async.cg.shared.global [%a1], [%in], 16;
        cp.async.commit_group; cp.async.wait_group 0;
        $copied:
        ld.global.u32 %a2, [%in]; setp.eq.u32 %p3, %a2, 77; @%p3 bra $meet;
        $meet: bar.sync 0;"""),
    # barriers and copies
    "reduce": entry("reduce", ARRAYS, LOAD + """
        setp.gt.u32 %p1, %a1, 20; barrier.cta.red.popc.aligned.u32 %a2, 0, %p1;""" + STORE),
    "named": entry("named", ARRAYS, """
        .shared .align 4 .b8 box[128]; .reg .pred %late;
        setp.ge.u32 %late, %tid, 32; and.b32 %a3, %tid, 31; shl.b32 %a3, %a3, 2;
        mov.u32 %a4, box; add.u32 %a4, %a4, %a3; @%late bra $consume;
        """ + LOAD + """st.shared.u32 [%a4], %a1; bar.arrive 1, 64; bra $end;
        $consume: bar.sync 1, 64; ld.shared.u32 %a2, [%a4];
        cvt.u64.u32 %w1, %a3; add.s64 %out, %out, %w1; st.global.u32 [%out], %a2;
        $end:"""),
    "copies": entry("copies", ARRAYS, """
        .shared .align 16 .b8 tile[512];
        mul.wide.u32 %w8, %tid, 16; add.s64 %in, %in, %w8; add.s64 %out, %out, %w8;
        shl.b32 %a7, %tid, 4; mov.u32 %a8, tile; add.u32 %a8, %a8, %a7;
        setp.lt.u32 %p1, %tid, 16; selp.b32 %a1, 16, 0, %p1;
        cp.async.cg.shared.global.L2::128B [%a8], [%in], 16, %a1; cp.async.commit_group;
        cp.async.wait_group 0; ld.shared.v4.b32 {%a1, %a2, %a3, %a4}, [%a8];
        st.global.v4.b32 [%out], {%a1, %a2, %a3, %a4};"""),
    "bulk": entry("bulk", ARRAYS, """
        .shared .align 16 .b8 tile2[512]; .shared .align 8 .b8 ready[8];
        setp.ne.u32 %p1, %tid, 0; @%p1 bra $started;
        mbarrier.init.shared::cta.b64 [ready], 1; fence.mbarrier_init.release.cluster;
        mbarrier.arrive.expect_tx.shared::cta.b64 %w1, [ready], 512; mov.u32 %a1, tile2;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes
          [%a1], [%in], 512, [ready];
        $started: bar.sync 0;
        $again: mbarrier.try_wait.parity.shared::cta.b64 %p2, [ready], 0; @!%p2 bra $again;
        mul.wide.u32 %w8, %tid, 16; add.s64 %out, %out, %w8; shl.b32 %a7, %tid, 4;
        mov.u32 %a8, tile2; add.u32 %a8, %a8, %a7; ld.shared.v4.b32 {%a1, %a2, %a3, %a4}, [%a8];
        st.global.v4.b32 [%out], {%a1, %a2, %a3, %a4}; griddepcontrol.launch_dependents;"""),
    "cluster": entry("cluster", ARRAYS, """
        .shared .align 4 .b8 slot[128];
        mov.u32 %a1, %cluster_ctarank; mov.u32 %a2, %cluster_nctarank; mov.u32 %a3, %ctaid.x;
        add.u32 %a4, %a1, 1; rem.u32 %a4, %a4, %a2; shl.b32 %a5, %tid, 2; mov.u32 %a6, slot;
        add.u32 %a6, %a6, %a5; barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;
        mapa.shared::cluster.u32 %a7, %a6, %a4; mad.lo.u32 %a8, %a3, 100, %tid;
        st.shared::cluster.u32 [%a7], %a8;
        barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;
        ld.shared.u32 %a2, [%a6]; shl.b32 %a3, %a3, 5; add.u32 %a3, %a3, %tid;
        mul.wide.u32 %w1, %a3, 4; add.s64 %out, %out, %w1;""" + STORE),
    # what is wrong
    "racing": entry("racing", ARRAYS, """
        .shared .align 4 .b8 board[128];
        .file 1 "wrong.cu"
        shl.b32 %a3, %tid, 2; mov.u32 %a4, board; add.u32 %a4, %a4, %a3;
        .loc 1 41 0
        st.shared.u32 [%a4], %tid;
        xor.b32 %a4, %a4, 4;
        .loc 1 42 0
        ld.shared.u32 %a2, [%a4];
        """ + MINE + STORE),
    "beyond": entry("beyond", ARRAYS, """
        .loc 1 51 0
        ld.global.u32 %a2, [%in+128];
        """ + MINE + STORE),
}  # fmt: skip

COMBINE = """
.const .align 4 .u32 table[4] = {100, 200, 300, 400};
.extern .shared .align 16 .b8 dynamic[];
.func (.param .b32 result) combine(.param .b32 first, .param .align 8 .b8 second[16])
{
.reg .b32 %a<5>;
ld.param.b32 %a1, [first]; ld.param.v2.b32 {%a2, %a3}, [second+8];
mad.lo.u32 %a4, %a1, %a2, %a3;
st.param.b32 [result], %a4;
ret;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    kernels = dict(KERNELS)
    product = kernels.pop("product")
    kernels["f16"] = product.replace("TYPE", "f16").replace("product", "product_f16")
    kernels["bf16"] = product.replace("TYPE", "bf16").replace("product", "product_bf16")
    ptx = module(COMBINE, *kernels.values())
    return Program(tmp_path_factory.mktemp("ptx"), ptx, timed=True)


def u32(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint32)


LANES = np.arange(32, dtype=np.uint32)


def test_vectors_are_loaded_and_stored_with_their_hints(program: Program) -> None:
    given = np.arange(128, dtype=np.uint32)
    out = np.zeros(128, dtype=np.uint32)
    assert program.run("vectors", given, out) == []
    got = out.reshape(32, 4)
    np.testing.assert_array_equal(got[:, 0], 4 * LANES + 3)
    np.testing.assert_array_equal(got[:, 1], 4 * LANES + 2)
    np.testing.assert_array_equal(got[:, 2], (16 * LANES & 0xFFFF0000) | 7)
    np.testing.assert_array_equal(got[:, 3], 0)


def test_narrow_loads_fill_the_register_with_sign_or_zeros(program: Program) -> None:
    given = np.tile(np.array([-3, -2, 0, -1], dtype=np.int8), 32)
    out = np.zeros(32, dtype=np.int32)
    assert program.run("narrow", given, out) == []
    np.testing.assert_array_equal(out, -3 + 254 - 256)


def test_local_memory_is_the_threads_own(program: Program) -> None:
    out = np.zeros(32, dtype=np.uint32)
    assert program.run("local", LANES * 7, out) == []
    np.testing.assert_array_equal(out, LANES * 7 + 5)


def test_constant_memory_starts_as_it_says(program: Program) -> None:
    out = np.zeros(32, dtype=np.uint32)
    assert program.run("constant", LANES, out) == []
    np.testing.assert_array_equal(out, (LANES % 4 + 1) * 100 + 200)


def test_a_struct_is_passed_by_value(program: Program) -> None:
    out = np.zeros(32, dtype=np.uint32)
    struct = bytes([9] + [0] * 7) + u32(30, 4).tobytes() + bytes(8)
    assert program.run("by_value", out, struct) == []
    np.testing.assert_array_equal(out, 43)


def test_generic_and_shared_addresses_name_the_same_bytes(program: Program) -> None:
    out = np.zeros(32, dtype=np.uint32)
    assert program.run("generic", LANES * 3, out) == []
    np.testing.assert_array_equal(out, (LANES ^ 1) * 3)


def test_atomics_lose_no_update(program: Program) -> None:
    out = np.zeros(16, dtype=np.uint32)
    assert program.run("atomics", LANES, out, blocks=2, threads=64) == []
    assert list(out[:4]) == [256, 63, 128 % 10, 77]
    assert out[4:5].view(np.float32)[0] == 128.0
    assert list(out[5:7]) == [5, 63]
    assert out[8:10].view(np.uint64)[0] == 128 << 32


def test_loops_and_predicated_jumps(program: Program) -> None:
    out = np.zeros(32, dtype=np.uint32)
    assert program.run("loop", LANES, out) == []
    np.testing.assert_array_equal(out, LANES * (LANES + 1) // 2)


def test_names_of_inner_scopes_do_not_collide(program: Program) -> None:
    out = np.zeros(32, dtype=np.uint32)
    assert program.run("scopes", LANES, out) == []
    np.testing.assert_array_equal(out, np.where(LANES > 9, 2, 1) + np.where(LANES > 5, 10, 0))


def test_jumps_through_a_table(program: Program) -> None:
    out = np.zeros(32, dtype=np.uint32)
    assert program.run("table_jump", LANES % 3, out) == []
    np.testing.assert_array_equal(out, (LANES % 3 + 1) * 10)


def test_device_functions_are_called_with_structs_and_return(program: Program) -> None:
    out = np.zeros(32, dtype=np.uint32)
    assert program.run("calls", LANES, out) == []
    np.testing.assert_array_equal(out, LANES * 3 + 4)


def test_shuffles(program: Program) -> None:
    out = np.zeros(160, dtype=np.uint32)
    assert program.run("shuffles", LANES + 100, out) == []
    up, down, butterfly, indexed, valid = out.reshape(5, 32)
    np.testing.assert_array_equal(up, np.where(LANES >= 3, LANES - 3, LANES) + 100)
    np.testing.assert_array_equal(down, np.where(LANES < 29, LANES + 3, LANES) + 100)
    np.testing.assert_array_equal(butterfly, (LANES ^ 5) + 100)
    np.testing.assert_array_equal(indexed, (LANES & 24) + 1 + 100)  # segments of eight
    np.testing.assert_array_equal(valid, LANES >= 3)


def test_votes(program: Program) -> None:
    out = np.zeros(128, dtype=np.uint32)
    assert program.run("votes", LANES, out) == []
    ballot, any_, none, same = out.reshape(4, 32)
    np.testing.assert_array_equal(ballot, 0xFFE00000)
    assert (any_ == 1).all()
    assert (none == 0).all()
    assert (same == 0).all()


def test_matches_and_reductions(program: Program) -> None:
    out = np.zeros(192, dtype=np.uint32)
    given = LANES * 5 + 1
    assert program.run("matches", given, out) == []
    same, all_, total, least, parity, leader = out.reshape(6, 32)
    np.testing.assert_array_equal(same, np.uint32(0x11111111) << (LANES % 4))
    assert (all_ == 0).all()
    assert (total == given.sum()).all()
    assert (least == 1).all()
    assert (parity == np.bitwise_xor.reduce(given)).all()
    np.testing.assert_array_equal(leader, LANES == 0)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_matrices_are_loaded_and_multiplied(program: Program, kind: str) -> None:
    random = np.random.default_rng(3)
    a = random.integers(-8, 9, (16, 16)).astype(np.float32)
    b = random.integers(-8, 9, (16, 8)).astype(np.float32)
    both = np.concatenate([a.ravel(), b.ravel()])
    if kind == "f16":
        halves = both.astype(np.float16).view(np.uint16)
    else:
        halves = (both.view(np.uint32) >> 16).astype(np.uint16)
    out = np.full((16, 8), np.nan, dtype=np.float32)
    assert program.run(f"product_{kind}", halves, out, shared=768) == []
    np.testing.assert_array_equal(out, a @ b + 0.5)


def test_matrices_of_int8_are_multiplied(program: Program) -> None:
    random = np.random.default_rng(4)
    a = random.integers(-128, 128, (16, 32)).astype(np.int8)
    b = random.integers(-128, 128, (32, 8)).astype(np.int8)
    out = np.zeros((16, 8), dtype=np.int32)
    given = np.concatenate([a.ravel(), b.T.ravel()])
    assert program.run("product_s8", given, out) == []
    np.testing.assert_array_equal(out, a.astype(np.int32) @ b.astype(np.int32) + 7)


def test_a_barrier_counts_predicates(program: Program) -> None:
    out = np.zeros(64, dtype=np.uint32)
    assert program.run("reduce", np.arange(64, dtype=np.uint32), out, threads=64) == []
    np.testing.assert_array_equal(out, 43)


LATENCIES = {"issue": 1, "arithmetic": 4, "dram": 1000, "l2": 300, "barrier": 20}


def clocked(program: Program, kernel: str, threads: int) -> dict[str, Any]:
    """The timeline of a kernel's launch, of words that are the offset of the next."""
    for cause, cycles in LATENCIES.items():
        program.set(f"latency_{cause}", str(cycles))
    chain = np.zeros(32, dtype=np.uint64)
    chain[[0, 8]] = (64, 128)
    out = np.zeros(1, dtype=np.uint64)
    assert program.run(kernel, chain, out, threads=threads) == []
    return program.profile()["timeline"]  # type: ignore[no-any-return]


def test_loads_that_need_each_other_are_trips_and_others_are_one(program: Program) -> None:
    chase, side = (clocked(program, name, threads=1) for name in ("chase", "side_by_side"))
    assert (chase["trips"], side["trips"]) == (3, 1)
    assert chase["cycles_by_cause"]["dram"] == pytest.approx(3000, abs=9)
    assert side["cycles_by_cause"]["dram"] == pytest.approx(1000, abs=9)
    assert 3 * 1000 <= chase["cycles"] <= 3 * 1000 + 3 * 4 + 12
    assert 1000 <= side["cycles"] <= 1000 + 3 * 4 + 16
    for one in (chase, side):  # two parameters, the thread's index, six of its own, the return
        assert one["warp_instructions"] == 3 + 6 + 1


def test_all_leave_a_barrier_at_the_clock_of_the_last(program: Program) -> None:
    met = clocked(program, "met", threads=64)
    # A copy that is waited for; then the same sector, which is in L2 by now.
    assert met["trips"] == 2
    assert met["cycles_by_cause"]["dram"] > 900
    assert met["cycles_by_cause"]["l2"] > 250
    (phase,) = met["phases"]
    assert phase["at"] == met["cycles"] - 1  # the return
    assert met["cycles_by_cause"]["barrier"] == 20


@pytest.mark.parametrize("schedule", ["in_order", "reverse", "random"])
def test_a_named_barrier_orders_producer_and_consumer(program: Program, schedule: str) -> None:
    program.set("schedule", schedule)
    out = np.zeros(32, dtype=np.uint32)
    assert program.run("named", LANES + 9, out, threads=64) == []
    program.set("schedule", "in_order")
    np.testing.assert_array_equal(out, LANES + 9)


def test_asynchronous_copies_arrive_and_fill_with_zeros(program: Program) -> None:
    given = np.arange(1, 129, dtype=np.uint32)
    out = np.full(128, 9, dtype=np.uint32)
    assert program.run("copies", given, out) == []
    np.testing.assert_array_equal(out, np.where(np.arange(128) < 64, given, 0))


def test_a_bulk_copy_completes_its_barrier(program: Program) -> None:
    given = np.arange(128, dtype=np.uint32)
    out = np.zeros(128, dtype=np.uint32)
    assert program.run("bulk", given, out) == []
    np.testing.assert_array_equal(out, given)


def test_blocks_of_a_cluster_write_each_others_memory(program: Program) -> None:
    out = np.zeros(128, dtype=np.uint32)
    assert program.run("cluster", LANES, out, blocks=4, cluster=2) == []
    blocks = np.arange(4, dtype=np.uint32)
    np.testing.assert_array_equal(out.reshape(4, 32), (blocks ^ 1)[:, None] * 100 + LANES)


def test_a_race_is_found_and_names_the_lines_of_the_source(program: Program) -> None:
    errors = program.run("racing", LANES, np.zeros(32, dtype=np.uint32))
    assert errors, "no error was found"
    text = str(errors)
    assert "race" in text or "uninit" in text, text
    assert "wrong.cu:42" in text, text


def test_an_access_beyond_an_array_is_found(program: Program) -> None:
    errors = program.run("beyond", LANES, np.zeros(32, dtype=np.uint32))
    assert any(error["kind"] == "out-of-bounds" for error in errors), errors
    assert "wrong.cu:51" in str(errors)


REFUSED = {
    "wmma.load.a.sync.aligned.row.m16n16k16.f16 {%a1}, [%in];": "wmma",
    "add.cc.u32 %a1, %a2, %a3;": ".cc",
    "div.rz.f32 %a1, %a2, %a3;": ".rz",
    "ld.global.mystery.u32 %a1, [%in];": ".mystery",
    "ld.global.v8.b32 {%a1, %a2, %a3, %a4, %a5, %a6, %a7, %a8}, [%in];": "16 bytes",
    "mov.u32 %a1, %smid;": "%smid",
    "mov.u32 %a1, %b1;": "%b1",
    "add.u32 %a1, %a2;": "operands",
    "setp.lt.f16x2 %p1, %a1, %a2;": "pairs",
    "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%a1}, {%a1}, {%a1}, {%a1};": "m16n8k16",
    "mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%a1}, {%a1}, {%a1}, {%a1};": "m16n8k32",
    "call.uni vprintf, (%a1);": "vprintf",
    "cp.async.bulk.global.shared::cta.bulk_group [%in], [%a1], 16;": "complete_tx",
    "cvt.rz.f16.f32 %h1, %a1;": ".rz",
    "add.f32 %h1, %a2, %a3;": "narrower",
    "bra $nowhere;": "$nowhere",
}


@pytest.mark.parametrize("text", REFUSED, ids=REFUSED.values())
def test_what_is_not_known_is_refused_with_its_line(text: str) -> None:
    ptx = module(entry("refused", ARRAYS, f"\n\n{text}\n"))
    line = next(i for i, one in enumerate(ptx.split("\n"), 1) if one == text)
    with pytest.raises(ptx2cpp.PtxError) as caught:
        ptx2cpp.translate(ptx)
    assert f"PTX line {line}:" in str(caught.value)
    assert REFUSED[text] in str(caught.value)


def test_a_wrappers_lines_are_reported_as_those_that_called_it() -> None:
    body = """
        .file 1 "kernel.cu"
        .file 2 "include/device.h"
        .loc 1 20 5
        .loc 2 300 3, function_name $info, inlined_at 1 20 5
        .loc 2 200 7, function_name $info, inlined_at 2 300 3
        ld.global.u32 %a1, [%in];
        .loc 2 300 3, function_name $info, inlined_at 1 22 5
        ld.global.u32 %a2, [%in];"""
    text = ptx2cpp.translate(module(entry("wrapped", ARRAYS, body)))
    assert text.count('{"kernel.cu", 20}') == 1
    assert text.count('{"kernel.cu", 22}') == 1
    assert "device.h" not in text


def test_a_kernels_lines_are_named_by_their_path_below_csrc_cuda() -> None:
    body = """
        .file 1 "/x/csrc/cuda/decode_step/mma.h"
        .loc 1 20 5
        ld.global.u32 %a1, [%in];"""
    text = ptx2cpp.translate(module(entry("named", ARRAYS, body)))
    assert text.count('{"decode_step/mma.h", 20}') == 1


def test_the_command_reports_what_it_cannot_translate(tmp_path: Path) -> None:
    source = tmp_path / "wrong.ptx"
    source.write_text(module(entry("wrong", ARRAYS, "frobnicate.u32 %a1;")))
    command = [sys.executable, "-m", "ptx2cpp", str(source), "-o", str(tmp_path / "wrong.cpp")]
    folder = str(Path(ptx2cpp.__file__).parents[1])
    done = subprocess.run(
        command, env={"PYTHONPATH": folder}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "frobnicate.u32" in done.stderr
    assert not (tmp_path / "wrong.cpp").exists()
