"""Released weights: DynamicViT's, official DeiT's and LV-ViT's, and timm's, as our models."""

from __future__ import annotations

import math
import os
import re
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from dynamicvit.core.backbones import Backbone, UnsupportedBackbone, adapter_of
from dynamicvit.core.model import SparseViT
from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.io.arguments import check_types
from dynamicvit.io.files import check_folder
from dynamicvit.io.folder import save_folder
from dynamicvit.io.weights import OWN_WEIGHTS, load_strictly, read_weights, unwrap
from dynamicvit.models.lvvit import from_official


def from_released(
    state_dict: dict[str, Any] | str | os.PathLike[str],
    schedule: KeepSchedule | None = None,
    num_heads: int | None = None,
    *,
    img_size: int | tuple[int, int] | None = None,
    architecture: str | None = None,
) -> SparseViT:
    """A SparseViT from released weights: DynamicViT's, official DeiT's or LV-ViT's, or timm's.

    Architecture sizes, class count and input size are read from the weights. What weights cannot
    tell (activation, epsilon of the norms, order inside a block, preprocessing) is DeiT's or
    LV-ViT's, unless `architecture` names another.

    Args:
        state_dict: the state dict, or one that holds it under `model`, or a file of it. Scorer keys
            are `score_predictor.{stage}.in_conv.*` and `.out_conv.*`; without any (a dense model's
            weights) the scorers are new, untrained ones.
        schedule: the stages; by default the family's at keep ratio 0.7.
        num_heads: attention heads, which weights do not tell; by default width // 64, and 4 for
            LV-ViT-T. To be given for widths above 1024, where there is no such custom.
        img_size: input height and width in pixels, if other than that of the weights: position
            embeddings are resampled. Weights tell of a square grid; one of as many patches that is
            not square is taken to be their own.
        architecture: the timm model that the weights belong to.

    Returns:
        The model, float32, in eval mode.

    Raises:
        FileNotFoundError: if a file is named and absent.
        UnsupportedBackbone: if `architecture` is one whose tokens cannot be pruned rightly.
        TypeError, ValueError: if the weights are not of this format, listing each key.

    Source: arXiv 2106.02034 (DynamicViT), 2012.12877 (DeiT), 2104.10858 (LV-ViT).
    """
    source, dense, scorers = _read_released(state_dict)
    backbone = _build(dense, source, num_heads, img_size, architecture)
    if schedule is None:
        depth = len(cast(Backbone, backbone).blocks)
        schedule = KeepSchedule.from_keep_ratio(0.7, depth=depth)
    sparse = SparseViT(backbone, schedule)
    weights = {f"backbone.{key}": value for key, value in dense.items()}
    weights |= scorers or sparse.scorers.state_dict(prefix="scorers.")
    load_strictly(sparse, weights, source, _released_name)
    _resize(sparse.backbone, img_size)
    return sparse.eval()


@check_types
def convert(
    file: str,
    output: str,
    /,
    keep_ratio: float | None = None,
    architecture: str | None = None,
    img_size: int | None = None,
    num_heads: int | None = None,
    quiet: bool = False,
) -> nn.Module:
    """Write released weights as a model folder: a DynamicViT file, or an official or timm one.

    Args:
        file: a torch or safetensors file: DynamicViT's (sparse), or DeiT's, LV-ViT's or timm's
            (dense).
        output: the folder to write.
        keep_ratio: of the schedule; by default 0.7 for a DynamicViT file (files do not tell), and
            for a dense one the folder holds the dense model.
        architecture: the timm model that the weights belong to, where sizes alone do not tell.
        img_size: input height and width in pixels, if other than that of the weights.
        num_heads: attention heads, if not width // 64.
        quiet: print nothing.

    Returns:
        The model written.

    Raises:
        FileNotFoundError, TypeError, ValueError: naming what is wrong with the file, each key.
    """
    check_folder("output", output)
    source, dense, scorers = _read_released(file)
    backbone: Any = _build(dense, source, num_heads, img_size, architecture)
    load_strictly(backbone, dense, source)
    model: nn.Module = backbone.eval()
    if scorers or keep_ratio is not None:
        ratio = 0.7 if keep_ratio is None else keep_ratio
        schedule = KeepSchedule.from_keep_ratio(ratio, depth=len(backbone.blocks))
        model = SparseViT(backbone, schedule).eval()
        if scorers:
            weights = {f"backbone.{key}": value for key, value in dense.items()} | scorers
            load_strictly(model, weights, source, _released_name)
    _resize(backbone, img_size)
    save_folder(model, output)
    if not quiet:
        kind = "dense" if model is backbone else "sparse"
        if kind == "sparse" and not scorers:
            kind += ", scorers untrained"
        config = timm.data.resolve_input_data_config(backbone)
        _, height, width = config["input_size"]
        print(
            f"{output}: {kind}, {backbone.num_classes} classes, {len(backbone.blocks)} blocks of "
            f"width {backbone.embed_dim}\n"
            f"Weights do not tell these, taken from {backbone.pretrained_cfg['architecture']}:\n"
            f"  {_num_heads(backbone)} heads, {height}×{width} pixels\n"
            f"  mean {config['mean']}, std {config['std']}\n"
            f"  crop {config['crop_pct']}, {config['interpolation']}\n"
            "If they are others, give --num_heads, --img_size or --architecture."
        )
    return model


def _num_heads(model: Any) -> int:
    return next(m.num_heads for m in model.blocks.modules() if hasattr(m, "num_heads"))


def _read_released(released: Any) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    """A name for messages, a dense model's weights, and scorers' weights, in our key names."""
    source = "state_dict"
    if isinstance(released, str | os.PathLike):
        source, released = str(released), read_weights(released)
    if not isinstance(released, dict):
        raise TypeError(f"state_dict must be a dict or a path, got {type(released).__name__}")
    released = unwrap(released)
    if released and all(str(key).startswith("module.") for key in released):  # saved under DDP
        released = {key.removeprefix("module."): value for key, value in released.items()}
    not_tensors = [
        str(key)
        for key, value in released.items()
        if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if not_tensors:
        raise ValueError(f"{source} must hold tensors alone, got others at {not_tensors[:5]}")
    weights = {
        _our_name(key): value.float() if value.is_floating_point() else value
        for key, value in released.items()
    }
    scorers = {key: value for key, value in weights.items() if key.startswith("scorers.")}
    dense = {key: value for key, value in weights.items() if key not in scorers}
    try:
        return source, from_official(dense), scorers
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


# The weights that sizes are read from, with their number of axes.
_SIZES = {
    "patch_embed.proj.weight": 4,
    "pos_embed": 3,
    "head.weight": 2,
    "blocks.0.attn.qkv.weight": 2,
    "blocks.0.mlp.fc1.weight": 2,
}


def _build(
    weights: dict[str, Tensor],
    source: str,
    num_heads: int | None,
    img_size: int | tuple[int, int] | None,
    architecture: str | None,
) -> nn.Module:
    """A dense model, untrained, of the sizes that the weights have."""
    if architecture is not None and not (
        isinstance(architecture, str) and timm.is_model(architecture)
    ):
        raise ValueError(f"architecture must be the name of a timm model, got {architecture!r}")
    if num_heads is not None and (not isinstance(num_heads, int) or isinstance(num_heads, bool)):
        raise TypeError(f"num_heads must be an integer, got {num_heads!r}")
    needed = _SIZES if architecture is None else {}
    missing = [key for key in needed if key not in weights]
    if missing:
        raise ValueError(
            f"{source} must be of a DeiT, LV-ViT or plain ViT: it has no {missing}; {OWN_WEIGHTS}"
        )
    optional = {"reg_token": 3, "patch_embed.backbone.0.conv.weight": 4}
    for key, axes in (_SIZES | optional).items():
        shape = weights[key].shape if key in weights else (1,) * axes
        if len(shape) != axes or 0 in shape:
            raise ValueError(f"{source}: {key} must have {axes} axes, got {tuple(shape)}")
    sizes: dict[str, Any] = {}
    if "head.weight" in weights:
        sizes["num_classes"] = len(weights["head.weight"])
    if architecture is None:
        architecture = _infer(weights, sizes, num_heads)
    else:
        if num_heads is not None:
            sizes["num_heads"] = num_heads
        if "patch_embed.proj.weight" in weights and "lvvit" not in architecture:
            sizes["in_chans"] = weights["patch_embed.proj.weight"].shape[1]
    try:
        with torch.device("meta"):
            model: Any = timm.create_model(architecture, **sizes)
        adapter_of(model)
        sizes["img_size"] = _image_size(weights, model, source, img_size)
        return timm.create_model(architecture, **sizes)
    except UnsupportedBackbone as error:
        raise UnsupportedBackbone(f"architecture {architecture!r}: {error}") from error
    except (RuntimeError, AssertionError, TypeError, AttributeError) as error:
        raise ValueError(f"architecture {architecture!r} does not fit {source}: {error}") from error


def _infer(weights: dict[str, Tensor], sizes: dict[str, Any], num_heads: int | None) -> str:
    """The name of the nearest architecture; what differs from it is added to `sizes`."""
    projection = weights["patch_embed.proj.weight"].shape
    width, depth = projection[0], 1
    while f"blocks.{depth}.norm1.weight" in weights:
        depth += 1
    lvvit = "patch_embed.backbone.0.conv.weight" in weights
    if num_heads is None and width > 1024:
        raise ValueError(f"num_heads must be given for weights of width {width}, got None")
    heads = num_heads if num_heads is not None else 4 if width == 240 else max(1, width // 64)
    if heads < 1 or width % heads:
        raise ValueError(f"num_heads must divide the width {width}, got {heads}")
    hidden = len(weights["blocks.0.mlp.fc1.weight"])
    sizes |= {
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        # timm rounds width times ratio down, which must not lose one to floating point.
        "mlp_ratio": hidden / width
        if int(width * (hidden / width)) == hidden
        else (hidden + 0.5) / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
    }
    if lvvit:
        stem = weights["patch_embed.backbone.0.conv.weight"].shape
        sizes |= {"patch_size": 2 * projection[2], "stem_width": stem[0], "in_chans": stem[1]}
        names = {240: "lvvit_tiny", 512: "lvvit_medium", 768: "lvvit_large"}
        return names.get(width, "lvvit_small")
    sizes |= {"patch_size": tuple(projection[2:]), "in_chans": projection[1]}
    if "reg_token" in weights:
        sizes["reg_tokens"] = weights["reg_token"].shape[1]
    if "blocks.0.ls1.gamma" in weights:
        sizes["init_values"] = 1e-5
    if "fc_norm.weight" in weights:
        sizes["global_pool"] = "avg"
    if "norm_pre.weight" in weights or not {"cls_token", "fc_norm.weight"} & weights.keys():
        # CLIP and SigLIP: with one or another activation and epsilon.
        raise ValueError("architecture must be given for weights that are not DeiT's or LV-ViT's")
    if "cls_token" not in weights:
        sizes["class_token"] = False
    if "dist_token" in weights:
        return "deit_small_distilled_patch16_224"
    prefix = sizes.get("reg_tokens", 0) + ("cls_token" in weights)
    positions = weights["pos_embed"].shape[1]
    # Models with LayerScale or registers may have no positions for their prefix tokens. In others
    # such a length is that of a grid that is not square, and refused later.
    if {"init_values", "reg_tokens"} & sizes.keys() and not _is_square(positions - prefix):
        sizes["no_embed_class"] = True
    names = {192: "deit_tiny_patch16_224", 256: "deit_256", 768: "deit_base_patch16_224"}
    return names.get(width, "deit_small_patch16_224")


def _image_size(
    weights: dict[str, Tensor], model: Any, source: str, asked: int | tuple[int, int] | None
) -> tuple[int, int]:
    """(height, width) in pixels that the position embeddings are for."""
    patch = model.patch_embed.feat_ratio(as_scalar=False)
    size = _check_size(asked, patch)
    embedding = model.pos_embed
    if embedding is None or "pos_embed" not in weights:
        height, width = model.patch_embed.img_size
        return height, width
    prefix = embedding.shape[1] - model.patch_embed.num_patches
    shape = tuple(weights["pos_embed"].shape)
    positions = shape[1] - prefix
    if size is not None and positions == math.prod(size) // math.prod(patch):
        return size
    if positions == model.patch_embed.num_patches:  # a grid that need not be square
        height, width = model.patch_embed.img_size
        return height, width
    if not _is_square(positions):
        raise ValueError(f"{source}: pos_embed {shape} is not a square grid and {prefix} tokens")
    return patch[0] * math.isqrt(positions), patch[1] * math.isqrt(positions)


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


def _resize(model: Any, img_size: int | tuple[int, int] | None) -> None:
    """Change the input size of a timm model, position embeddings resampled by timm."""
    size = _check_size(img_size, model.patch_embed.feat_ratio(as_scalar=False))
    if size is not None and size != tuple(model.patch_embed.img_size):
        model.set_input_size(size)


def _check_size(img_size: Any, patch: tuple[int, int]) -> tuple[int, int] | None:
    """(height, width), refused unless they are whole numbers of patches."""
    if img_size is None:
        return None
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    if not isinstance(size, tuple | list) or not all(isinstance(side, int) for side in size):
        raise TypeError(f"img_size must be one or two integers, got {img_size!r}")
    if len(size) != 2 or any(s < 1 or s % p for s, p in zip(size, patch, strict=True)):
        raise ValueError(
            f"img_size must be multiples of the patch size {patch[0]}×{patch[1]}, got {img_size!r}"
        )
    return size[0], size[1]


_SCORER_PARTS = {"in_conv.0": "norm", "in_conv.1": "embed", "out_conv": "head"}


def _our_name(key: str) -> str:
    """A released scorer's key in this project's words: `score_predictor.0.in_conv.1.bias` is the
    bias of `scorers.0.embed`; others stay."""
    match = re.fullmatch(r"score_predictor\.(\d+)\.(in_conv\.[01]|out_conv)\.(.+)", key)
    if match is None:
        return key
    return f"scorers.{match[1]}.{_SCORER_PARTS[match[2]]}.{match[3]}"


def _released_name(key: str) -> str:
    """The inverse of `_our_name`, for a SparseViT's keys."""
    match = re.fullmatch(r"scorers\.(\d+)\.(norm|embed|head)\.(.+)", key)
    if match is None:
        return key.removeprefix("backbone.")
    part = {ours: theirs for theirs, ours in _SCORER_PARTS.items()}[match[2]]
    return f"score_predictor.{match[1]}.{part}.{match[3]}"
