"""The HLO parser: traffic of hand-written and of compiled programs against counts by hand and XLA's own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from rpt_jax.preflight.hlo import Collective, Source, first_group, loop_scope, traffic

# A program for four devices. A loop of three iterations gathers 16 floats from each of two devices, then sums 64 over all four.
# A loop with an unknown trip count, which runs twice in a row, passes 8 floats on. A fusion reads one of four rows of a matrix.
PROGRAM = """HloModule jit_f, is_scheduled=true, num_partitions=4

%row (p.0: f32[4,16], p.1: s32[]) -> f32[1,16] {
  %p.0 = f32[4,16]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  ROOT %slice = f32[1,16]{1,0} dynamic-slice(%p.0, %p.1), dynamic_slice_sizes={1,16}
}

%three (c: (s32[], f32[16])) -> pred[] {
  %c = (s32[]{:T(128)}, f32[16]{0}) parameter(0)
  %n = s32[] constant(3)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%turn (b: (s32[], f32[16])) -> (s32[], f32[16]) {
  %b = (s32[]{:T(128)}, f32[16]{0}) parameter(0)
  %x = f32[16]{0} get-tuple-element(%b), index=1
  %gathered = f32[32]{0} all-gather(%x), channel_id=1, replica_groups=[2,2]<=[4], dimensions={0}
  %wide = f32[64]{0} broadcast(%x), dimensions={}
  %sum = f32[64]{0} all-reduce(%wide), channel_id=2, replica_groups=mesh['a'=2,'b'=2] {'a','b'}, to_apply=%add
  ROOT %out = (s32[]{:T(128)}, f32[16]{0}) tuple(%i, %x)
}

%open (c.1: (s32[], s32[])) -> pred[] {
  %c.1 = (s32[], s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%c.1), index=0
  %n.1 = s32[] get-tuple-element(%c.1), index=1
  ROOT %lt.1 = pred[] compare(%i.1, %n.1), direction=LT
}

%pass (b.1: (s32[], s32[])) -> (s32[], s32[]) {
  %b.1 = (s32[], s32[]) parameter(0)
  %y = f32[8]{0} constant({...})
  %passed = f32[8]{0} collective-permute(%y), channel_id=3, source_target_pairs={{0,1},{1,0}}
  ROOT %out.1 = (s32[], s32[]) tuple(%i.1, %n.1)
}

ENTRY %main (a: f32[4,16], k: s32[]) -> f32[1,16] {
  %a = f32[4,16]{1,0} parameter(0)
  %k = s32[] parameter(1)
  %t = (s32[], f32[16]{0}) tuple(%k, %a)
  %loop = (s32[], f32[16]{0}) while(%t), condition=%three, body=%turn
  %t.1 = (s32[], s32[]) tuple(%k, %k)
  %first = (s32[], s32[]) while(%t.1), condition=%open, body=%pass, metadata={op_name="jit(f)/decode_loop/while"}
  %second = (s32[], s32[]) while(%first), condition=%open, body=%pass, metadata={op_name="jit(f)/decode_loop/while"}
  ROOT %taken = f32[1,16]{1,0} fusion(%a, %k), kind=kLoop, calls=%row
}
"""


def test_collectives_count_as_often_as_their_loops_run():
    found = traffic(PROGRAM, {"decode_loop": (5, 0)}, hosts=[0, 0, 1, 1])
    gather = Collective(kind="all-gather", size=2, in_host=True)
    reduce = Collective(kind="all-reduce", size=4, in_host=False)
    permute = Collective(kind="collective-permute", size=2, in_host=True)
    # An all-gather sends its 64 bytes to one other device; an all-reduce of 256 sends three quarters of them twice.
    assert found.sent == {gather: 3 * 64, reduce: 3 * 2 * 256 * 3 / 4, permute: 5 * 32}
    assert found.runs == {gather: 3, reduce: 3, permute: 5}
    assert not found.unknown_loops


def test_loops_with_an_unknown_trip_count_are_counted_once_and_named():
    found = traffic(PROGRAM, {}, hosts=[0] * 4)
    assert found.unknown_loops == {"jit(f)/decode_loop/while"}
    assert found.runs[Collective(kind="collective-permute", size=2, in_host=True)] == 2


def test_only_the_slice_of_a_sliced_array_is_read():
    # The fusion reads and writes a row of 64 bytes and reads an index of 4. Each of three iterations takes an all-gather
    # (64 + 128), a broadcast (64 + 256), an all-reduce (256 + 256) and the comparison of two numbers of 4 bytes to 1.
    found = traffic(PROGRAM, {"decode_loop": (0,)}, hosts=[0] * 4)
    assert found.memory == 64 + 64 + 4 + 3 * (192 + 320 + 512 + 9)


def test_traffic_is_counted_by_where_it_comes_from():
    found = traffic(PROGRAM, {"decode_loop": (5, 0)}, hosts=[0] * 4)
    assert sum(source.memory for source in found.sources) == found.memory
    # The two loops that pass 8 floats on stand for one permutation of 2 · 32 bytes; only the first of them runs.
    assert found.sources[0] == Source(scope="", opcode="all-reduce", runs=3, memory=3 * 512)
    assert Source(scope="", opcode="collective-permute", runs=5, memory=5 * 64) in found.sources


FUSIONS = """%same (p: f32[8,4]) -> f32[4,8] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %q = f32[4,8]{0,1} bitcast(%p)
}

%sum (p.1: f32[8,4]) -> f32[4] {
  %p.1 = f32[8,4]{1,0} parameter(0)
  %inner = f32[4,8]{0,1} fusion(%p.1), kind=kLoop, calls=%same
  ROOT %r = f32[4]{0} negate(%inner)
}

%padded (p.2: f32[8,4], i: s32[]) -> f32[2,4] {
  %p.2 = f32[8,4]{1,0} parameter(0)
  %zero = f32[] constant(0)
  %pad = bf16[16,4]{1,0} pad(%p.2, %zero), padding=0_8x0_0
  %i = s32[] parameter(1)
  ROOT %s = bf16[2,4]{1,0} dynamic-slice(%pad, %i), dynamic_slice_sizes={2,4}
}

%written (p.3: f32[8,4], k.3: s32[1,2], u: f32[1]) -> f32[8,4] {
  %p.3 = f32[8,4]{1,0} parameter(0)
  %k.3 = s32[1,2]{1,0} parameter(1)
  %u = f32[1]{0} parameter(2)
  ROOT %w = f32[8,4]{1,0} scatter(%p.3, %k.3, %u), to_apply=%second
}

ENTRY %main (a: f32[8,4], k: s32[]) -> f32[4] {
  %a = f32[8,4]{1,0} parameter(0)
  %k = s32[] parameter(1)
  INSTRUCTION
}
"""


@pytest.mark.parametrize(
    ("instruction", "moved"),
    [
        # A nested fusion passes the array on in another shape.
        ("ROOT %b = f32[4]{0} fusion(%a), kind=kLoop, calls=%sum", 128 + 16),
        # Two of sixteen rows of the padded array are an eighth of its 128 bytes.
        ("ROOT %b = bf16[2,4]{1,0} fusion(%a, %k), kind=kLoop, calls=%padded", 128 / 8 + 4 + 16),
        # A scatter reads indices (8 bytes) and updates (4), which it writes in place.
        ("ROOT %b = f32[8,4]{1,0} fusion(%a, %k, %k), kind=kCustom, calls=%written", 8 + 4 + 4),
        # On the way to and from the chip's own memory, S(1).
        ("%b = (f32[8,4]{1,0:S(1)}, f32[8,4]{1,0}, u32[]{:S(2)}) copy-start(%a)", 128),
        ("%b = f32[8,4]{1,0} copy-done(%a)", 128),
        ("%b = f32[8,4]{1,0:S(1)} copy-done(%a)", 0),
        ("%b = f32[2,4]{1,0} slice(%a), slice={[0:2], [0:4]}", 32 + 32),
        ("%b = ((f32[8,4]{1,0}), f32[2,4]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:2], [0:4]}", 32),
        ("%b = f32[1,4]{1,0:S(1)} dynamic-slice(%a, %k), dynamic_slice_sizes={1,4}", 16),
        # A TPU fills up tiles: of the two minor dimensions, given first, the minor one has the tile's second size.
        ("ROOT %b = bf16[3,9,4]{2,1,0:T(8,128)(2,1)} convert(%a)", 128 + 3 * 16 * 128 * 2),
        ("ROOT %b = f32[3,9,4]{0,1,2:T(8,128)} convert(%a)", 128 + 4 * 16 * 128 * 4),
        ("ROOT %b = f32[5]{0:T(256)} convert(%a)", 128 + 256 * 4),
        ("ROOT %b = f32[]{:T(128)} convert(%a)", 128 + 4),
    ],
)
def test_what_an_instruction_reads_and_writes(instruction: str, moved: float):
    assert traffic(FUSIONS.replace("INSTRUCTION", instruction), {}, hosts=[0]).memory == moved


def test_a_kernel_moves_what_is_said_of_it():
    kernel = """ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  ROOT %b = f32[4]{0} custom-call(%a), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/jvp(fold)/pallas_call"}
}
"""

    def fold(rows: int) -> float:
        return 25.0 * rows

    moved = [traffic(kernel, {}, [0], known).memory for known in ({"fold": fold}, {"unfold": fold})]
    # Four rows; an unknown kernel reads its operands and writes its results once.
    assert moved == [100, 32]
    on_chip = kernel.replace("%b = f32[4]{0}", "%b = f32[4]{0:S(1)}")
    assert traffic(on_chip, {}, [0], {"fold": fold}).memory == 100 - 16


def test_a_compiled_scan_reads_one_layer_of_weights_per_iteration():
    def run(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    x, w = jnp.zeros((256, 256)), jnp.zeros((20, 256, 256))
    moved = traffic(jax.jit(run).lower(x, w).compile().as_text(), {}, hosts=[0]).memory
    # Input, weights and output of each iteration; up to 2.5 times that if XLA makes copies.
    assert 20 * 3 * x.nbytes <= moved <= 2.5 * 20 * 3 * x.nbytes


def test_without_loops_it_agrees_with_xla():
    x, w = jnp.zeros((128, 256)), jnp.zeros((256, 256))
    compiled = jax.jit(lambda x, w: jnp.tanh(x @ w) @ w[:128].T).lower(x, w).compile()
    expected = compiled.cost_analysis()["bytes accessed"]
    assert traffic(compiled.as_text(), {}, hosts=[0]).memory == pytest.approx(expected, rel=0.1)


def test_a_data_dependent_loop_is_counted_by_its_scope_forward_and_backward():
    """The scope of a loop survives differentiation and compilation."""

    @jax.custom_vjp
    def attend(x, n):
        return loop(x, n)

    def save(x, n):
        return loop(x, n), (x, n)

    def backward(saved, dy):
        return loop(dy, saved[1]), None

    @jax.named_scope("inner")
    def loop(x, n):
        return jax.lax.fori_loop(0, n, lambda _, y: jnp.tanh(y @ y), x)

    attend.defvjp(save, backward)
    x = jnp.eye(64)
    text = jax.jit(jax.grad(lambda x, n: attend(x, n).sum())).lower(x, 3).compile().as_text()
    once, many = (traffic(text, {"inner": (count,)}, hosts=[0]) for count in (1, 10))
    assert not once.unknown_loops and not many.unknown_loops
    assert many.memory > 5 * once.memory
    assert traffic(text, {"renamed": (10,)}, hosts=[0]).unknown_loops


@pytest.mark.parametrize(
    ("op_name", "scope"),
    [
        ("jit(f)/decode_loop/while", "decode_loop"),
        ("jit(f)/decode_loop/while/body/key_blocks/while", "key_blocks"),
        ("jit(f)/while/body/transpose(jvp(key_blocks))/while", "key_blocks"),
        ("jit(f)/decode_loop/key_blocks/shard_map", "key_blocks"),
        ("jit(f)/decode_loop/while/body/vmap()/while", None),
        ("jit(f)/another_decode_loop/while", None),
        ("jit(f)/while", None),
    ],
)
def test_a_loop_belongs_to_the_scope_that_it_stands_in_directly(op_name: str, scope: str | None):
    assert loop_scope(op_name, ("decode_loop", "key_blocks")) == scope


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, x", [0, 2]),
        ("replica_groups=[2,4]<=[8], x", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x", [0, 2]),
        ("replica_groups={}, x", [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_groups_of_a_collective_are_read_in_every_notation(attributes: str, group: list[int]):
    assert first_group(attributes, 8) == group
