"""The emulator of compiled CUDA kernels (bench/sass), on machine code by hand and on one small kernel of nvcc's."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

sass = pytest.importorskip("bench.sass.__main__", reason="run from the repository's root")
from bench.sass import cases, launches, run, scheduler, timing, toolchain  # noqa: E402
from bench.sass.disassembly import Program, UnknownInstruction, parse, parse_operand  # noqa: E402
from bench.sass.memory import BadAddress, Memory  # noqa: E402
from bench.sass.warp import LANES, Stuck, Warp  # noqa: E402

INPUT, OUTPUT = 0x7F1000000000, 0x7F1000001000


def warp_of(text: str, numbers: np.ndarray | None = None, labels: dict[str, int] | None = None) -> Warp:
    """Code that begins with R0 = lane, R2:R3 = input + 16 lane, R4:R5 = output + 4 lane, and that ends with EXIT."""
    lines = ["S2R R0, SR_TID.X", "LDC.64 R2, c[0x0][0x210]", "LDC.64 R4, c[0x0][0x218]"]
    lines += ["IMAD.WIDE.U32 R2, R0, 0x10, R2", "IMAD.WIDE.U32 R4, R0, 0x4, R4", *text.strip().splitlines(), "EXIT"]
    program = Program("by hand", [line.strip() for line in lines], labels or {})
    given = np.zeros(4 * LANES, np.float32) if numbers is None else numbers
    memory = Memory({"input": (INPUT, given.tobytes()), "output": (OUTPUT, bytes(4 * LANES))})
    arguments = np.array([INPUT, OUTPUT], np.uint64).tobytes()
    return Warp(program, memory, arguments, block=0, first_thread=0)


def output_of(warp: Warp, dtype: type = np.float32) -> np.ndarray:
    warp.run()
    return warp.memory.piece_at(OUTPUT, 4).data.view(dtype)


# --- reading --------------------------------------------------------------------------------------------------------


def test_operands() -> None:
    assert (parse_operand("-|R3.reuse|").index, parse_operand("-|R3.reuse|").absolute) == (3, True)
    assert parse_operand("!PT").index is None and parse_operand("!PT").negated
    assert parse_operand("R6.H1_H1").half == 1
    assert parse_operand("-0x10").value == -16 and parse_operand("+INF ").value == math.inf
    constant = parse_operand("c[0x0][R3+0x218]")
    assert (constant.kind, constant.offset, constant.parts[0][0].index) == ("constant", 0x218, 3)
    address = parse_operand("desc[UR20][R4.64+-0x8]")
    assert (address.offset, address.parts[0][2]) == (-8, True)
    with pytest.raises(UnknownInstruction, match="address"):
        parse_operand("[-R4]")


def test_listing_of_nvdisasm() -> None:
    listing = (
        '\t.section\t.text.one,"ax",@progbits\n.text.one:\n        /*0000*/                   MOV R1, RZ ;\n.L_x_0:\n'
        "        /*0010*/              @!P0 BRA `(.L_x_0) ;\n\t.section\t.nv.info\n        /*0020*/  MOV R2, RZ ;\n"
    )
    program = parse(listing)["one"]
    assert program.texts == ["MOV R1, RZ", "@!P0 BRA `(.L_x_0)"] and program.labels == {".L_x_0": 1}
    assert program[1].guard is not None and program[1].guard.negated


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("FROB R1, R2", "no opcode FROB"),
        ("FADD.SAT R1, R2, R3", "no modifier SAT"),
        ("MOV R1, c[0x0][0x100]", "nothing that is known"),
        ("MOV R1, c[0x3][0x10]", "no 32 bits"),
        ("S2R R1, SR_CLOCKLO", "SR_CLOCKLO"),
    ],
)
def test_what_is_not_known_raises(line: str, message: str) -> None:
    with pytest.raises(UnknownInstruction, match=message):
        warp_of(line).run()


# --- running --------------------------------------------------------------------------------------------------------


def test_lanes_part_and_meet() -> None:
    # Lane i counts to i; all go on together.
    code = """MOV R7, RZ
    BSSY B0, `(after)
    ISETP.GE.U32.AND P0, PT, R7, R0, PT
    @P0 BRA `(end)
    IADD3 R7, R7, 0x1, RZ
    BRA `(loop)
    BSYNC B0
    STG.E desc[UR4][R4.64], R7"""
    warp = warp_of(code, labels={"loop": 7, "end": 11, "after": 12})
    np.testing.assert_array_equal(output_of(warp, np.uint32), np.arange(LANES))
    assert warp.trace[-2].active == LANES


def test_lanes_that_leave_a_region_are_not_waited_for() -> None:
    # Even lanes leave it for a place before its end, where they wait for the others in a region around it.
    code = """MOV R7, 0x1
    BSSY B1, `(outer)
    BSSY B0, `(inner)
    LOP3.LUT P0, RZ, R0, 0x1, RZ, 0xc0, !PT
    @!P0 BREAK B0
    @!P0 BRA `(left)
    BSYNC B0
    MOV R7, 0x2
    BSYNC B1
    STG.E desc[UR4][R4.64], R7"""
    warp = warp_of(code, labels={"left": 13})
    np.testing.assert_array_equal(output_of(warp, np.uint32), 1 + np.arange(LANES) % 2)
    assert warp.trace[-2].active == LANES
    with pytest.raises(Stuck):
        warp_of(code.replace("@!P0 BREAK B0", "NOP"), labels={"left": 13}).run()


def test_accesses_are_checked() -> None:
    with pytest.raises(BadAddress, match="no memory"):
        warp_of("LDG.E R6, desc[UR4][R2.64+0x100000]").run()
    with pytest.raises(BadAddress, match="not aligned"):
        warp_of("LDG.E.64 R6, desc[UR4][R2.64+0x4]").run()


def test_fused_products_round_once() -> None:
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal(4 * LANES).astype(np.float32)
    a, b = numbers[0::4], numbers[1::4]
    numbers[2::4] = -a * b * np.float32(1 + 2.0**-20)  # so that nearly all of the product cancels
    code = """LDG.E.128 R8, desc[UR4][R2.64]
    FFMA{} R12, R8, R9, R10
    STG.E desc[UR4][R4.64], R12"""
    for mode, holds in (("", None), (".RP", lambda x, exact: x >= exact), (".RM", lambda x, exact: x <= exact)):
        result = output_of(warp_of(code.format(mode), numbers))
        for x, *(p, q, r) in zip(result, a, b, numbers[2::4], strict=True):
            exact = Fraction(float(p)) * Fraction(float(q)) + Fraction(float(r))
            error = abs(Fraction(float(x)) - exact)
            beside = [abs(Fraction(float(np.nextafter(x, np.float32(to)))) - exact) for to in (-np.inf, np.inf)]
            assert error <= min(beside) if holds is None else holds(Fraction(float(x)), exact) and error < max(beside)


@pytest.mark.parametrize(("kind", "dtype"), [("S64", np.int64), ("U64", np.uint64)])
def test_integers_of_64_bits_round_once(kind: str, dtype: type) -> None:
    # Beside powers of two, and halfway or nearly so between two doubles and between two float32.
    wanted = [(1 << at) + more for at in (24, 31, 32, 52, 53, 54, 61, 62) for more in (-1, 0, 1)]
    wanted += [(1 << 53) + 3, (1 << 54) + 6, (1 << 60) + (1 << 36) + 1, (1 << 60) + 3 * (1 << 36) - 1, (1 << 63) - 513]
    wanted += [(1 << 63) - 1, 0, 999] if kind == "S64" else [(1 << 64) - 1, (1 << 64) - 1025, 999]
    given = [-x if kind == "S64" and at % 2 else x for at, x in enumerate(wanted)]
    numbers = np.zeros(2 * LANES, dtype)
    numbers[::2] = given
    code = """LDG.E.64 R8, desc[UR4][R2.64]
    I2F.{} R12, R8
    STG.E desc[UR4][R4.64], {}"""

    def converted(how: str, register: str = "R12", dtype: type = np.float32) -> np.ndarray:
        return output_of(warp_of(code.format(how, register), numbers.view(np.float32)), dtype)

    words = [converted(f"F64.{kind}", register, np.uint32) for register in ("R12", "R13")]
    # Python and NumPy round to the nearest, and ties to even.
    assert np.stack(words, axis=1).ravel().view(np.float64).tolist() == [float(x) for x in given]
    np.testing.assert_array_equal(converted(kind), numbers[::2].astype(np.float32))
    for exact, up, down in zip(given, converted(f"{kind}.RP"), converted(f"{kind}.RM"), strict=True):
        below, above = np.nextafter(up, np.float32(-np.inf)), np.nextafter(down, np.float32(np.inf))
        below, down, up, above = (Fraction(float(x)) for x in (below, down, up, above))
        assert below < exact <= up and down <= exact < above
    with pytest.raises(UnknownInstruction):
        converted(f"F64.{kind}.RP")


def test_spilled_registers_come_back() -> None:
    code = """LDC R1, c[0x0][0x28]
    IADD3 R1, R1, -0x20, RZ
    STL.64 [R1+0x8], R4
    MOV R6, R0
    STL [R1+0x10], R6
    LDL.64 R8, [R1+0x8]
    LDL R10, [R1+0x10]
    STG.E desc[UR4][R8.64], R10"""
    np.testing.assert_array_equal(output_of(warp_of(code), np.uint32), np.arange(LANES))


def test_integers_in_pairs() -> None:
    # 64-bit -(2^32 * 3 + lane) by carries, then a shift across both words.
    code = """MOV R7, 0x3
    IADD3 R10, P0, RZ, -R0, RZ
    IADD3.X R11, RZ, ~R7, RZ, P0, !PT
    SHF.R.U64 R12, R10, 0x8, R11
    STG.E desc[UR4][R4.64], R12"""
    expected = [((-(3 << 32 | lane) & (1 << 64) - 1) >> 8) & 0xFFFFFFFF for lane in range(LANES)]
    np.testing.assert_array_equal(output_of(warp_of(code), np.uint32), expected)


# --- the model ------------------------------------------------------------------------------------------------------


def test_a_predicate_joins_what_a_logic_instruction_tells() -> None:
    code = """ISETP.LT.AND P2, PT, R0, 0x4, PT
    LOP3.LUT P1, RZ, R0, 0x1, RZ, 0xc0, P2
    SEL R12, RZ, 0x1, !P1
    STG.E desc[UR4][R4.64], R12"""
    lanes = np.arange(LANES)
    assert (output_of(warp_of(code), np.uint32) == ((lanes & 1) != 0) | (lanes < 4)).all()


def test_loads_before_the_first_wait() -> None:
    together = """LDG.E R8, desc[UR4][R2.64]
    LDG.E R9, desc[UR4][R2.64+0x200000]
    FADD R10, R8, R9"""
    apart = """LDG.E R8, desc[UR4][R2.64]
    FADD R10, R8, R8
    LDG.E R9, desc[UR4][R2.64+0x200000]"""
    for code, expected in ((together, 2), (apart, 1)):
        warp = warp_of(code)
        warp.memory = Memory({name: (INPUT + at, bytes(16 * LANES)) for name, at in (("a", 0), ("b", 0x200000))})
        warp.run()
        assert timing.loads_before_wait(timing.steps_of(warp.trace)) == expected


def test_more_instructions_take_more_time_and_a_copy_reaches_copy_bandwidth() -> None:
    copy = "LDG.E.128 R8, desc[UR4][R2.64]\nSTG.E.128 desc[UR4][R2.64], R8"
    shares = []
    for more in (0, 400):
        warp = warp_of("\n".join([copy, *["FADD R12, R8, R9"] * more]))
        warp.run()
        shares.append(scheduler.share_of_copy(timing.steps_of(warp.trace), 2 * 16 * LANES, warps=16))
    assert 0.9 < shares[0] <= 1.001 and shares[1] < 0.7
    assert scheduler.H200.warps(registers=168, shared_bytes=20480, threads=128) == 3
    assert scheduler.H200.warps(registers=32, shared_bytes=0, threads=128) == 16


# --- the command ----------------------------------------------------------------------------------------------------


def test_worse_fails_and_better_is_told(tmp_path: Path) -> None:
    def results(instructions: int = 1000, share: float = 60.0, spilled: int = 0) -> dict[str, run.Result]:
        return {"AdamW": run.Result("update", instructions, 100, spilled, 8, share)}

    numbers = {name: sass.numbers_of(each) for name, each in results().items()}
    sass.save(numbers, {"nvcc": "13"}, tmp_path / "record.json")
    made_with, recorded = sass.load(tmp_path / "record.json")
    assert made_with == {"nvcc": "13"}
    assert sass.compare(recorded, results(instructions=1019, share=59)) == ([], [])
    for worse in (results(instructions=1021), results(share=58.0), results(spilled=4)):
        wrong, notes = sass.compare(recorded, worse)
        assert len(wrong) == 1 and not notes and sass.UPDATE in wrong[0], wrong
    wrong, notes = sass.compare(recorded, results(instructions=900, share=80.0))
    assert not wrong and len(notes) == 2
    assert sass.compare({}, results())[0] == [f"AdamW: nothing is recorded; record it with: {sass.UPDATE}"]


def test_every_case_is_recorded() -> None:
    made_with, recorded = sass.load(sass.RECORD)
    assert made_with["architecture"] == f"sm_{toolchain.ARCHITECTURE}"
    assert list(recorded) == [case.name for case in cases.all_cases()]


def test_a_check_runs_what_is_not_of_the_recorded_sources(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sass, "RECORD", tmp_path / "sass.json")
    monkeypatch.setattr(toolchain, "missing", lambda: None)
    monkeypatch.setattr(toolchain, "compiler", lambda: "13")
    result = run.Result("update", 1000, 100, 0, 8, 60.0)
    monkeypatch.setattr(sass, "run_all", lambda chosen, _: {case.name: result for case in chosen})
    assert sass.main(["--update"]) == 0
    capsys.readouterr()
    for change, runs in ((None, False), ("--only=AdamW", True), ("sources", True), ("compiler", True)):
        with monkeypatch.context() as changed:
            if change in ("sources", "compiler"):
                changed.setattr(toolchain, change, lambda: "another")
            assert sass.main(["--check", *([change] if change and "--" in change else [])]) == 0
        assert ("nothing is run" not in capsys.readouterr().out) == runs, change
    assert sass.main(["--update", "--only=AdamW"]) == 0
    capsys.readouterr()
    sass.main(["--check"])
    assert "nothing is run" not in capsys.readouterr().out, "the cases that were left out are of older sources"


def test_the_sources_that_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(toolchain.ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(toolchain.ROOT / "setup.py", tmp_path)
    before = toolchain.sources()
    monkeypatch.setattr(toolchain, "ROOT", tmp_path)
    monkeypatch.setattr(toolchain, "__file__", str(tmp_path / "bench" / "sass" / "toolchain.py"))
    shutil.copytree(Path(sass.__file__).parent, tmp_path / "bench" / "sass", ignore=lambda *_: ["__pycache__"])
    assert toolchain.sources() == before
    for name, counts in {
        "csrc/torch/rows.h": False,
        "csrc/math/random.h": True,
        "bench/sass/launches.cpp": True,
    }.items():
        before = toolchain.sources()
        with (tmp_path / name).open("a") as file:
            file.write("\n")
        assert (toolchain.sources() != before) == counts, name


def test_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        sass.main(["--help"])
    assert "2% worse" in capsys.readouterr().out


def test_without_tools_nothing_is_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "")
    assert sass.main(["--check"]) == 0
    assert "nothing is run: there is no nvcc" in capsys.readouterr().out


def test_kernels_by_name() -> None:
    name = "genopt::cuda::(anonymous namespace)::norm<genopt::Measure<(genopt::Norm)0>, float>"
    assert launches.kernel_name(f"void {name}(genopt::cuda::Table, int)") == name


# --- what nvcc makes ------------------------------------------------------------------------------------------------

SOURCE = """
extern "C" __global__ void scale(const float4* in, float* out) {
  const float4 x = in[threadIdx.x];
  float sum = x.x / x.y;
  for (unsigned i = 0; i < threadIdx.x % 5; ++i) sum = sqrtf(fabsf(sum)) + x.z;
  for (int other = 1; other < 32; other *= 2) sum += __shfl_xor_sync(~0u, sum, other);
  out[threadIdx.x] = sum * x.w;
}
"""


@pytest.mark.skipif(toolchain.missing() is not None, reason=str(toolchain.missing()))
def test_a_compiled_kernel(tmp_path: Path) -> None:
    (tmp_path / "scale.cu").write_text(SOURCE)
    command = ["nvcc", *toolchain.flags(), "-o", str(tmp_path / "scale.cubin"), str(tmp_path / "scale.cu")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert re.search(r"Used \d+ registers", told)
    command = [str(toolchain.nvdisasm()), "-c", str(tmp_path / "scale.cubin")]
    program = parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["scale"]

    numbers = np.random.default_rng(1).standard_normal(4 * LANES).astype(np.float32)
    warp = warp_of("NOP", numbers)
    warp.program = program
    result = output_of(warp).copy()

    x, y, z, w = numbers.reshape(LANES, 4).T
    total = x / y
    for lane in range(LANES):
        for _ in range(lane % 5):
            total[lane] = np.sqrt(np.abs(total[lane])) + z[lane]
    for other in (1, 2, 4, 8, 16):
        total = total + total[np.arange(LANES) ^ other]
    np.testing.assert_array_equal(result, total * w)
