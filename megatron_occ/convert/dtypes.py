"""Dtypes of weights: their names in safetensors, and the usual one of many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
FP8 = torch.float8_e4m3fn


def dtype_name(dtype: torch.dtype) -> str:
    """As ``config.json`` spells it, e.g. ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def usual_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The most frequent one."""
    return Counter(dtypes).most_common(1)[0][0]
