"""Each rule finds what it is there for, in fragments of machine code."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from tests.kernels.machine_code import latency, rules
from tests.kernels.machine_code.compiled import Compiled
from tests.kernels.machine_code.instructions import ENTRY, Code
from tests.kernels.machine_code.tensors import Tensors, argument_names

BEGIN = [f"ld.param.b64 %rd{index}, [k_param_{index}];" for index in range(3)]


def fragment(
    ptx: Sequence[str] = (),
    sass: Sequence[str] = (),
    arguments: Sequence[str] = ("partials", "counters", "weight"),
    ttgir: str = "",
    num_warps: int = 4,
) -> Compiled:
    """A kernel of these instructions; %rd0, %rd1 ... point at its arguments."""
    parameters = ", ".join(f"%{name}: !tt.ptr<f32> {{tt.divisibility = 16 : i32}}" for name in arguments)
    return Compiled(
        kernel="k",
        registers=64,
        stack=0,
        shared_bytes=65536,
        num_warps=num_warps,
        programs=192,
        ttgir=f"tt.func public @k({parameters}) attributes {{noinline = false}} {{\n{ttgir}",
        ptx="\n".join([".visible .entry k(", ")", "{", *BEGIN, *ptx, "}"]),
        sass="\n".join(f"/*{16 * index:04x}*/  {line}" for index, line in enumerate(sass)),
    )


STORE = "st.global.v4.b32 [ %rd0 + 0 ], { %r1, %r2, %r3, %r4 };"
BARRIER = "bar.sync 0;"
ARRIVE = "@%p1 atom.global.gpu.acq_rel.add.u32 %r5, [ %rd1 + 0 ], %r6;"
LOAD = "ld.global.cg.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd3 + 0 ];"
MERGE = [
    *(STORE, BARRIER, ARRIVE, BARRIER, "@%p2 bra $L__BB0_2;", "add.s64 %rd3, %rd0, 4096;"),
    *(LOAD, "st.global.b32 [ %rd1 + 0 ], %r7;", "$L__BB0_2:", "ret;"),
]


class TestPaths:
    LOOP = ("$L__BB0_1:", "add.s32 %r1, %r1, 1;", "@%p1 bra $L__BB0_1;", "bra.uni $L__BB0_3;", "trap;")
    REST = ("$L__BB0_3: // the end", ".loc 1 2 3", "ret;", "add.s32 %r2, %r2, 1;")
    CODE = Code.of_ptx(fragment([*LOOP, *REST]).ptx)

    def test_lead_through_jumps_and_not_past_ends(self) -> None:
        texts = [self.CODE.instructions[place].text.split()[0] for place in sorted(self.CODE.reached([ENTRY]))]
        assert texts == ["ld.param.b64"] * 3 + ["add.s32", "bra", "bra.uni", "ret"]

    def test_end_at_a_stop(self) -> None:
        [loop, uniform] = self.CODE.find("bra")
        assert self.CODE.reached([3], [loop]) == {loop}
        assert self.CODE.reached([loop], [uniform]) == {3, loop, uniform}

    def test_of_machine_code_know_jumps_with_conditions_of_their_own(self) -> None:
        lines = ["BRA.U UP0, 0x30 ;", "@P0 EXIT ;", "@!PT LDS RZ, [RZ] ;", "BRA 0x50 ;", "NOP ;", "EXIT ;"]
        code = Code.of_sass(fragment(sass=lines).sass)
        assert [code.instructions[place].text for place in sorted(code.reached([ENTRY]))] == [
            *("BRA.U UP0, 0x30", "EXIT", "BRA 0x50", "EXIT"),
        ]  # fmt: skip

    def test_with_jumps_to_unknown_places_are_refused(self) -> None:
        with pytest.raises(ValueError, match="a jump to an unknown place: brx"):
            Code.of_ptx(fragment(["brx.idx %r1, targets;"]).ptx).reached([ENTRY])

    def test_of_inline_assembly_jump_within_its_block(self) -> None:
        block = ["{", ".reg .pred done;", "again:", "mbarrier.try_wait.b64 done, [%r1], %r2;", "@!done bra again;", "}"]
        code = Code.of_ptx(fragment([*block, *block]).ptx)
        assert [code.successors[place] for place in code.find("bra")] == [[5, 3], [7, 5]]


class TestTensors:
    def test_are_those_that_an_address_is_computed_from(self) -> None:
        lines = [
            "ld.global.b32 %r1, [ %rd1 + 0 ];",
            "mad.wide.s32 %rd4, %r1, 4, %rd0;",
            "selp.b64 %rd5, %rd4, %rd2, %p1;",
            "cp.async.cg.shared.global [ %r9 + 0 ], [ %rd4 + 16 ], 0x10, %r8;",
            "st.global.b32 [ %rd5 + 0 ], %r1;",
        ]
        kernel = fragment(lines)
        code = Code.of_ptx(kernel.ptx)
        tensors = Tensors(code, argument_names(kernel.ttgir))
        assert [tensors.at(place) for place in code.find(r"ld\.global|cp|st")] == [
            *({"counters"}, {"partials"}, {"partials", "weight"}),
        ]  # fmt: skip


class TestMergeProtocol:
    def test_that_is_kept_has_no_fault(self) -> None:
        assert rules.merge_protocol(fragment(MERGE)) == []
        assert rules.merge_protocol(fragment([STORE])) == []

    @pytest.mark.parametrize(
        ("place", "instead", "fault"),
        [
            (1, [], "no barrier between a store and the arrival"),
            (1, ["@%p3 bar.sync 0;"], "no barrier between a store and the arrival"),
            (1, ["@%p3 bra $L__BB0_1;", BARRIER, "$L__BB0_1:"], "no barrier between a store and the arrival"),
            (2, [ARRIVE.replace("acq_rel", "relaxed")], "an arrival that is not acq_rel.gpu"),
            (2, [ARRIVE.replace("gpu", "cta")], "an arrival that is not acq_rel.gpu"),
            (2, ["red.global.gpu.release.add.u32 [ %rd1 + 0 ], %r6;"], "an arrival that is not acq_rel.gpu"),
            (3, [], "no barrier between the arrival and a load"),
            (6, [LOAD.replace(".cg", "")], "a load that the L1 cache may answer"),
            (6, [LOAD.replace(".cg", ".ca")], "a load that the L1 cache may answer"),
            (6, [LOAD.replace("%rd3", "%rd2")], "no load behind the arrival reads what"),
        ],
    )
    def test_is_broken(self, place: int, instead: list[str], fault: str) -> None:
        found = rules.merge_protocol(fragment([*MERGE[:place], *instead, *MERGE[place + 1 :]]))
        assert any(line.startswith(fault) for line in found), found


def test_a_non_coherent_load_is_found_in_both_codes() -> None:
    kernel = fragment(["ld.global.nc.v4.b32 { %r1 }, [ %rd0 + 0 ];"], ["LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;"])
    assert len(rules.no_non_coherent_load(kernel)) == 2
    assert rules.no_non_coherent_load(fragment([LOAD], ["LDG.E.128.STRONG.GPU R4, desc[UR4][R2.64] ;"])) == []


class TestProxyFence:
    WAIT, FENCE = "cp.async.wait_group 6;", "fence.proxy.async.shared::cta;"
    PRODUCT = "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%r1}, %rd4, %rd5, %p3, 1, 1, 1, 0;"

    def test_stands_between_the_wait_and_the_product(self) -> None:
        assert rules.proxy_fence(fragment([self.WAIT, BARRIER, self.FENCE, self.PRODUCT])) == []

    @pytest.mark.parametrize("product", [PRODUCT, "@%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd4, %rd5;"])
    def test_is_missing(self, product: str) -> None:
        assert rules.proxy_fence(fragment([self.FENCE, self.WAIT, BARRIER, product]))

    def test_is_missing_in_the_second_turn_of_a_loop(self) -> None:
        turn = ["$L__BB0_1:", self.PRODUCT, self.WAIT, BARRIER, "@%p1 bra $L__BB0_1;"]
        assert rules.proxy_fence(fragment([self.WAIT, self.FENCE, *turn]))
        assert not rules.proxy_fence(fragment([self.WAIT, self.FENCE, *turn[:-1], self.FENCE, turn[-1]]))


class TestBarrierBeforeSharedStores:
    LINES = ("HGMMA.64x64x16.F32 R24, gdesc[UR8], R24 ;", "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;", "STS [R2], R3 ;")

    @pytest.mark.parametrize("store", ["STS.128 [R2], R4 ;", "LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64] ;"])
    def test_is_missing(self, store: str) -> None:
        assert rules.barrier_before_shared_stores(fragment(sass=[*self.LINES[:2], store], num_warps=8))

    def test_is_there_or_not_needed(self) -> None:
        lines = [*self.LINES[:2], "BAR.SYNC.DEFER_BLOCKING 0x0 ;", self.LINES[2]]
        assert rules.barrier_before_shared_stores(fragment(sass=lines, num_warps=8)) == []
        assert rules.barrier_before_shared_stores(fragment(sass=self.LINES, num_warps=4)) == []

    @pytest.mark.parametrize(
        ("copied", "is_widened"), [(("i8", "i32"), True), (("f8E4M3FN",), True), (("i8", "f16"), False)]
    )
    def test_is_not_needed_for_copies_of_what_products_do_not_read(
        self, copied: Sequence[str], is_widened: bool
    ) -> None:
        lines = [*self.LINES[:2], "LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64] ;"]
        ttgir = "\n".join(
            f"%k = ttg.async_copy_global_to_local %a, %b : tensor<64x64x!tt.ptr<{dtype}>, #blocked> -> <64x64x{dtype}>"
            for dtype in copied
        )
        found = rules.barrier_before_shared_stores(fragment(sass=lines, ttgir=ttgir, num_warps=8))
        assert (found == []) == is_widened
        stored = fragment(sass=self.LINES, ttgir=ttgir, num_warps=8)
        assert rules.barrier_before_shared_stores(stored)


class TestNothingBeforeGridWait:
    WAIT = "griddepcontrol.wait;"
    COPY = "cp.async.cg.shared.global [ %r9 + 0 ], [ %rd2 + 0 ], 0x10, %r8;"

    @pytest.mark.parametrize("access", [STORE, LOAD.replace("%rd3", "%rd0"), COPY, ARRIVE])
    def test_is_broken_by_any_access(self, access: str) -> None:
        assert rules.nothing_before_grid_wait(fragment([access, self.WAIT]))
        assert rules.nothing_before_grid_wait(fragment(["@%p1 bra $L__BB0_1;", self.WAIT, "$L__BB0_1:", access]))
        assert rules.nothing_before_grid_wait(fragment([self.WAIT, access])) == []
        assert rules.nothing_before_grid_wait(fragment([access])) == []

    def test_lets_weights_be_read_early_where_that_is_meant(self) -> None:
        sass = ["LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64] ;", "ACQBULK ;"]
        kernel = fragment([self.COPY, self.WAIT], sass)
        assert rules.nothing_before_grid_wait(kernel)
        assert rules.nothing_before_grid_wait(kernel, except_for=["weight"]) == []
        written = fragment([self.COPY, STORE.replace("%rd0", "%rd2"), self.WAIT], sass)
        assert rules.nothing_before_grid_wait(written, except_for=["weight"])

    def test_is_broken_by_an_assembler_that_moves_accesses_up(self) -> None:
        kernel = fragment([self.WAIT, LOAD], ["LDG.E R2, desc[UR4][R4.64] ;", "ACQBULK ;"])
        assert rules.nothing_before_grid_wait(kernel)


class TestReductionLayouts:
    @staticmethod
    def kernel(threads: int, *, warps: int = 4, operation: str = "addf", shape: str = "16x64") -> Compiled:
        layout = f"sizePerThread = [1, 8], threadsPerWarp = [4, {threads}], warpsPerCTA = [{warps}, 1], order = [1, 0]"
        reduction = [
            '%mean = "tt.reduce"(%values) <{axis = 1 : i32}> ({',
            "^bb0(%a: f32 loc(#loc1), %b: f32 loc(#loc1)):",
            f"  %sum = arith.{operation} %a, %b : f32 loc(#loc1)",
            "  tt.reduce.return %sum : f32 loc(#loc1)",
            f"}}) : (tensor<{shape}xf32, #blocked1>) -> tensor<16xf32, #ttg.slice<{{dim = 1, parent = #blocked1}}>>",
        ]
        return fragment(ttgir=f"\n#blocked1 = #ttg.blocked<{{{layout}}}>\n" + "\n".join(reduction))

    def test_of_a_maximum_are_not_taken_for_the_sum_behind_it(self) -> None:
        maximum = self.kernel(16, operation="maxnumf")
        both = replace(maximum, ttgir=maximum.ttgir + self.kernel(8).ttgir.replace("#blocked1", "#blocked2"))
        assert rules.reduction_layouts([both, self.kernel(8)]) == []
        assert rules.reduction_layouts([both, self.kernel(16)]) != []

    def test_differ(self) -> None:
        [fault] = rules.reduction_layouts([self.kernel(8), self.kernel(8), self.kernel(16)])
        assert fault.startswith("sums of 64 numbers along axis 1 have 2 layouts")

    @pytest.mark.parametrize("difference", [{"warps": 8}, {"operation": "maxnumf"}, {"shape": "16x128"}])
    def test_may_differ_where_the_order_of_additions_does_not(self, difference: dict) -> None:
        threads = 8 if "warps" in difference else 16
        assert rules.reduction_layouts([self.kernel(8), self.kernel(threads, **difference)]) == []


class TestLatency:
    COPIES = tuple(
        f"cp.async.cg.shared.global [ %r9 + {offset} ], [ %rd{tensor} + 0 ], 0x10, %r8;"
        for offset, tensor in enumerate((0, 2, 2, 2))
    )

    def test_bytes_in_flight_are_the_weights_until_the_first_wait(self) -> None:
        kernel = fragment([*self.COPIES, "cp.async.wait_group 1;", self.COPIES[1]])
        assert latency.programs_per_sm(kernel) == pytest.approx(192 / 132)
        assert latency.bytes_in_flight(kernel) == pytest.approx(3 * 16 * 128 * 192 / 132)
        assert latency.bytes_in_flight(fragment([self.COPIES[0], "cp.async.wait_group 0;"])) == 0

    @pytest.mark.parametrize(
        ("registers", "shared", "warps", "programs"), [(64, 85_000, 4, 2), (80, 24_600, 4, 6), (128, 65_500, 8, 2)]
    )
    def test_programs_of_a_multiprocessor_are_limited_by_what_they_take(
        self, registers: int, shared: int, warps: int, programs: int
    ) -> None:
        kernel = fragment()
        full = replace(kernel, registers=registers, shared_bytes=shared, num_warps=warps, programs=10**6)
        assert latency.programs_per_sm(full) == programs

    def test_the_first_request_of_a_weight_is_counted_in_machine_code(self) -> None:
        copy = "LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64] ;"
        kernel = fragment(self.COPIES[:2], ["MOV R1, R2 ;", copy, "NOP ;", copy])
        assert latency.instructions_before(kernel) == 3
        assert latency.instructions_before(kernel, "counters") is None
