"""Which of timm's models can be made sparse, and what that saves."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

import timm
from huggingface_hub import hf_hub_download
from rich.console import Console

from dynamicvit.core.backbones import UnsupportedBackbone, adapter_of
from dynamicvit.core.macs import count_gmacs
from dynamicvit.core.model import SparseViT
from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.evaluation.console import cell, make_table, track
from dynamicvit.io.arguments import check_types
from dynamicvit.io.files import check_file, write_text
from dynamicvit.io.folder import CONFIG
from dynamicvit.io.hub import offline_if_unreachable, one_line
from dynamicvit.io.load import is_hub_id
from dynamicvit.models.names import build_on_meta, count_parameters, why_unsupported

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
        count_parameters(model) / 1e6,
        count_gmacs(model, size),
        count_gmacs(sparse, size),
    )


@check_types
def models(
    filter: str = "*", /, keep_ratio: float = 0.7, output: str | None = None, quiet: bool = False
) -> list[Support]:
    """List the timm models that can be made sparse: parameters, and GMACs dense and pruned.

    Args:
        filter: a wildcard on timm's names, such as "deit*", or the hub id of a timm model. If it
            is no plain transformer, an error says why and what is near.
        keep_ratio: for which to count; of three evenly spaced stages.
        output: Markdown file to write the table to, with what is not supported and why.
        quiet: print nothing, neither table nor progress.

    Returns:
        What was found, in the order of names.

    Raises:
        ValueError: if no name matches, saying why, or keep_ratio is not in (0, 1].
    """
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio must lie in (0, 1], got {keep_ratio}")
    if output:
        check_file("output", output)
    matching = _find(filter)
    found = [check(name, keep_ratio) for name in track(matching, "counting", quiet, "models")]
    if output:
        write_text(Path(output), _markdown(filter, keep_ratio, found))
    if quiet:
        return found
    # Names stay whole, so that they can be copied; --output has images and tokens too.
    table = make_table("model", "million", "GMACs", f"at {keep_ratio}", "saved")
    for item in found:
        if item.reason is None:
            table.add_row(cell(item.name), *_row(item)[3:])
    console = Console()
    console.print(table)
    refused = [item for item in found if item.reason is not None]
    console.print(f"{len(found) - len(refused)} models; not supported: {len(refused)}")
    for item in refused:
        console.print(f"  {item.name}: {item.reason}", markup=False, highlight=False)
    return found


def _find(filter: str) -> list[str]:
    """The names that are meant: those that match, or the architecture of a hub id, or of one of
    timm's names of weights ("vit_small_patch16_224.augreg_in1k").

    Raises:
        ValueError: if there is none, saying why and what is near.
    """
    name = _architecture(filter) if is_hub_id(filter) else filter
    base = name.partition(".")[0]
    matching = names(filter) or names(base)
    if matching:
        return matching
    start = f"filter must match a plain transformer of timm's, got {filter!r}"
    if why := why_unsupported(base):
        raise ValueError(f"{start}: {why}")
    others = timm.list_models(name)
    if others:
        some = ", ".join(others[:3])
        raise ValueError(f"{start}: {len(others)} models of other kinds do, such as {some}")
    near = [item for item in names() if base in item][:3]
    near = near or difflib.get_close_matches(base, names(), n=3, cutoff=0.5)
    raise ValueError(f"{start}; near: {', '.join(near) or 'none, `dynamicvit models` lists all'}")


def _architecture(hub_id: str) -> str:
    """timm's name of the model that a hub id holds. timm's own are known without the hub.

    Raises:
        ValueError: if it is none of timm's, or not reached.
    """
    owner, name = hub_id.split("/")
    if owner == "timm" and timm.is_model(name):
        return name
    near = [other for other in names() if name.replace("-", "_") in other][:3]
    start = f"filter must be timm's name or the hub id of a timm model, got {hub_id!r}"
    try:
        with offline_if_unreachable():
            config = json.loads(Path(hf_hub_download(hub_id, CONFIG)).read_text(encoding="utf-8"))
        found = config.get("architecture")
    except (OSError, ValueError, AttributeError) as error:
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ValueError(f"{start}: {one_line(error)}{hint}") from error
    if not isinstance(found, str):
        kind = config.get("model_type")
        raise ValueError(
            f"{start}, whose {CONFIG} is of another library (model type {kind!r}); near: "
            + (", ".join(near) or "timm's own on the hub, which are called timm/…")
        )
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


def _markdown(filter: str, keep_ratio: float, found: list[Support]) -> str:
    header = (
        "model",
        "image",
        "tokens",
        "M parameters",
        "GMACs",
        f"GMACs at {keep_ratio}",
        "saved",
    )
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
