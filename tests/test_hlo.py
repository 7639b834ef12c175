"""Tests collectives and memory traffic of HLO text, recorded and compiled here."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from jaxii.distributed.mesh import DATA_AXIS, make_mesh
from jaxii.planner.hlo import Collective, collectives, memory_bytes, parse

# From a program for v5e:4x4 (libtpu 0.0.52), without its irrelevant parts.
TPU_LOOP = """\
HloModule jit_g, is_scheduled=true, entry_computation_layout={(f32[100]{0})->f32[100]}

%region_2.2 (psum.1: bf16[], psum.4: bf16[]) -> bf16[] {
  ROOT %add.4 = bf16[]{:T(256)} add(%psum.1, %psum.4), metadata={op_name="add"}
}

%wide.region_1.3_spmd.sunk (wide.param.2: (s32[], f32[9])) -> (s32[], f32[9]) {
  %psum.9 = bf16[1000,100]{0,1:T(8,128)(2,1)S(1)} all-reduce(%multiply_fusion.2), \
channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%region_2.2, \
metadata={op_name="jit(g)/while/body/all-reduce (psum)"}
}

ENTRY %main.4 (param.0: f32[100]) -> f32[100] {
  %while.10 = (s32[]{:T(128)}, f32[9]{0:T(128)S(1)}) while(%tuple.15), \
condition=%wide.region_3.4_spmd, body=%wide.region_1.3_spmd.sunk
  %all-reduce.1 = (f32[64]{0:T(128)}, /*index=1*/f32[7,3]{1,0}, s32[]{:T(128)}) \
all-reduce(%a, %b, %c), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%region_0.0
  ROOT %fusion = f32[100]{0} fusion(%all-reduce.1), kind=kLoop, calls=%fused
}
"""
# Asynchronous, as XLA writes them for GPUs and TPUs.
ASYNCHRONOUS = """\
ENTRY %main (p: f32[4,8]) -> f32[32,8] {
  %ag = (f32[4,8]{1,0}, f32[32,8]{1,0}) all-gather-start(%p), \
replica_groups=[2,8]<=[16], dimensions={0}
  ROOT %end = f32[32,8]{1,0} all-gather-done(%ag)
}
"""


def compiled(function, *shapes):
    mesh = make_mesh()
    spec = PartitionSpec(DATA_AXIS)
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    text = jax.jit(mapped).lower(*arguments).compile().as_text()
    return collectives(parse(text), loop_runs=3)


def test_a_tuple_counts_as_one_all_reduce_of_all_its_bytes():
    found = collectives(parse(TPU_LOOP))[1]
    assert found == Collective(
        kind="all-reduce", num_bytes=4 * (64 + 21 + 1), group_size=8
    )


def test_a_collective_in_a_loop_runs_as_often_as_the_loop():
    found = collectives(parse(TPU_LOOP), loop_runs=3)[0]
    assert found == Collective(
        kind="all-reduce", num_bytes=2 * 100_000, group_size=4, times=3
    )


def test_an_asynchronous_collective_counts_once_by_its_result():
    (found,) = collectives(parse(ASYNCHRONOUS))
    assert found == Collective(kind="all-gather", num_bytes=4 * 32 * 8, group_size=8)


@pytest.mark.parametrize(
    ("function", "kind", "num_bytes"),
    [
        (lambda x: jax.lax.psum(x, DATA_AXIS), "all-reduce", 4 * 16),
        (lambda x: jax.lax.all_gather(x, DATA_AXIS), "all-gather", 4 * 8 * 16),
        (
            lambda x: jax.lax.psum_scatter(x, DATA_AXIS, tiled=True),
            "reduce-scatter",
            4 * 2,
        ),
        (
            lambda x: jax.lax.ppermute(x, DATA_AXIS, [(i, i ^ 1) for i in range(8)]),
            "collective-permute",
            4 * 16,
        ),
        (
            lambda x: jax.lax.all_to_all(x, DATA_AXIS, 0, 0, tiled=True),
            "all-to-all",
            4 * 16,
        ),
    ],
)
def test_a_compiled_collective_is_found_with_its_bytes(function, kind, num_bytes):
    (found,) = compiled(function, (128,))
    assert (found.kind, found.num_bytes) == (kind, num_bytes)
    assert found.group_size in (0, 8) and found.times == 1


def test_groups_of_devices_are_read():
    groups = [[0, 1], [2, 3], [4, 5], [6, 7]]
    (found,) = compiled(
        lambda x: jax.lax.psum(x, DATA_AXIS, axis_index_groups=groups), (128,)
    )
    assert found.group_size == 2


def test_a_compiled_loop_marks_its_collectives_and_no_others():
    def looped(x):
        def body(carry, _):
            return jax.lax.psum(jnp.sin(carry), DATA_AXIS), None

        carry, _ = jax.lax.scan(body, x, None, length=3)
        return carry + jax.lax.pmax(x, DATA_AXIS)

    assert sorted(one.times for one in compiled(looped, (128,))) == [1, 3]


def test_a_program_of_one_device_has_none():
    lowered = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32))
    assert collectives(parse(lowered.compile().as_text())) == ()


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
        # To the chip and back: the number of moved bytes, counted on the memory side.
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
