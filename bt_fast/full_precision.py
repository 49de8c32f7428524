"""float32 computed as float32, for a comparison that the rounding of TF32 or bfloat16 would decide.

With torch's defaults a GPU multiplies a convolution's float32 in TF32, which keeps 10 of their 23 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_Setting = tuple[str, str]  # torch's names for a backend and an operation

# Since torch 2.9. A backend's operation that has nothing of its own follows the backend, and that the generic setting.
_ABOVE: tuple[_Setting, ...] = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"))
_MATMUL: tuple[_Setting, ...] = (("cuda", "matmul"), ("mkldnn", "matmul"))
_OTHERS: tuple[_Setting, ...] = tuple((backend, op) for backend in ("cuda", "mkldnn") for op in ("conv", "rnn"))


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions and matrix products of float32 inside are computed in no fewer bits, whatever the caller allows.

    What the caller has set is put back as it was set, by torch's old API or by its new one. The settings are those of
    the process: what other threads compute meanwhile is in full precision, too. Inside, torch since 2.9 refuses to read
    the old `torch.backends.cudnn.allow_tf32` where that allows TF32.
    """
    settings = _Settings() if _has_new_api() else _OldSettings()
    try:
        settings.set_full()
        yield
    finally:
        settings.restore()


def tf32_convolutions() -> bool:
    """Whether cuDNN may convolve float32 in TF32 now."""
    if _has_new_api():  # which tells it where the old one refuses, too
        return _get(("cuda", "conv")) == "tf32"
    return torch._C._get_cudnn_allow_tf32()


def _has_new_api() -> bool:
    return hasattr(torch._C, "_get_fp32_precision_getter")


class _OldSettings:
    """All of them before torch 2.9. The one for matrix products is the CPU's, too."""

    def __init__(self) -> None:
        self._cudnn, self._matmul = torch._C._get_cudnn_allow_tf32(), torch._C._get_float32_matmul_precision()

    def set_full(self) -> None:
        torch._C._set_cudnn_allow_tf32(False)
        torch._C._set_float32_matmul_precision("highest")

    def restore(self) -> None:
        torch._C._set_cudnn_allow_tf32(self._cudnn)
        torch._C._set_float32_matmul_precision(self._matmul)


class _Settings:
    """Those of torch since 2.9, and of the old ones that for matrix products.

    torch tells what holds, not what was set. It cannot be given back cuDNN's default ("tf32" unless the backend says
    otherwise), which setting the old `cudnn.allow_tf32` would lose: only what says another thing than its backend is
    touched.
    """

    def __init__(self) -> None:
        self._own: dict[_Setting, str] = {}
        self._old: str | None = None

    def set_full(self) -> None:
        for setting in _ABOVE:
            self._set(setting, "none")  # so that those below tell what they have of their own
        for setting in _MATMUL:
            self._set(setting, "ieee")
        self._old = torch._C._get_float32_matmul_precision()  # refused where the new settings say another thing
        torch._C._set_float32_matmul_precision("highest")
        for setting in _ABOVE:
            _set(setting, "ieee")
        for setting in _OTHERS:
            if _get(setting) != "ieee":
                self._set(setting, "ieee")

    def _set(self, setting: _Setting, precision: str) -> None:
        self._own[setting] = _get(setting)
        _set(setting, precision)

    def restore(self) -> None:
        if self._old is not None:
            torch._C._set_float32_matmul_precision(self._old)  # and the new settings of it
        for setting, own in self._own.items():
            _set(setting, own)


def _get(setting: _Setting) -> str:
    return torch._C._get_fp32_precision_getter(*setting)


def _set(setting: _Setting, precision: str) -> None:
    torch._C._set_fp32_precision_setter(*setting, precision)
