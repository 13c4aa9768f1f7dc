"""The whole way in one command: a dense model becomes a fast one, measured before and after."""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from rich.console import Console
from timm.data import resolve_input_data_config
from torch import nn

import dynamicvit
from dynamicvit.core.backbones import Backbone
from dynamicvit.core.model import SparseViT
from dynamicvit.core.selectors.rules import RandomScorer
from dynamicvit.evaluation.accuracy import Evaluation, evaluate_model
from dynamicvit.evaluation.console import make_table, plain, track
from dynamicvit.evaluation.data import ImageData, open_data
from dynamicvit.evaluation.environment import environment
from dynamicvit.evaluation.evaluate import print_evaluations
from dynamicvit.evaluation.launch import find_device, start_processes
from dynamicvit.evaluation.loader import create_image_loader
from dynamicvit.evaluation.setup import input_size
from dynamicvit.evaluation.timing import Speed, compare_speed
from dynamicvit.io.embedded import ASSETS, embedded_images
from dynamicvit.io.files import check_folder, write_text, written_whole
from dynamicvit.io.folder import save_folder
from dynamicvit.io.load import check_backbone, load_model
from dynamicvit.training.config import TrainConfig, choose_batch
from dynamicvit.training.metrics import METRICS
from dynamicvit.training.run_folder import BEST, CONFIG, DENSE
from dynamicvit.training.train import train
from dynamicvit.views.explain import explain
from dynamicvit.views.explanation import draw_sheet


def quickstart(
    output: str = "quickstart",
    data: str | None = None,
    model: str | None = None,
    keep_ratio: float = 0.7,
    epochs: int = 1,
    batch_size: int | None = None,
    seed: int = 0,
    pretrained: bool = True,
    weights: str | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Make a dense model sparse, fine-tune it, and measure accuracy and speed before and after.

    With no options it uses a small ViT and 8,000 Fashion-MNIST images that the package carries, and
    needs no network. The fine-tuning is short, so it uses two options that are off in the paper's
    recipe: the scorers start at the keep ratio and are first taught the teacher's attention.

    Args:
        output: folder to write: sparse/ (the model), metrics.json, keep_maps.png, and the
            runs; with weights or without pretrained, dense/ too, the model to begin with. Earlier
            results of a quickstart in it are replaced.
        data: your own images, as data/{train,val}/CLASS/IMAGE. By default the embedded ones.
        model: your own dense model: a timm name, a model folder or a hub id. By default the
            embedded one. If its classes are not those of the data, it gets a new head and is
            fine-tuned as a dense model first.
        keep_ratio: share of the tokens that each of the three stages keeps.
        epochs: passes over the training images in the fine-tuning. With more than one, the epoch
            with the best top-1 is kept, chosen on the same images that the result is measured on.
        batch_size: images a training step; by default 32, or all if there are fewer.
        seed: of everything random.
        pretrained: for a timm name: load timm's pretrained weights, from the hub or its cache.
        weights: for a timm name: file with a state dict to load instead.
        device: such as cpu or cuda:1; by default a GPU if there is one.
        quiet: print nothing.

    Returns:
        What metrics.json holds.

    Raises:
        ValueError, FileNotFoundError: naming what is wrong with the options, model or data.
    """
    if data is None and model is not None:
        raise ValueError(f"data must be given with model, a folder of images, got {model} alone")
    if model is None and data is not None:
        raise ValueError(
            f"model must be given with data, such as deit_small_patch16_224, got {data} alone"
        )
    if model is None and (weights is not None or not pretrained):
        raise ValueError(
            f"model must be given with pretrained and weights, got {pretrained} and {weights}"
        )
    check_folder("output", output)
    find_device(device)
    folder = Path(output)
    config = TrainConfig(
        data=str(folder / "fashion_mnist") if data is None else data,
        output=str(folder / "sparse_run"),
        model=str(ASSETS / "model") if model is None else model,
        keep_ratio=keep_ratio,
        epochs=epochs,
        dense_epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        device=device,
        **RECIPE,
    )
    given: dict[str, Any] = {"model": model or "embedded", "data": data or "embedded"}
    if model is not None:
        given |= {"pretrained": pretrained, "weights": weights}
    with ExitStack() as stack:
        if quiet:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        return _run(folder, config, given, quiet)


def _run(folder: Path, config: TrainConfig, given: dict[str, Any], quiet: bool) -> dict[str, Any]:
    """The five steps. Arguments: the folder to write, what to train, and what was asked for."""
    started = time.perf_counter()
    console = Console(soft_wrap=True)
    config, dense = _begin(folder, config, given)
    images = open_data(config.data, "val", in_chans=dense.in_chans)

    console.print(
        f"[bold]1/5[/] fine-tuning at keep ratio {config.keep_ratio} with the paper's losses"
    )
    train(config)
    sparse = dynamicvit.load(Path(config.output) / BEST)
    save_folder(sparse, folder / "sparse")
    with_new_head = Path(config.output) / DENSE / BEST
    if with_new_head.exists():  # the data has other classes than the given model
        config = replace(config, model=str(with_new_head))
        dense = load_model(config.model)

    console.print("[bold]2/5[/] evaluating the dense model")
    results = {"dense": _evaluate("dense", dense, images, config.device, quiet)}
    console.print("[bold]3/5[/] evaluating the sparse model, and random selection beside it")
    results["sparse"] = _evaluate("sparse", sparse, images, config.device, quiet)
    random = _with_random_selection(sparse, config.seed)
    results["random selection"] = _evaluate(
        "random selection", random, images, config.device, quiet
    )

    console.print("[bold]4/5[/] timing dense against sparse, in turn")
    speeds = _time(dense, sparse, quiet)

    console.print("[bold]5/5[/] drawing what is kept")
    _draw(sparse.cpu().eval(), images, folder / "keep_maps.png")

    metrics = {
        **_describe_results(results, speeds),
        "settings": _describe_settings(config, given),
        "environment": environment(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    print_evaluations({name: asdict(value) for name, value in results.items()})
    _print_speeds(console, speeds)
    _print_result(console, folder, config, metrics, speeds)
    return metrics


def _begin(
    folder: Path, config: TrainConfig, given: dict[str, Any]
) -> tuple[TrainConfig, Backbone]:
    """What to train, and the dense model to begin with; all of it checked, and the images there."""
    check_backbone(config.model)
    if given["data"] == "embedded":
        unpack_images(Path(config.data))
    images = len(open_data(config.data, "train").dataset)
    if config.batch_size is None:
        config = replace(config, batch_size=min(32, images))
    choose_batch(config, images, processes=1)
    pretrained, weights = given.get("pretrained", True), given.get("weights")
    own = {} if weights is None else {"weights": weights}
    dense = load_model(config.model, pretrained, **own)
    if isinstance(dense, SparseViT):
        raise ValueError(f"model must be dense, got the sparse model {config.model}")
    folder.mkdir(parents=True, exist_ok=True)
    _remove_run(Path(config.output))
    if weights is not None or not pretrained:
        save_folder(dense, folder / "dense")
        config = replace(config, model=str(folder / "dense"))
    return config, dense


def _evaluate(
    name: str, model: nn.Module, images: ImageData, device: str | None, quiet: bool
) -> Evaluation:
    accelerator = start_processes("float32", device)
    loader = create_image_loader(
        images,
        64,
        resolve_input_data_config(model),
        training=False,
        workers=0,
        device=accelerator.device,
    )
    batches = track(accelerator.prepare(loader), f"evaluating {name}", quiet, "batches")
    return evaluate_model(model, batches, accelerator)


def _with_random_selection(model: SparseViT, seed: int) -> SparseViT:
    """The same backbone and schedule with scorers that draw."""
    set_seed(seed)
    return SparseViT(model.backbone, model.schedule, [RandomScorer() for _ in model.scorers])


def _time(dense: Any, sparse: SparseViT, quiet: bool) -> list[Speed]:
    fused, size = sparse.fuse(), input_size(dense)
    return [
        speed
        for batch_size in track(BATCH_SIZES, "timing", quiet, "batch sizes")
        for speed in compare_speed(dense, fused, size, (batch_size,))
    ]


def _describe_results(results: dict[str, Evaluation], speeds: list[Speed]) -> dict[str, Any]:
    dense, sparse = results["dense"], results["sparse"]
    return {
        **{name.replace(" ", "_"): asdict(found) for name, found in results.items()},
        "points_lost": dense.top1 - sparse.top1,
        "gmacs_saved_percent": 100 * (1 - sparse.gmacs / dense.gmacs),
        "speed": [asdict(speed) for speed in speeds],
        "best_speed_up": max(speed.speed_up for speed in speeds),
    }


def _describe_settings(config: TrainConfig, given: dict[str, Any]) -> dict[str, Any]:
    """What was asked for, and the options of the training."""
    return {
        **given,
        "model": config.model if given["model"] != "embedded" else "embedded",
        "train": {name: value for name, value in asdict(config).items() if name not in _PATHS},
    }


BATCH_SIZES = (1, 8, 32)  # that are timed
_PATHS = ("data", "data_dir", "model", "output")

# What differs from the paper's recipe, because the fine-tuning is short and images may be small.
RECIPE: dict[str, Any] = {
    "workers": 0,
    "backbone_lr": 0.1,
    "freeze_epochs": 0,
    "warmup_epochs": 0,
    "crop_scale": None,
    "color_jitter": 0.0,
    "auto_augment": None,
    "random_erasing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "label_smoothing": 0.0,
    "clip_grad": 1.0,
    "ema": None,
    "trackers": [],
    "start_at_ratio": True,
    "warm_start": 60,
}


def _remove_run(folder: Path) -> None:
    """Remove an earlier quickstart's run, and nothing that is not one."""
    if not folder.exists():
        return
    begun = (folder / METRICS).is_file() or (folder / DENSE).is_dir()
    if not ((folder / CONFIG).is_file() and begun):
        raise ValueError(f"output has a {folder.name} that no quickstart wrote, got {folder}")
    shutil.rmtree(folder)


def unpack_images(folder: Path) -> Path:
    """Write the embedded images as an ordinary image folder, `folder/{train,val}/CLASS/*.png`."""
    if (folder / ".complete").exists():
        return folder
    for split in ("train", "val"):
        for name, index, picture in embedded_images(split):
            target = folder / split / name
            target.mkdir(parents=True, exist_ok=True)
            picture.save(target / f"{index:03}.png")
    (folder / ".complete").touch()
    return folder


def _draw(model: SparseViT, images: ImageData, path: Path) -> None:
    """Eight images from all over the data set, with what they are and are taken for."""
    count = len(images.dataset)
    chosen = [images.dataset[index] for index in range(count // 16, count, max(1, count // 8))][:8]
    inputs = torch.stack([image for image, _ in chosen])
    names = images.class_names or [str(index) for index in range(model.num_classes)]
    found = explain(model, inputs)
    captions = [
        names[target] + ("" if item.pruned[0].index == target else f", taken for {guess}")
        for (_, target), item in zip(chosen, found, strict=True)
        for guess in [names[item.pruned[0].index]]
    ]
    with written_whole(path) as temporary:
        draw_sheet(found, captions).save(temporary, format="PNG")


def _print_speeds(console: Console, speeds: list[Speed]) -> None:
    table = make_table("batch", "dense, images/s", "sparse, images/s", "speed-up", "quartiles")
    for speed in speeds:
        table.add_row(
            str(speed.batch_size),
            f"{speed.dense:.0f}",
            f"{speed.sparse:.0f}",
            f"{speed.speed_up:.2f}×",
            f"{speed.spread[0]:.2f}–{speed.spread[1]:.2f}",
        )
    console.print(table)


def _print_result(
    console: Console,
    folder: Path,
    config: TrainConfig,
    metrics: dict[str, Any],
    speeds: list[Speed],
) -> None:
    best = max(speeds, key=lambda speed: speed.speed_up)
    dense = metrics["dense"]["top1"]
    lost, blind = (
        f"{round(metrics[name]['top1'] - dense, 2) + 0.0:+.2f}"
        for name in ("sparse", "random_selection")
    )
    rates = {speed.batch_size: f"{speed.speed_up:.2f}×" for speed in (speeds[0], best)}
    throughput = ", ".join(f"{rate} at batch {size}" for size, rate in rates.items())
    console.print(
        f"[bold]{metrics['gmacs_saved_percent']:.1f}% fewer GMACs, throughput {throughput}, "
        f"top-1 {lost} points[/] (random selection: {blind})"
    )
    if speeds[0].speed_up < 0.9 * best.speed_up:
        console.print(
            f"At batch {speeds[0].batch_size} the number of calls takes the time of a model this "
            "small, not the size of its products."
        )
    console.print(
        f"used beside the paper's recipe: start_at_ratio, warm_start for {config.warm_start} "
        f"steps; {metrics['seconds']:.0f} s in all"
    )
    for what, name in (("model", "sparse"), ("pictures", "keep_maps.png")):
        console.print(f"{what}: {plain(folder / name)}", markup=False)
