"""Compiles every kernel without a GPU and tabulates registers, vector widths and bytes moved.

python -m benchmarks.kernel_report            # write benchmarks/results/kernels.md
python -m benchmarks.kernel_report --check    # fail if it would change
python -m benchmarks.kernel_report --all      # every form for every architecture: fail if one breaks a rule
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends import compiler as backend
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.kernel_variants import VARIANTS, Variant

RESULT = Path(__file__).parent / "results" / "kernels.md"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# threads of an SM
THREADS = {75: 1024, 80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
REGISTERS = 65536  # of an SM, allocated to warps in units of 256


@dataclass(frozen=True)
class Compiled:
    """One variant compiled for one architecture."""

    ptx: str
    shared: int  # bytes
    registers: int  # per thread
    stack: int  # bytes per thread
    spills: int  # accesses to local memory
    load_bits: int  # the widest access
    store_bits: int
    instructions: int


def targets(variant: Variant, *, everywhere: bool = False) -> list[int]:
    """Returns the architectures to compile the variant for: all for a main one, else two. bfloat16 needs sm_80.

    "All" means those that this triton's assembler knows: in triton 3.2 none after sm_90.
    """
    bfloat16 = "*bf16" in variant.types.values()
    if not (variant.main or everywhere):
        return [80 if bfloat16 else 75, 90]
    return [sm for sm in THREADS if sm in _assembled() and (sm >= 80 or not bfloat16)]


@functools.cache
def _assembled() -> set[int]:
    """Returns the architectures that the wheel's assemblers list."""
    reported = [
        subprocess.run([tool, "--help"], check=True, capture_output=True, text=True) for tool in TOOLS.glob("ptxas*")
    ]
    return {int(sm) for text in reported for sm in re.findall(r"'sm_(\d+)'", text.stdout)}


def broken_rules(name: str, sm: int) -> list[str]:
    """Returns what is wrong with a variant's code: local memory, narrow accesses, too many registers."""
    variant, code = VARIANTS[name], compiled(name, sm)
    share = occupancy(sm, code.registers, variant.warps)
    rules = {
        f"{code.spills} spills, {code.stack} bytes of stack": code.spills == code.stack == 0,
        f"loads of {code.load_bits} bits": code.load_bits >= variant.load_bits,
        f"stores of {code.store_bits} bits": code.store_bits >= variant.store_bits,
        f"{code.registers} registers, occupancy {share:.2f}": share >= variant.occupancy,
    }
    return [what for what, kept in rules.items() if not kept]


@functools.cache
def compiled(name: str, sm: int) -> Compiled:
    """Compiles a variant and reads its machine code."""
    variant = VARIANTS[name]
    kernel = compile_kernel(variant.function, variant.types, variant.divisible, sm, variant.warps)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [TOOLS / "cuobjdump", "-sass", "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", text)}
    opcodes = Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.M))
    return Compiled(
        ptx=kernel.asm["ptx"],
        shared=kernel.metadata.shared,
        registers=used["REG"],
        stack=used["STACK"],
        spills=sum(n for opcode, n in opcodes.items() if opcode.startswith(("LDL", "STL"))),
        load_bits=_widest(opcodes, "LDG"),
        store_bits=_widest(opcodes, "STG"),
        instructions=sum(n for opcode, n in opcodes.items() if opcode != "NOP"),
    )


def compile_kernel(function: Any, types: dict[str, Any], divisible: Collection[str], sm: int, warps: int) -> Any:
    """Returns Triton's compiled kernel, without a GPU; the arguments are those of `Variant`."""
    signature = {name: kind if isinstance(kind, str) else "constexpr" for name, kind in types.items()}
    constants = {name: kind for name, kind in types.items() if not isinstance(kind, str)}
    attributes: Any = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if name in divisible}
    if hasattr(backend, "AttrsDescriptor"):  # triton 3.2
        attributes = backend.AttrsDescriptor.from_hints({i: 16 for (i,) in attributes})
    source = ASTSource(function, signature, constants, attributes)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def occupancy(sm: int, registers: int, warps: int) -> float:
    """Returns the share of an SM's threads that blocks of `warps` warps reach with this many registers a thread."""
    each = -(-registers * 32 // 256) * 256
    most = THREADS[sm] // 32
    return min(most, REGISTERS // each) // warps * warps / most


def table() -> str:
    """Returns the report, in Markdown."""
    return "\n".join([*heading(), *(row for name in VARIANTS for row in rows(name))]) + "\n"


def heading() -> list[str]:
    """Returns the lines above the report's rows."""
    return [
        f"Written by `python -m benchmarks.kernel_report` with triton {triton.__version__}.",
        "",
        "| kernel | sm | registers | occupancy | shared memory | spills | load bits | store bits | instructions "
        "| bytes per element | least |",
        "| --- |" + " ---: |" * 10,
    ]


def rows(name: str) -> list[str]:
    """Returns the report's rows of a variant, one for each architecture."""
    variant, result = VARIANTS[name], []
    for sm in targets(variant):
        c = compiled(name, sm)
        share = round(100 * occupancy(sm, c.registers, variant.warps))
        cells = [name, sm, c.registers, f"{share} %", c.shared, c.spills, c.load_bits, c.store_bits]
        cells += [c.instructions, variant.bytes_moved, variant.bytes_least]
        result.append(f"| {' | '.join(map(str, cells))} |")
    return result


def _widest(opcodes: Counter[str], access: str) -> int:
    """Returns the widest access in bits. The type is the last part except `SYS` and similar; the default is 32 bits."""
    widths = [16 if ".U16" in o else 8 if re.search(r"\.[US]8\b", o) else 32 for o in opcodes if o.startswith(access)]
    widths += [int(w) for o in opcodes if o.startswith(access) for w in re.findall(r"\.(64|128|256)\b", o)]
    return max(widths, default=0)


def main() -> None:
    """Writes the table, compares it with `--check`, or compiles every form with `--all`."""
    if "--all" in sys.argv[1:]:
        forms = [(name, sm) for name, variant in VARIANTS.items() for sm in targets(variant, everywhere=True)]
        broken = [f"{name}, sm_{sm}: {what}" for name, sm in forms for what in broken_rules(name, sm)]
        print(*broken, f"{len(forms)} forms compiled with triton {triton.__version__}", sep="\n")
        sys.exit(bool(broken))
    report = table()
    if "--check" not in sys.argv[1:]:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(report)
    elif RESULT.read_text() != report:
        sys.exit(f"{RESULT} is not what the kernels compile to: write it anew and review the change")


if __name__ == "__main__":
    main()
