"""Triton's kernels of the layers give what plain PyTorch gives, interpreted on a CPU."""

import pytest
import torch

from llava_ray.train import kernels, pointwise

ROWS, HEADS, WIDTH = 5, 3, 24


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float32)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_norms() -> None:
    gradient, x, beside = (drawn(ROWS, WIDTH) for _ in range(3))
    weight = 1 + drawn(WIDTH)
    torch.testing.assert_close(
        kernels.rms_norm(x, weight, 1e-3), pointwise.rms_norm(x, weight, 1e-3)
    )
    given = (gradient, x, weight, 1e-3, beside)
    torch.testing.assert_close(
        kernels.rms_norm_backward(*given), pointwise.rms_norm_backward(*given)
    )


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rotation_of_rows_and_heads_of_any_strides(sign: float) -> None:
    cos, sin = (drawn(ROWS, 1, WIDTH) for _ in range(2))
    for x in (drawn(ROWS, HEADS, WIDTH), drawn(HEADS, ROWS, WIDTH).transpose(0, 1)):
        torch.testing.assert_close(
            kernels.rotate(x, cos, sin, sign), pointwise.rotate(x, cos, sin, sign)
        )


def test_gated_units() -> None:
    gate, up, gradient = (drawn(ROWS, 1000) for _ in range(3))
    torch.testing.assert_close(kernels.swiglu(gate, up), pointwise.swiglu(gate, up))
    torch.testing.assert_close(
        kernels.swiglu_backward(gate, up, gradient), pointwise.swiglu_backward(gate, up, gradient)
    )
