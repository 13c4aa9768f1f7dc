"""Which of timm's models can be made sparse, and what that saves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import is_model_in_modules

from dynamicvit.core.backbones import UnsupportedBackbone, adapter_of
from dynamicvit.core.macs import count_gmacs
from dynamicvit.core.model import SparseViT
from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.io.files import write_text

# timm's modules that build on VisionTransformer or Eva, or on something near; and ours.
MODULES = (
    "beit",
    "deit",
    "eva",
    "lvvit",
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "vision_transformer_sam",
    "vitamin",
)


@dataclass(frozen=True)
class Support:
    """Whether a model of timm's registry can be made sparse.

    Attributes:
        name: in timm's registry.
        family: the class that timm builds.
        reason: why it is not supported; None if it is.
        input_size: (channels, height, width).
        tokens: patch tokens at the start, then after each stage.
        parameters: millions, of the dense model.
        gmacs: of the dense model, for one image.
        sparse_gmacs: of the sparse one.
    """

    name: str
    family: str
    reason: str | None = None
    input_size: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    parameters: float = 0.0
    gmacs: float = 0.0
    sparse_gmacs: float = 0.0


def names(filter: str = "*") -> list[str]:
    """Names in timm's registry, matching a wildcard, of models to ask `check` about."""
    return sorted({name for module in MODULES for name in timm.list_models(filter, module=module)})


def build_on_meta(name: str) -> Any:
    """A model with shapes but no values: any size fits in memory."""
    with torch.device("meta"):
        # Values are not there to be initialised, which would take seconds.
        skips = ("deit", "lvvit", "vision_transformer", "vision_transformer_hybrid")
        options: dict[str, Any] = (
            {"weight_init": "skip"} if is_model_in_modules(name, skips) else {}
        )
        return timm.create_model(name, **options)


def check(name: str, keep_ratio: float = 0.7) -> Support:
    """Whether timm's model of this name can be made sparse, and what that saves."""
    model = build_on_meta(name)
    family = type(model).__name__
    try:
        adapter_of(model)
    except UnsupportedBackbone as error:
        return Support(name, family, str(error).partition(" is not supported: ")[2])
    config = timm.data.resolve_input_data_config(model)
    size = config["input_size"]
    schedule = KeepSchedule.from_keep_ratio(keep_ratio, depth=len(model.blocks))
    patches = model.patch_embed.num_patches
    try:
        sparse = SparseViT(model, schedule)
    except ValueError as error:  # too few patches for this ratio
        return Support(name, family, str(error))
    return Support(
        name,
        family,
        None,
        size,
        (patches, *schedule.counts(patches)),
        sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        count_gmacs(model, size),
        count_gmacs(sparse, size),
    )


def models(
    filter: str = "*", /, keep_ratio: float = 0.7, output: str | None = None
) -> list[Support]:
    """List the timm models that can be made sparse: parameters, and GMACs dense and pruned.

    Args:
        filter: a wildcard on timm's names, such as "deit*".
        keep_ratio: for which to count; of three evenly spaced stages.
        output: Markdown file to write the table to, with what is not supported and why.

    Returns:
        What was found, in the order of names.

    Raises:
        ValueError: if no name matches, or keep_ratio is not in (0, 1].
    """
    from rich.console import Console  # importing the package stays cheap
    from rich.progress import track
    from rich.table import Table

    matching = names(filter)
    if not matching:
        raise ValueError(f"filter must match a plain transformer of timm's, got {filter!r}")
    found = [
        check(name, keep_ratio)
        for name in track(matching, "counting", console=Console(stderr=True), transient=True)
    ]
    header = (
        "model",
        "image",
        "tokens",
        "M parameters",
        "GMACs",
        f"GMACs at {keep_ratio}",
        "saved",
    )
    table = Table(*header)
    for item in found:
        if item.reason is None:
            table.add_row(*_row(item))
    # Names stay whole, so that they can be copied: a narrow screen wraps lines by itself.
    console = Console(width=max(Console().width, 140))
    console.print(table)
    refused = [item for item in found if item.reason is not None]
    console.print(f"{len(found) - len(refused)} models; not supported: {len(refused)}")
    for item in refused:
        console.print(f"  {item.name}: {item.reason}")
    if output:
        write_text(Path(output), _markdown(filter, header, found))
    return found


def _row(item: Support) -> tuple[str, ...]:
    return (
        item.name,
        "×".join(str(pixels) for pixels in item.input_size[1:]),
        " → ".join(str(count) for count in item.tokens),
        f"{item.parameters:.1f}",
        f"{item.gmacs:.2f}",
        f"{item.sparse_gmacs:.2f}",
        f"{1 - item.sparse_gmacs / item.gmacs:.1%}",
    )


def _markdown(filter: str, header: tuple[str, ...], found: list[Support]) -> str:
    supported = [item for item in found if item.reason is None]
    refused = [item for item in found if item.reason is not None]
    lines = [
        "# Models",
        "",
        f"Written by `dynamicvit models '{filter}'` with timm {timm.__version__}: the plain "
        f"transformers of that name in timm's registry and this project's. {len(supported)} of "
        f"{len(found)} are supported. GMACs are billions of multiply-adds for one image.",
        "",
        "| " + " | ".join(header) + " |",
        "|---" * len(header) + "|",
        *("| " + " | ".join(_row(item)) + " |" for item in supported),
        "",
        "## Not supported",
        "",
        "| model | class | why |",
        "|---|---|---|",
        *(f"| {item.name} | {item.family} | {item.reason} |" for item in refused),
        "",
    ]
    return "\n".join(lines)
