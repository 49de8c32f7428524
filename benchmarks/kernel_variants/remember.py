"""The forms of the kernel of `remember_`: perturbations, quantised and at their places."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.kernel_variants import DTYPES, Variant, arguments, pointers
from benchmarks.kernel_variants.recall import CIFAR, PLACED, STORED
from bt_fast.kernels.remember import remember_fwd_kernel
from bt_fast.ops.remember import BLOCK, WARPS


def remember(
    dtype: str,
    stored: str = "i8",
    *,
    image: tuple[int, int, int] = CIFAR,
    frame: tuple[int, int, int] | None = None,
    last: bool = False,
    bits: tuple[int, int] | None = None,
    main: bool = False,
    **types: Any,
) -> Variant:
    """Returns the kernel for images of these channels, height and width, in frames of others, or without placements."""
    size = DTYPES[dtype].itemsize
    given: dict[str, Any] = {name: f"*{dtype}" for name in ("x_adv", "clean")} | {"memory": f"*{stored}"}
    given |= {name: "*i64" for name in ("slots", "order", "steps")} | {"keep": "*u8", "epsilons": None}
    given |= PLACED if frame else dict.fromkeys(PLACED)
    given |= {"blocks": "i32", "epsilon": "fp32"}
    shown = image if frame or last else (1, 1, image[0] * image[1] * image[2])
    sizes = dict(zip(("CHANNELS", "HEIGHT", "WIDTH"), shown, strict=True))
    own = dict(zip(("OWN_HEIGHT", "OWN_WIDTH"), (frame or shown)[1:], strict=True))
    ordered = arguments(remember_fwd_kernel, given | sizes | own | {"LAST": last, "BLOCK": BLOCK} | types)
    note = [f"in {'x'.join(map(str, frame))}"] if frame else []
    note += ["channels last"] if last else []
    note += [f"{name} {kind}" for name, kind in types.items()]
    each = BLOCK // (32 * WARPS)
    load_bits, store_bits = (8 * size * each, 8 * STORED[stored] * each) if bits is None else bits
    return Variant(
        name=", ".join([f"remember {dtype} {stored} {'x'.join(map(str, image))}", *note]),
        function=remember_fwd_kernel,
        types=ordered,
        divisible=pointers(ordered),
        bytes_moved=2 * size + STORED[stored],
        bytes_least=2 * size + STORED[stored],
        load_bits=load_bits,
        store_bits=store_bits,
        occupancy=0.75,
        main=main,
        warps=WARPS,
    )


def variants() -> Iterator[Variant]:
    """Yields the forms of a launch, for some shapes. Where images have a place, their rows lie at any address."""
    yield remember("fp32", main=True)
    yield remember("fp32", frame=(3, 40, 40), bits=(0, 0), main=True)
    for dtype in DTYPES:
        for stored in STORED:
            yield remember(dtype, stored, keep=None)
    yield remember("bf16", frame=CIFAR, bits=(0, 0))
    yield remember("fp32", "fp16", frame=CIFAR, last=True, bits=(0, 0))
    yield remember("fp32", last=True, bits=(0, 0))
    yield remember("fp32", image=(3, 15, 37), bits=(32, 0))
    yield remember("fp32", order=None, steps=None, keep=None)
    yield remember("fp32", steps="*i32", epsilons="*fp32")
