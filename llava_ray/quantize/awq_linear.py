"""AutoAWQ's GEMM layout: eight 4-bit integers per int32, and a linear that runs on it.

Source: AutoAWQ, awq/modules/linear/gemm.py and awq/utils/packing_utils.py.
"""

import torch
from torch import nn
from torch.nn import functional

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of each 4-bit field, lowest bits first."""


def pack(values: torch.Tensor) -> torch.Tensor:
    """Pack integers 0 to 15, [rows, columns], into int32 [rows, columns / 8]."""
    fields = values.to(torch.int64).view(values.shape[0], -1, 8)[:, :, list(ORDER)]
    shifts = torch.arange(0, 32, 4, device=values.device)
    # The top field's highest bit is the int32's sign, which the cast from int64 keeps.
    words: torch.Tensor = (fields << shifts).sum(dim=-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack(words: torch.Tensor) -> torch.Tensor:
    """Unpack int32 [rows, columns / 8] into uint8 0 to 15, [rows, columns]."""
    shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)
    fields = ((words[:, :, None] >> shifts) & 15).to(torch.uint8)
    inverse = torch.argsort(torch.tensor(ORDER, device=words.device))
    return fields[:, :, inverse].view(words.shape[0], -1)


class AwqLinear(nn.Module):
    """y = x @ ((q - zero) * scale), with q and zero packed and all tensors stored by input row.

    qweight is int32 [in, out / 8], qzeros int32 [in / group, out / 8], scales fp16
    [in / group, out].
    """

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        qweight: torch.Tensor,
        qzeros: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("qweight", qweight)
        self.register_buffer("qzeros", qzeros)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        self.in_features, self.out_features = qweight.shape[0], scales.shape[1]
        self.group_size = self.in_features // scales.shape[0]

    def steps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the integers of the weights [in, out] and of the zeros [in / group, out]."""
        return unpack(self.qweight), unpack(self.qzeros)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight as nn.Linear has it, [out, in]."""
        scales = self.scales.to(dtype)
        steps, zeros = (part.to(torch.int8) for part in self.steps())
        levels = steps.view(-1, self.group_size, self.out_features) - zeros[:, None]
        return (levels.to(dtype) * scales[:, None]).view(self.in_features, -1).T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply by the dequantized weight, in x's dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.dequantize(x.dtype), bias)
