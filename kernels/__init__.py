"""Triton kernels, one file for each op, which import only `shared.py` of this package. Imported as `bt_fast.kernels`.

Names as in flash-linear-attention: tensors `x`, block values `b_x`, masks `m_x`, offsets `o_x`, ids `i_x`.
"""
