"""Pictures of which patches stay, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dynamicvit.core.model import SparseViT

_DIMMED = 0.22  # brightness left of a patch that has gone
_TINT = (24, 28, 56)  # and the colour it fades into
_GAP = 8
_BACKGROUND, _INK = (255, 255, 255), (30, 30, 30)


@torch.no_grad()
def draw_keep_maps(
    model: SparseViT,
    images: Tensor,
    captions: Sequence[str] | None = None,
    min_side: int = 112,
) -> Image.Image:
    """One row an image: the input, then what is kept after each stage, dropped patches dimmed.

    Args:
        model: run in its present mode.
        images: [B, C, H, W], normalised with the mean and std of the model's `pretrained_cfg`.
        captions: one line of text an image, drawn below its row.
        min_side: small images are enlarged by a whole factor to about this many pixels.

    Returns:
        An RGB picture.
    """
    keep = model.pruned(images).keep
    height, width = images.shape[-2:]
    grid = model.backbone.patch_embed.dynamic_feat_size((height, width))
    scale = max(1, round(min_side / min(height, width)))
    pixels = _to_pixels(images, model.pretrained_cfg)
    pixels = pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    counts = [int(mask[0].sum()) for mask in keep]
    titles = ["input"] + [f"{count} of {keep[0].shape[1]} patches" for count in counts]

    cell_w, cell_h = width * scale + _GAP, height * scale + _GAP
    caption_h = 22 if captions else 0
    sheet = Image.new(
        "RGB",
        (_GAP + len(titles) * cell_w, 30 + len(images) * (cell_h + caption_h)),
        _BACKGROUND,
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for column, title in enumerate(titles):
        draw.text((_GAP + column * cell_w, 8), title, _INK, font)
    for row in range(len(images)):
        top = 30 + row * (cell_h + caption_h)
        for column in range(len(titles)):
            picture = pixels[row]
            if column:
                mask = keep[column - 1][row].reshape(grid) > 0.5
                picture = dim_dropped(picture, mask)
            sheet.paste(Image.fromarray(picture.numpy()), (_GAP + column * cell_w, top))
        if captions:
            draw.text((_GAP, top + cell_h - _GAP + 3), captions[row], _INK, font)
    return sheet


def dim_dropped(picture: Tensor, mask: Tensor) -> Tensor:
    """Dim the patches of a picture that are not kept.

    Args:
        picture: [H, W, 3] uint8.
        mask: [h, w] bool, True where the patch is kept; H and W are multiples of h and w.
    """
    height, width = picture.shape[:2]
    rows, columns = height // mask.shape[0], width // mask.shape[1]
    kept = mask.repeat_interleave(rows, 0).repeat_interleave(columns, 1).unsqueeze(-1)
    dimmed = picture * _DIMMED + torch.tensor(_TINT) * (1 - _DIMMED)
    return torch.where(kept, picture, dimmed.to(torch.uint8))


def _to_pixels(images: Tensor, config: dict) -> Tensor:
    """Undo the normalisation: [B, C, H, W] → [B, H, W, 3] uint8."""
    channels = images.shape[1]
    mean, std = (
        torch.tensor(config.get(name, default), device=images.device).view(1, -1, 1, 1)
        for name, default in (("mean", (0.0,)), ("std", (1.0,)))
    )
    pixels = (images.float() * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
    pixels = pixels[:, :1].expand(-1, 3, -1, -1) if channels != 3 else pixels
    return pixels.permute(0, 2, 3, 1).cpu()
