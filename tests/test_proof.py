"""The static proof: what it reads in machine code, and that planted violations are caught."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.proof import gates, ptxas, report, sass, toolchain
from bench.proof.__main__ import distinct, main
from bench.proof.launches import Launch, Occupancy
from bench.proof.roofline import MACHINES, decode_bytes, in_flight
from bench.proof.toolchain import Unit

ROOT = Path(__file__).resolve().parent.parent
KERNEL = "_ZN4less4cuda11fold_kernelEv"
CLEAN = ptxas.Resources(registers=40, shared=128)

# A loop of 16-byte loads, and rare code at the end that jumps back without making a loop.
SASS = f"""
\t.section\t.text.{KERNEL},"ax",@progbits
{KERNEL}:
.text.{KERNEL}:
\t//## File "/x/csrc/cuda/fold.cu", line 10
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_3) ;
.L_x_1:
\t//## File "/x/csrc/cuda/device.h", line 58 inlined at "/x/csrc/cuda/fold.cu", line 20
\t//## File "/x/csrc/cuda/fold.cu", line 20
        /*0030*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
\t//## File "/x/csrc/cuda/fold.cu", line 21
        /*0040*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0050*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0060*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0070*/                   EXIT ;
.L_x_3:
\t//## File "/x/csrc/cuda/fold.cu", line 30
        /*0080*/                   LDG.E.U8 R4, desc[UR4][R2.64] ;
        /*0090*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*00a0*/                   BRA `(.L_x_4);
"""


def judged(
    text: str,
    sources: dict[str, str] | None = None,
    resources: ptxas.Resources = CLEAN,
    used: dict[gates.Excuse, set[str]] | None = None,
) -> list[str]:
    """What the gates say of machine code whose sources are these, by path below csrc/cuda."""
    (kernel,) = sass.parse(text)
    excuses = {file: gates.excuses(file, source) for file, source in (sources or {}).items()}

    def excuse_of(line: sass.Line) -> gates.Excuse | None:
        return excuses.get(gates.short_name(line[0]), {}).get(line[1])

    return gates.judge(kernel, resources, "fold_kernel<float, 4>", excuse_of, used)


def planted(before: str, after: str) -> str:
    assert before in SASS
    return SASS.replace(before, after)


def test_a_clean_kernel_passes() -> None:
    assert judged(SASS) == []


def test_the_loop_is_found_and_a_jump_back_from_rare_code_is_none() -> None:
    (kernel,) = sass.parse(SASS)
    assert kernel.name == KERNEL
    (loop,) = [loop for loop in kernel.loops if 0xA0 not in loop]
    assert loop == {0x30, 0x40, 0x50}


def test_an_instruction_knows_the_lines_that_it_comes_from() -> None:
    (kernel,) = sass.parse(SASS)
    load = next(one for one in kernel.code if one.opcode == "LDG.E.128")
    assert load.lines == (("/x/csrc/cuda/device.h", 58), ("/x/csrc/cuda/fold.cu", 20))
    assert gates.where(load) == "device.h:58 < fold.cu:20"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("LDG.E.128 R4", "LDG.E R4", "1 x 4-byte LDG.E in a loop, device.h:58 < fold.cu:20"),
        ("LDG.E.128 R4", "LDG.E.64 R4", "8-byte LDG.E.64"),
        ("LDG.E.128 R4", "LDG.E.U16.CONSTANT R4", "2-byte"),
        ("STG.E.128 desc", "STG.E desc", "4-byte STG.E in a loop, fold.cu:21"),
        ("LDG.E.128 R4, desc[UR4]", "LDGSTS.E [R3], desc[UR4]", "4-byte LDGSTS.E"),
        ("LDC R1", "STL R1", "local memory"),
        ("LDG.E.128 R4, desc[UR4][R2.64]", "LD.E.128 R4, desc[UR4][R2.64]", "generic"),
        ("LDG.E.128 R4, desc[UR4][R2.64]", "LD.E.128 R4, [R2.64+0x10]", "generic"),
        ("STG.E.128 desc", "ST.E.128 desc", "generic"),
    ],
)
def test_a_planted_access_is_caught(before: str, after: str, message: str) -> None:
    (wrong,) = judged(planted(before, after))
    assert message in wrong


def test_shared_memory_of_another_block_is_no_generic_address() -> None:
    text = planted("LDG.E.128 R4, desc[UR4][R2.64]", "LD.E.128 R4, [R2]")
    assert judged(text) == []


def test_wide_asynchronous_and_bulk_copies_pass() -> None:
    assert judged(planted("LDG.E.128 R4,", "LDGSTS.E.BYPASS.128 [R4],")) == []
    assert judged(planted("LDG.E.128 R4,", "UBLKCP [UR4],")) == []


@pytest.mark.parametrize(
    "resources",
    [ptxas.Resources(40, 0, stack=16), ptxas.Resources(40, 0, spilled=24)],
    ids=["stack", "spills"],
)
def test_a_stack_and_spills_are_caught(resources: ptxas.Resources) -> None:
    (wrong,) = judged(SASS, resources=resources)
    assert "stack" in wrong or "spills" in wrong


NARROW = planted("LDG.E.128 R4", "LDG.E R4")  # of device.h:58, called by fold.cu:20
COMMENT = "// narrow: as the test wants it"


def source(*at: tuple[int, str]) -> str:
    """30 lines of code, but for those that are given by number."""
    lines = ["code();"] * 30
    for number, line in at:
        lines[number - 1] = line
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        source((20, f"load();  {COMMENT}")),
        source((20, f"load();  // the first; {COMMENT[3:]}")),
        source((19, f"  {COMMENT}")),
        source((18, COMMENT), (19, "// and more of why")),
    ],
    ids=["behind", "behind other words", "above", "above, in two lines"],
)
def test_a_comment_excuses_the_narrow_access_of_its_line(text: str) -> None:
    used: dict[gates.Excuse, set[str]] = {}
    assert judged(NARROW, {"fold.cu": text}, used=used) == []
    ((excuse, kernels),) = used.items()
    assert (excuse.file, excuse.line, kernels) == ("fold.cu", 20, {"fold_kernel"})
    assert excuse.reason.startswith("as the test wants it")


@pytest.mark.parametrize(
    "text",
    [
        source(),
        source((20, "load();  // a narrow row: as the test wants it")),
        source((21, f"code();  {COMMENT}")),
        source((19, f"code();  {COMMENT}")),
        source((18, COMMENT), (19, "")),
        source((18, COMMENT)),
        source((20, "load();  // narrow:")),
    ],
    ids=["none", "other words", "below", "behind the line above", "an empty line between",
         "a line between", "no reason"],
)  # fmt: skip
def test_a_narrow_access_without_its_comment_is_caught(text: str) -> None:
    (wrong,) = judged(NARROW, {"fold.cu": text})
    assert "1 x 4-byte LDG.E in a loop, device.h:58 < fold.cu:20" in wrong


def test_a_comment_at_a_helper_or_at_its_call_excuses_the_access() -> None:
    helper = "\n" * 56 + f"{COMMENT}\nload();"
    assert judged(NARROW, {"device.h": helper}) == []
    assert judged(NARROW, {"compact.cu": helper}) != []


def test_a_comment_excuses_no_local_memory_and_no_spills() -> None:
    every = {"fold.cu": source(*((n, f"code();  {COMMENT}") for n in range(1, 31)))}
    assert judged(planted("LDC R1", "LDL R1"), every) != []
    assert judged(SASS, every, ptxas.Resources(40, 0, spilled=24)) != []


def test_the_kernels_excuses_have_reasons() -> None:
    found = toolchain.all_excuses()
    assert found
    for excuse in found:
        assert len(excuse.reason) > 20, excuse


def test_a_kernel_that_several_head_dims_have_counts_once() -> None:
    (kernel,) = sass.parse(SASS)
    units = [
        Unit(Path("fold.cu"), arch, [kernel], {kernel.name: CLEAN}) for arch in ("80", "80", "90a")
    ]
    distinct(units)
    assert [len(unit.kernels) for unit in units] == [1, 0, 1]


PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1av' for 'sm_90a'
ptxas info    : Function properties for _Z1av
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 8576 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bv' for 'sm_90a'
ptxas warning : Registers are spilled to local memory in function '_Z1bv', 8 bytes spill stores
ptxas info    : Function properties for _Z1bv
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers
"""


def test_registers_shared_memory_stack_and_spills_are_read() -> None:
    got = ptxas.parse(PTXAS)
    assert got == {
        "_Z1av": ptxas.Resources(96, 8576, 0, 0),
        "_Z1bv": ptxas.Resources(255, 0, 16, 20),
    }


def step(**changes: object) -> Launch:
    values: dict[str, object] = {
        "op": "decode_step", "model": "Llama-3-8B", "Q": 32, "K": 8, "D": 128, "B": 2, "C": 205,
        "E": 64, "R": 8, "map": "exp", "stages": 3, "rows": 64, "kernel": KERNEL, "grid": (7, 8, 2),
        "threads": 128, "shared": 0, "cluster": 7,
    }  # fmt: skip
    return Launch(**{**values, **changes})  # type: ignore[arg-type]


def test_a_steps_bytes_follow_the_formulas() -> None:
    moved = decode_bytes(step())
    assert moved.slots == 2 * 8 * 205 * 2 * 128 * 2
    assert moved.scores == 12 * 2 * 8 * 205
    assert moved.state == 8 * 2 * 8 * 8 * 128
    assert moved.maps == 40 * (128 * 64 + 64 * 8) * 2 + 40 * 8 * 4
    assert moved.total == moved.slots + moved.scores + moved.state + moved.maps
    assert decode_bytes(step(B=4)).maps == moved.maps  # once per batch


def test_bytes_in_flight_are_the_tiles_that_the_resident_blocks_ask_for() -> None:
    held = Occupancy(blocks=4, warps=16, most_warps=64)
    short = 2 * 32 * 256  # a block's 32 slots: keys and values
    assert in_flight(step(grid=(7, 8, 1)), held, sms=132) == short
    assert in_flight(step(grid=(7, 8, 8)), held, sms=132) == 4 * short
    long = 2 * 64 * 256  # two of the three tiles
    assert in_flight(step(C=1024, grid=(8, 8, 8)), held, sms=132) == 4 * long


def test_the_report_is_whole_tables_with_every_figure() -> None:
    (kernel,) = sass.parse(SASS)
    units = [Unit(Path("fold.cu"), arch, [kernel], {KERNEL: CLEAN}) for arch in ("80", "90a")]
    rows = [(step(B=B), 100, 128, Occupancy(blocks=5, warps=20, most_warps=64)) for B in (1, 8)]
    excuses = [gates.Excuse("fold.cu", line, "as it is wanted") for line in (20, 21)]
    used = {excuse: {"fold_kernel"} for excuse in excuses}
    text = report.write(units, ("80", "90a"), (64, 128), used, rows)
    for table in text.split("\n\n"):
        lines = [line.replace("\\|", "") for line in table.split("\n") if line.startswith("| ")]
        assert len({line.count("|") for line in lines}) <= 1, table
    assert text.count("| `fold_kernel` | fold.cu | as it is wanted |") == 1
    assert "for sm_80, sm_90a and head dims 64, 128:" in text
    assert "| `fold_kernel` | 1 | 40 | 40 | 128 |" in text
    assert "| 7x8x2 | 7 | 128 | 100 | 128 | 5 | 20/64 |" in text
    total = decode_bytes(step(B=8)).total
    assert f"| {total / 1e6:.3f} | {total / 3.0e12 * 1e6:.2f} |" in text


def test_a_page_without_its_models_head_dim_is_refused_before_anything_is_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LESS_CUDA_HEAD_DIMS", "64 96")
    with pytest.raises(SystemExit):
        main(["--write"])
    assert "must have 128, the page's models'; got [64, 96]" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["decode_step", "build_facts", "decode_step_fp16.cu", "nothing"])
def test_a_file_without_kernels_is_refused_before_anything_is_compiled(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["--only", "fold", name])
    assert refused.value.code == 2
    said = capsys.readouterr().err
    assert f"argument --only: invalid choice: '{name}'" in said
    assert "decode_step_packed" in said


def test_no_kernel_at_all_holds_to_no_gate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "bench.proof.__main__.compile_unit",
        lambda source, arch, _: Unit(source, arch, [], {}),
    )
    assert main(["--only", "fold", "--arch", "80"]) == 1
    assert "no kernel" in capsys.readouterr().out


def test_the_page_has_every_op_that_is_launched() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text()
    header = (ROOT / "csrc" / "cuda" / "kernels.h").read_text()
    for op in re.findall(r"^cudaError_t (\w+)\(", header, flags=re.M):
        if op == "rotate":  # not launched by itself in the page's steps
            continue
        assert f"| {op} | Llama-2-7B | 1 |" in page, f"{op}: make proof has not been run"


def test_little_s_law() -> None:
    h100 = next(machine for machine in MACHINES if machine.name == "H100")
    assert h100.needs_in_flight(700e-9) == pytest.approx(3.0e12 * 700e-9 / 132)
