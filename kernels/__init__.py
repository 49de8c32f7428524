"""Triton kernels, one op a file; none imports anything of ours but `shared.py`. Imported as `bt_fast.kernels`.

Names as in flash-linear-attention: tensors `x`, block values `b_x`, masks `m_x`, offsets `o_x`, ids `i_x`.
"""
