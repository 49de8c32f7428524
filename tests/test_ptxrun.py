"""The executor of compiled kernels must detect the faults it is made for."""

import numpy as np
import ptxrun
import pytest

pytestmark = pytest.mark.any_torch
HEAD = ".version 8.0\n.target sm_80\n.visible .entry k(.param .u64 .ptr .global .align 1 a) .reqntid 64\n"
REGISTERS = ".reg .pred %p<9>; .reg .b32 %r<9>; .reg .b64 %d<9>;"
ADDRESS = "ld.param.b64 %d1, [a]; mov.u32 %r1, %tid.x; mul.wide.u32 %d2, %r1, 4; add.s64 %d3, %d1, %d2;"


def run(body, array=None, **options):
    array = np.zeros(64, np.uint32) if array is None else array
    ptxrun.launch(f"{HEAD}{{ {REGISTERS} {ADDRESS} {body} ret; }}", (2,), [array], **options)
    return array


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("st.global.b32 [%d3+4], %r1;", "out of bounds"),
        ("ld.global.b32 %r2, [%d3+-4];", "out of bounds|wild"),
        ("ld.global.b32 %r2, [%d3+2];", "misaligned"),
        ("st.global.b32 [%d1], %r1;", "different values"),
        ("st.global.b32 [%d3], 7;", "race"),
        ("setp.lt.u32 %p1, %r1, 5; @%p1 bar.sync 0; @!%p1 bar.sync 0;", "barrier"),
        ("setp.lt.u32 %p1, %r1, 5; @%p1 shfl.sync.bfly.b32 %r2, %r1, 16, 31, -1;", "member mask"),
        ("trap;", "trap"),
    ],
)
def test_a_fault(body, complaint):
    with pytest.raises(ptxrun.FaultError, match=complaint):
        run(body)


@pytest.mark.parametrize("body", ["frobnicate.b32 %r1, %r2;", "ld.global.b32.strange %r2, [%d3];", "mov.f8 %r1, %r2;"])
def test_what_is_not_known_is_refused(body):
    with pytest.raises(ptxrun.UnknownError):
        run(body)


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_packed_halves_are_compared_each_for_itself(kind):
    one, nan = {"f16x2": (0x3C00, 0x7E00), "bf16x2": (0x3F80, 0x7FC0)}[kind]
    halves = np.tile(np.array([one, nan], np.uint16), 64)
    body = (
        f"ld.global.b32 %r2, [%d3]; setp.eq.{kind} %p1|%p2, %r2, %r2; selp.b32 %r3, 1, 0, %p1; selp.b32 %r4, 2, 0, %p2;"
        "add.s32 %r5, %r3, %r4; mov.u32 %r6, %ctaid.x; setp.eq.u32 %p3, %r6, 0; @%p3 st.global.b32 [%d3], %r5;"
    )
    assert (run(body, halves.view(np.uint32), check_races=False) == 1).all()


def test_bfloat16_widens_to_double():
    body = (
        ".reg .b16 %h<3>; ld.global.b32 %r2, [%d3]; mov.b32 {%h1, %h2}, %r2; cvt.f64.bf16 %d4, %h2;"
        "cvt.rn.f32.f64 %r3, %d4; mov.u32 %r6, %ctaid.x; setp.eq.u32 %p3, %r6, 0; @%p3 st.global.b32 [%d3], %r3;"
    )
    values = np.linspace(-3e38, 3e38, 64, dtype=np.float32).view(np.uint32)
    result = run(body, values.copy(), check_races=False)
    assert (result == values & np.uint32(0xFFFF0000)).all()  # a bfloat16 is the upper half of a float32


def test_the_absolute_value_of_packed_bfloat16_is_that_of_both_halves():
    halves = np.tile(np.array([0xBF80, 0xFFC1, 0x3F80, 0x8000], np.uint16), 32)
    body = (
        "ld.global.b32 %r2, [%d3]; abs.bf16x2 %r3, %r2; mov.u32 %r6, %ctaid.x; setp.eq.u32 %p3, %r6, 0;"
        "@%p3 st.global.b32 [%d3], %r3;"
    )
    result = run(body, halves.view(np.uint32), check_races=False).view(np.uint16)
    assert result[:4].tolist() == [0x3F80, 0x7FC1, 0x3F80, 0]


@pytest.mark.parametrize("kind", ["u16x2", "s16x2"])
def test_packed_integers_are_added_each_for_itself(kind):
    halves = np.tile(np.array([0xFFFF, 3, 0x7FFF, 0x8000], np.uint16), 32)
    body = (
        f"ld.global.b32 %r2, [%d3]; add.{kind} %r3, %r2, %r2; mov.u32 %r6, %ctaid.x; setp.eq.u32 %p3, %r6, 0;"
        "@%p3 st.global.b32 [%d3], %r3;"
    )
    result = run(body, halves.view(np.uint32), check_races=False).view(np.uint16)
    assert result[:4].tolist() == [0xFFFE, 6, 0xFFFE, 0]  # no carry from the low half into the high one
