"""A float32 number as two halves of 16 bits: the bfloat16 number nearest to it, as its bits, and what that lacks.

The halves are the number to the bit: where a model has the first one anyway, its float32 master weights take 2 bytes more per
parameter. The bfloat16 number is the one that torch rounds to, but where two are equally near, one number of 65,536: it is then
the greater in magnitude, and not the even one, from which the sign of the rest would not follow.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF = 0x8000
"""Half of a unit in the last place of a bfloat16 number, in units of a float32 number's."""
NAN = 0x7FC00000
"""The NaN that stands for all: others, such as CUDA's 0x7FFFFFFF, would be rounded up to a number."""


def join(upper: Tensor, lower: Tensor) -> Tensor:
    """The float32 numbers of which these are the halves."""
    return ((upper.to(torch.int32) << 16) + lower).view(torch.float32)


def split(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Two halves of float32 numbers, in int16; the first viewed as bfloat16 is the number rounded."""
    bits = torch.where(numbers.isnan(), NAN, numbers.view(torch.int32))
    upper = (bits + HALF) >> 16
    return upper.to(torch.int16), (bits - (upper << 16)).to(torch.int16)
