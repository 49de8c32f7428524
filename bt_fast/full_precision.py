"""Full float32 precision, for a comparison that rounding to TF32 or bfloat16 would change.

With torch's defaults a GPU multiplies a convolution's float32 in TF32, which keeps 10 of their 23 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_Setting = tuple[str, str]  # torch's names for a backend and an operation

# Since torch 2.9. An operation of a backend without its own setting follows the backend, and that the generic one.
_ABOVE: tuple[_Setting, ...] = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"))
_MATMUL: tuple[_Setting, ...] = (("cuda", "matmul"), ("mkldnn", "matmul"))
_OTHERS: tuple[_Setting, ...] = tuple((backend, op) for backend in ("cuda", "mkldnn") for op in ("conv", "rnn"))


@contextmanager
def full_precision() -> Iterator[None]:
    """Computes float32 convolutions and matrix products inside with all bits, whatever the caller allows.

    The caller's settings of torch's old and new API are restored. They belong to the process: other threads meanwhile
    compute in full precision, too. Inside, torch since 2.9 refuses to read the old `torch.backends.cudnn.allow_tf32` if
    it allows TF32.
    """
    with _full_by_new_api() if _has_new_api() else _full_by_old_api():
        yield


def tf32_convolutions() -> bool:
    """Whether cuDNN may convolve float32 in TF32 now."""
    if _has_new_api():  # readable even where the old one refuses
        return _get(("cuda", "conv")) == "tf32"
    return torch._C._get_cudnn_allow_tf32()


def _has_new_api() -> bool:
    return hasattr(torch._C, "_get_fp32_precision_getter")


@contextmanager
def _full_by_old_api() -> Iterator[None]:
    """Uses all settings before torch 2.9. The one for matrix products is also the CPU's."""
    cudnn, matmul = torch._C._get_cudnn_allow_tf32(), torch._C._get_float32_matmul_precision()
    try:
        torch._C._set_cudnn_allow_tf32(False)
        torch._C._set_float32_matmul_precision("highest")
        yield
    finally:
        torch._C._set_cudnn_allow_tf32(cudnn)
        torch._C._set_float32_matmul_precision(matmul)


@contextmanager
def _full_by_new_api() -> Iterator[None]:
    """Uses the settings of torch since 2.9, and the old one for matrix products.

    torch reports the effective values. cuDNN's default ("tf32" unless the backend has a value) cannot be set again, and
    setting the old `cudnn.allow_tf32` would lose it: only a setting that differs from its backend's is changed.
    """
    own: dict[_Setting, str] = {}
    matmul: str | None = None

    def change(setting: _Setting, precision: str) -> None:
        own[setting] = _get(setting)
        _set(setting, precision)

    try:
        for setting in _ABOVE:
            change(setting, "none")  # so that the settings below report their own values
        for setting in _MATMUL:
            change(setting, "ieee")
        matmul = torch._C._get_float32_matmul_precision()  # refused if the new settings differ
        torch._C._set_float32_matmul_precision("highest")
        for setting in _ABOVE:
            _set(setting, "ieee")
        for setting in _OTHERS:
            if _get(setting) != "ieee":
                change(setting, "ieee")
        yield
    finally:
        if matmul is not None:
            torch._C._set_float32_matmul_precision(matmul)  # this changes the new settings of it
        for setting, precision in own.items():
            _set(setting, precision)


def _get(setting: _Setting) -> str:
    return torch._C._get_fp32_precision_getter(*setting)


def _set(setting: _Setting, precision: str) -> None:
    torch._C._set_fp32_precision_setter(*setting, precision)
