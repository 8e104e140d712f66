"""Fresh looks of a picture on the GPU, and where its letters went.

Rendering is the bottleneck of pretraining, so each picture is used a few times, every time
moved, shrunk, turned, blurred and lit anew.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_ray.embedded.pretrain.examples import LETTERS_PER_PATCH
from llava_ray.models.conversation import IGNORE_INDEX
from llava_ray.models.images import CLIP_MEAN, CLIP_STD


def random_affine(count: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """Return [count, 2, 3] maps from output to input places, in -1..1; a third are identities.

    Pictures only shrink, so nothing is cut off but a corner.
    """
    draws = torch.rand(count, 6, device=device, generator=generator)
    scale_x, scale_y = 1 - 0.14 * draws[:, 0], 1 - 0.14 * draws[:, 1]
    angle = 0.07 * (2 * draws[:, 2] - 1)
    shift_x = (1 - scale_x) * (2 * draws[:, 3] - 1)
    shift_y = (1 - scale_y) * (2 * draws[:, 4] - 1)
    cos, sin = angle.cos(), angle.sin()
    # The inverse of: shrink, turn, move.
    inverse = torch.stack(
        (cos / scale_x, sin / scale_x, -sin / scale_y, cos / scale_y), dim=-1
    ).view(count, 2, 2)
    move = -(inverse @ torch.stack((shift_x, shift_y), dim=-1)[..., None])
    maps = torch.cat((inverse, move), dim=-1)
    identity = torch.eye(2, 3, device=device).expand_as(maps)
    return torch.where(draws[:, 5, None, None] < 1 / 3, identity, maps)


def warp(images: Tensor, maps: Tensor) -> Tensor:
    """Move uint8 [b, h, w, 3] by maps; return CLIP-normalized [b, 3, h, w], padding at 0.

    Zero after normalizing is CLIP's mean colour, with which LLaVA pads to a square.
    """
    pixels = images.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(row, device=images.device) for row in (CLIP_MEAN, CLIP_STD))
    pixels = (pixels - mean[:, None, None]) / std[:, None, None]
    grid = F.affine_grid(maps, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid.to(pixels.dtype), mode="bilinear", align_corners=False)


def relight(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Change light and colour a little, blur some pictures, add noise to most."""
    count, device = len(pixels), pixels.device
    draws = torch.rand(count, 8, 1, 1, device=device, generator=generator)
    gain = 1 + 0.25 * (draws[:, 0:1] - 0.6) + 0.1 * (draws[:, 1:4] - 0.5)
    pixels = pixels * gain + 0.3 * (draws[:, 4:5] - 0.5)
    soft = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = (draws[:, 5:6] - 0.5).clamp(min=0) * 1.6
    pixels = pixels + share * (soft - pixels)
    width = pixels.shape[-1]
    slope = torch.linspace(-1, 1, width, device=device) * 0.2 * (draws[:, 6:7] - 0.5)
    noise = torch.randn(
        count, 1, *pixels.shape[2:], device=device, generator=generator, dtype=pixels.dtype
    )
    strength = (draws[:, 7:8] - 0.3).clamp(min=0) * 0.2
    return pixels * (1 + slope) + strength * noise


def patch_targets(glyphs: Tensor, maps: Tensor, *, size: int, patch: int) -> Tensor:
    """Say for every patch which letters have their centre in it.

    glyphs: uint8 [b, g, 7] as in examples.Example. Returns [b, patches, 7] class ids: three
    letters in reading order (0 for none), then position, sign and the two colours of the first
    (IGNORE_INDEX where there is none).
    """
    count, side = len(glyphs), size // patch
    values = glyphs.long()
    places = (2 * values[..., :2].float() + 1) / size - 1
    square = torch.linalg.inv(maps[..., :2].float())
    moved = (places - maps[:, None, :, 2].float()) @ square.transpose(1, 2)
    cells = ((moved + 1) * size / 2 / patch).floor().long()
    there = (values[..., 2] > 0) & (cells >= 0).all(-1) & (cells < side).all(-1)
    index = torch.where(there, cells[..., 1] * side + cells[..., 0], side * side)
    before = (index[:, :, None] == index[:, None, :]).tril(-1)
    rank = before.sum(-1)
    # One row more than there are patches, for letters that are written nowhere.
    targets = torch.full((count, side * side + 1, 7), IGNORE_INDEX, device=glyphs.device)
    targets[..., :LETTERS_PER_PATCH] = 0
    rows = torch.arange(count, device=glyphs.device)[:, None].expand_as(index)
    spare = torch.full_like(index, side * side)
    for slot in range(LETTERS_PER_PATCH):
        targets[rows, torch.where(rank == slot, index, spare), slot] = values[..., 2]
    first = torch.where(rank == 0, index, spare)
    targets[rows, first, 3:] = values[..., 3:]
    return targets[:, : side * side]
