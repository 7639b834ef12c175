"""What a program moves between a device and its memory, counted in recorded text."""

import jax
import jax.numpy as jnp
import pytest

from jaxii.planner.hlo import parse
from jaxii.planner.traffic import memory_bytes

# Shapes and layouts of a program for v5e (libtpu 0.0.52); S(1) is memory on the chip.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

%fused_computation (param_0: f32[100]) -> f32[100] {{
  %param_0 = f32[100]{{0:T(128)S(1)}} parameter(0)
  ROOT %sine = f32[100]{{0:T(128)}} sine(%param_0)
}}

%body (p: (s32[], f32[50])) -> (s32[], f32[50]) {{
  %p = (s32[]{{:T(128)}}, f32[50]{{0:T(128)}}) parameter(0)
  %x = f32[50]{{0:T(128)}} get-tuple-element(%p), index=1
  %double = f32[50]{{0:T(128)}} fusion(%x), kind=kLoop, calls=%fused_computation.9
}}

ENTRY %main (a: f32[100], b: f32[400]) -> f32[100] {{
  %a = f32[100]{{0:T(128)}} parameter(0)
  %b = f32[400]{{0:T(128)}} parameter(1)
  {line}
}}
"""


def moved(line, loop_runs=1):
    return memory_bytes(parse(PROGRAM.format(line=line)), loop_runs)


@pytest.mark.parametrize(
    ("line", "num_bytes"),
    [
        # Reads 100 numbers and writes 100.
        (
            "%c = f32[100]{0:T(128)} fusion(%a), kind=kLoop, calls=%fused_computation",
            800,
        ),
        ("%c = f32[100]{0:T(128)S(1)} fusion(%a), kind=kLoop, calls=%f", 400),
        ("%c = (f32[100]{0}, bf16[100]{0:S(1)}) fusion(%a, %b), kind=kLoop", 2400),
        ("%c = f32[100]{0:T(128)} multiply(%a, %a)", 800),
        ("%c = f32[100]{0:T(128)} bitcast(%a)", 0),
        # To the chip and back: as much as is moved, on the side that is memory.
        ("%c = (f32[100]{0:S(1)}, f32[100]{0}, u32[]{:S(2)}) copy-start(%a)", 400),
        ("%c = f32[100]{0:S(1)} copy-done(%started)", 0),
        (
            "%c = ((f32[400]{0:T(128)}), f32[80]{0:T(128)S(1)}, s32[]{:S(2)}) "
            "slice-start(%b), slice={[0:80]}",
            320,
        ),
        ("%c = f32[80]{0:T(128)} slice(%b), slice={[0:80]}", 640),
        (
            '%c = f32[500]{0} custom-call(%a, %b), custom_call_target="ConcatBitcast"',
            0,
        ),
    ],
)
def test_what_is_not_on_the_chip_counts_once(line, num_bytes):
    assert moved(line) == num_bytes


def test_a_loop_counts_as_often_as_it_runs():
    line = "%w = (s32[], f32[50]) while(%t), condition=%condition, body=%body"
    assert moved(line) == 400
    assert moved(line, loop_runs=3) == 1200


def test_a_compiled_product_reads_its_factors_and_writes_its_result():
    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    compiled = jax.jit(lambda x, y: x @ y).lower(shape, shape).compile()
    assert memory_bytes(parse(compiled.as_text())) == 3 * 4 * 64 * 64
