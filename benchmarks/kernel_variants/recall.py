"""The forms of the kernels of `recall`: the sorted batch and its start at remembered perturbations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.kernel_variants import DTYPES, Variant, arguments, pointers
from bt_fast.kernels import recall as kernels
from bt_fast.ops.gather_start import BLOCK, WARPS
from bt_fast.ops.recall import LONG_BLOCK, LONG_WARPS

CIFAR = (3, 32, 32)
PLACED = {"top": "*i64", "left": "*i64", "mirrored": "*u8"}
STORED = {"i8": 1, "fp16": 2, "fp32": 4}


def recall(
    norm: str,
    dtype: str,
    stored: str = "i8",
    *,
    image: tuple[int, int, int] = CIFAR,
    frame: tuple[int, int, int] | None = None,
    last: bool = False,
    noisy: bool = True,
    bits: int | None = None,
    occupancy: float = 0.5,
    main: bool = False,
    **types: Any,
) -> Variant:
    """Returns a kernel for images of these channels, height and width, in frames of others, or without placements."""
    size, l2 = DTYPES[dtype].itemsize, norm == "l2"
    function = kernels.recall_l2_fwd_kernel if l2 else kernels.recall_linf_fwd_kernel
    given: dict[str, Any] = {name: f"*{dtype}" for name in ("x", "clean", "start")} | {"memory": f"*{stored}"}
    given |= {name: "*i64" for name in ("slots", "state", "order", "steps")} | {"samples": "*i64", "epsilons": None}
    given |= PLACED if frame else dict.fromkeys(PLACED)
    given |= {name: "fp32" for name in ("epsilon", "noise", "lower", "upper")} | ({} if l2 else {"blocks": "i32"})
    shown = image if frame or last else (1, 1, image[0] * image[1] * image[2])
    sizes = dict(zip(("CHANNELS", "HEIGHT", "WIDTH"), shown, strict=True))
    own = dict(zip(("OWN_HEIGHT", "OWN_WIDTH"), (frame or shown)[1:], strict=True))
    block, warps = (LONG_BLOCK, LONG_WARPS) if l2 else (BLOCK, WARPS)
    constants = sizes | own | {"LAST": last, "NOISY": noisy, "BLOCK": block}
    ordered = arguments(function, given | constants | types)
    note = [f"in {'x'.join(map(str, frame))}"] if frame else []
    note += ["channels last"] if last else []
    note += [] if noisy else ["without noise"]
    note += [f"{name} {kind}" for name, kind in types.items()]
    width = 8 * size * (block // (32 * warps)) if bits is None else bits
    return Variant(
        name=", ".join([f"recall {norm} {dtype} {stored} {'x'.join(map(str, image))}", *note]),
        function=function,
        types=ordered,
        divisible=pointers(ordered),
        bytes_moved=3 * size + STORED[stored] * (2 if l2 else 1),
        bytes_least=3 * size + STORED[stored],
        load_bits=width,
        store_bits=width,
        occupancy=occupancy,
        main=main,
        warps=warps,
    )


def variants() -> Iterator[Variant]:
    """Yields the forms of a launch, for some shapes."""
    for norm in ("linf", "l2"):
        stored = "fp16" if norm == "l2" else "i8"
        yield recall(norm, "fp32", stored, main=True)
        yield recall(norm, "fp32", stored, frame=(3, 40, 40), main=True)
        yield recall(norm, "bf16", stored, frame=CIFAR)
        yield recall(norm, "fp16", stored, noisy=False)
        yield recall(norm, "fp32", stored, last=True, frame=CIFAR)
        yield recall(norm, "fp32", "fp32", last=True)
        yield recall(norm, "fp32", stored, image=(3, 15, 37), bits=32)
        yield recall(norm, "fp32", stored, order=None, steps=None, samples=None)
        yield recall(norm, "fp32", stored, steps="*i32", epsilons="*fp32")
    yield recall("linf", "bf16", "i8", epsilons="*bf16")
