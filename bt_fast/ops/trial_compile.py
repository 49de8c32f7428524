"""`python -m bt_fast.ops.trial_compile 130`: exits with 0 if triton compiles a kernel of ours for sm_130."""

from __future__ import annotations

import sys


def main(sm: int) -> None:
    """Compiles a kernel with shuffles and masked loads. Raises triton's error, or is aborted by its compiler."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bt_fast.kernels.order_by_steps import order_by_steps_fwd_kernel

    tensors = dict.fromkeys(("steps", "order", "active"), "*i64")
    signature = {**tensors, "m": "i32", "most": "i32", "BLOCK_I": "constexpr", "BLOCK_J": "constexpr"}
    source = ASTSource(order_by_steps_fwd_kernel, signature, {"BLOCK_I": 32, "BLOCK_J": 128})
    triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": 4, "enable_fp_fusion": False})


if __name__ == "__main__":
    main(int(sys.argv[1]))
