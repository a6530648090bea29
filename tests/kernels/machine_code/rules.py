"""What the machine code of a kernel must and must not do: one function a rule, which returns the violations it found.

The rules concern orders that Triton's interpreter cannot show, because it runs one program after the other and each
instruction as it stands.  docs/design/gpu-kernels.md gives their reasons.  Paths are taken as possible whatever the
predicates of jumps; a barrier counts only where it is always executed.
"""

import re
from collections.abc import Iterable, Sequence

from tests.kernels.machine_code.compiled import Compiled
from tests.kernels.machine_code.instructions import ENTRY, Code
from tests.kernels.machine_code.tensors import Tensors, argument_names

WARPS_OF_A_WARPGROUP = 4

_GLOBAL_LOAD = r"ld\.global\.|cp\.async\.c[ag]\.|cp\.async\.bulk\.(?!commit|wait)"
_GLOBAL_ACCESS = _GLOBAL_LOAD + r"|st\.global\.|atom\.|red\.|prefetch\.|cp\.reduce\."
_MATRIX_PRODUCT = r"wgmma\.mma_async|tcgen05\.mma"
"""Products whose operands the matrix units read from shared memory by themselves."""


def _always(code: Code, pattern: str) -> list[int]:
    return [place for place in code.find(pattern) if not code.instructions[place].predicate]


def _shown(code: Code, places: Iterable[int]) -> list[str]:
    return [code.instructions[place].text for place in sorted(places)]


def merge_protocol(kernel: Compiled, except_for: Sequence[str] = ()) -> list[str]:
    """Store, barrier, acq_rel.gpu atomic, barrier, load past the L1 cache, on every path.

    Args:
        kernel: any; one without an atomic merges nothing, and breaks no rule.
        except_for: tensors of which no program reads what another one of the launch stores.
    """
    code = Code.of_ptx(kernel.ptx)
    tensors = Tensors(code, argument_names(kernel.ttgir))
    arrivals, stores, barriers = code.find(r"atom\.|red\."), code.find(r"st\.global\."), _always(code, r"bar\.sync")
    if not arrivals:
        return []
    found = [
        f"an arrival that is not acq_rel.gpu: {text}"
        for text in _shown(code, arrivals)
        if not re.match(r"atom\.global\.gpu\.acq_rel\.|atom\.gpu\.global\.acq_rel\.|atom\.acq_rel\.gpu\.", text)
    ]
    behind = code.reached(arrivals)
    shared = set().union(*(tensors.at(store) for store in stores if code.reached([store]) & set(arrivals)))
    shared -= set(except_for)
    merged = [load for load in code.find(_GLOBAL_LOAD) if load in behind and tensors.at(load) & shared]
    unpublished = [store for store in stores if code.reached([store], barriers) & set(arrivals)]
    found += [f"no barrier between a store and the arrival: {text}" for text in _shown(code, unpublished)]
    early = code.reached(arrivals, barriers) & set(merged)
    found += [f"no barrier between the arrival and a load: {text}" for text in _shown(code, early)]
    found += [
        f"a load that the L1 cache may answer: {text}"
        for text in _shown(code, merged)
        if not re.match(r"ld\.global\.cg\.|cp\.async\.cg\.", text)
    ]
    if not any(code.instructions[load].text.startswith("ld.global.cg.") for load in merged):
        found.append("no load behind the arrival reads what the programs stored before it")
    return found


def no_non_coherent_load(kernel: Compiled) -> list[str]:
    """No load through the texture path, which may return what memory held before the launch."""
    ptx, sass = Code.of_ptx(kernel.ptx), Code.of_sass(kernel.sass)
    return _shown(ptx, ptx.find(r"ld\.global\S*\.nc")) + _shown(sass, sass.find(r"LDG\S*\.CONSTANT"))


def proxy_fence(kernel: Compiled) -> list[str]:
    """A proxy fence between an asynchronous copy's end and a matrix product that reads shared memory by itself."""
    code = Code.of_ptx(kernel.ptx)
    waits, fences = code.find(r"cp\.async\.wait_"), _always(code, r"fence\.proxy\.async")
    reached = code.reached(waits, fences) & set(code.find(_MATRIX_PRODUCT))
    return [f"no proxy fence between a wait for copies and {text.split()[0]}" for text in _shown(code, reached)]


def barrier_before_shared_stores(kernel: Compiled) -> list[str]:
    """In kernels of several warpgroups, a barrier between a wait for products and the next store to shared memory.

    The wait covers a warpgroup's own products only, while another's may still read what is stored over.  Asynchronous
    copies of 8-bit numbers and their scales are no such stores: products read what they are widened to, elsewhere.
    """
    if kernel.num_warps <= WARPS_OF_A_WARPGROUP:
        return []
    code = Code.of_sass(kernel.sass)
    waits, barriers = code.find(r"WARPGROUP\.DEPBAR"), _always(code, r"BAR\.SYNC")
    copied = set(re.findall(r"async_copy_global_to_local .* : tensor<[\dx]+x!tt\.ptr<(\w+)>", kernel.ttgir))
    widened = bool(copied) and copied <= {"i8", "f8E4M3FN", "i32"}
    reached = code.reached(waits, barriers) & set(code.find(r"STS" if widened else r"STS|LDGSTS"))
    return [f"no barrier between WARPGROUP.DEPBAR and {text}" for text in _shown(code, reached)]


def nothing_before_grid_wait(kernel: Compiled, except_for: Sequence[str] = ()) -> list[str]:
    """In a dependent launch, no access to global memory before the wait for the kernel before it.

    Args:
        kernel: any; one without a wait is not launched dependently, and breaks no rule.
        except_for: tensors that no kernel of a step writes, as weights are, and that may therefore be read, or be
            brought into a cache, before the wait.
    """
    code, sass = Code.of_ptx(kernel.ptx), Code.of_sass(kernel.sass)
    if not code.find(r"griddepcontrol\.wait"):
        return []
    tensors = Tensors(code, argument_names(kernel.ttgir))
    waits = _always(code, r"griddepcontrol\.wait")
    reached = code.reached([ENTRY], waits) & set(code.find(_GLOBAL_ACCESS))
    writes = code.find(r"st\.|atom\.|red\.")
    early = {
        place for place in reached if place not in writes and tensors.at(place) and tensors.at(place) <= set(except_for)
    }
    found = [f"before the grid wait: {text}" for text in _shown(code, reached - early)]
    # The assembler must not have moved others up.
    compiled = sass.reached([ENTRY], _always(sass, "ACQBULK")) & set(sass.find(r"LDG|STG|ATOM(?!S)|RED\b|CCTL|UBLK"))
    if len(compiled) > len(early):
        found += [f"before the grid wait: {text}" for text in _shown(sass, compiled)]
    return found


_LAYOUT = re.compile(r"^(#\w+) = #ttg\.(.*)$", re.MULTILINE)
_REDUCTION = re.compile(
    r'"tt\.reduce"\(\S+\) <\{axis = (?P<axis>\d+) : i32.*?\(\{(?P<body>(?:(?!\}\)).)*)\}\) : '
    r"\(tensor<(?P<shape>[0-9x]+)xf32, (?P<layout>#\w+)>\)",
    re.DOTALL,
)


def reduction_layouts(kernels: Iterable[Compiled]) -> list[str]:
    """Sums of as many numbers along one axis have one layout in all of the kernels, and so one order of additions."""
    layouts: dict[tuple[str, int], dict[str, set[str]]] = {}
    for kernel in kernels:
        defined = dict(_LAYOUT.findall(kernel.ttgir))
        for reduction in _REDUCTION.finditer(kernel.ttgir):
            if "arith.addf" in reduction["body"]:
                axis = int(reduction["axis"])
                found = layouts.setdefault((reduction["shape"].split("x")[axis], axis), {})
                found.setdefault(_along(defined[reduction["layout"]], axis), set()).add(kernel.kernel)
    return [
        f"sums of {count} numbers along axis {axis} have {len(found)} layouts: {found}"
        for (count, axis), found in layouts.items()
        if len(found) > 1
    ]


def _along(layout: str, axis: int) -> str:
    """The part of a blocked layout that decides in which order an axis is summed; other layouts as they are."""
    if not layout.startswith("blocked"):
        return layout
    shares = re.findall(r"(sizePerThread|threadsPerWarp|warpsPerCTA) = \[([\d, ]+)\]", layout)
    return ", ".join(f"{name} {sizes.split(', ')[axis]}" for name, sizes in shares)
