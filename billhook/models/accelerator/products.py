"""Products of narrow numbers with sums in float32, where a device has them."""

from __future__ import annotations

import torch

NARROW = (torch.bfloat16, torch.float16)
WITH_WIDE_SUMS = {"cuda"}  # kinds of devices whose matrix product takes `out_dtype`


def keeps_narrow(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a device multiplies `dtype` with float32 sums, so that the weights need no float32 copy.

    Products of two bfloat16 or float16 numbers are exact in float32: only the order of the sums differs.
    """
    return dtype in NARROW and device.type in WITH_WIDE_SUMS and _has_out_dtype()


def _has_out_dtype() -> bool:
    """Return whether torch.mm takes `out_dtype`: from torch 2.8."""
    return "dtype" in torch.ops.aten.mm.overloads()


def wide_product(x: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x · rowsᵀ + bias in float32, [tokens, rows]; x [tokens, width] in float32, `rows` [rows, width] narrow.

    x is multiplied in the dtype of `rows`, which must hold it exactly, as it holds what a model in it computes.
    """
    product: torch.Tensor = torch.mm(x.to(rows.dtype), rows.T, out_dtype=torch.float32)
    return product if bias is None else product + bias
