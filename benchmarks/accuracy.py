"""Accuracy against cost: learned selection and its alternatives, with the same training budget.

    PYTHONPATH=src python benchmarks/accuracy.py runs/accuracy --list
    PYTHONPATH=src python benchmarks/accuracy.py runs/accuracy --data_dir DIR --seeds 3
    PYTHONPATH=src python benchmarks/accuracy.py runs/accuracy --rows 'learned-0.7' '*-0.5*'

Each row is a training run in its own folder, next to its result. The same command continues an
interrupted one: finished rows are kept, an unfinished row is resumed. After each row all results
are written to one JSON file and drawn.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, cast

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.table import Table
from timm.data import resolve_input_data_config
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the script's own folder is what Python puts there

from benchmarks.cluttered import CANVAS, write_cluttered
from benchmarks.tables import STEP_BASELINES, draw, print_table, summarise
from dynamicvit import KeepSchedule, SparseViT, sparsify
from dynamicvit.core.selectors import SELECTORS
from dynamicvit.core.selectors.merging import Merger
from dynamicvit.evaluation.accuracy import evaluate_model
from dynamicvit.evaluation.data import open_data
from dynamicvit.evaluation.environment import environment
from dynamicvit.evaluation.loader import create_image_loader
from dynamicvit.evaluation.timing import interleave, medians
from dynamicvit.io.embedded import ASSETS
from dynamicvit.io.files import check_folder, write_text
from dynamicvit.io.folder import load_folder, save_folder
from dynamicvit.quickstart import RECIPE, unpack_images
from dynamicvit.training.checkpoints import CHECKPOINTS, find_checkpoints
from dynamicvit.training.config import RECIPES, TrainConfig
from dynamicvit.training.metrics import METRICS
from dynamicvit.training.options import OLD_PRECISIONS
from dynamicvit.training.run_folder import BEST
from dynamicvit.training.task import DenseTask, SparseTask
from dynamicvit.training.train import train

RESULT, FINAL, JSON, PLOT = "result.json", "final", "accuracy.json", "accuracy.png"
BASELINES = tuple(name for name in SELECTORS if name != "learned")
BASELINE_RATIOS = (0.7, 0.5)
MERGING = tuple(name for name in BASELINES if issubclass(SELECTORS[name], Merger))
LOSSES = ("cross_entropy", "ratio", "logit_kl", "token")
WARM_START = 120  # steps, of those that a row has; half of them at most
# For selectors that learn. They start at the ratio. With the paper's weight of 2, scorers still
# keep more than the ratio after so few steps, and the measured model would not be the trained one.
REACH_RATIO = {"ratio_weight": 10.0}
BEST_START = {**REACH_RATIO, "warm_start": WARM_START}
# One model for every budget.
KEEP_RATIOS = [0.4, 1.0]
BUDGETS = (0.9, 0.7, 0.5, 0.4, 0.35, 0.3)
LEVELS = (0.28, 0.35, 0.5, 0.7, 1.0)
CALIBRATION = 4096  # images
# What `train --recipe` sets, except the number of steps. The paper's 30 epochs are six here; the
# first freezes the backbone and warms up, as the paper's first five do.
PAPER = {
    "epochs": 6,
    "freeze_epochs": 1,
    "warmup_epochs": 1,
    "backbone_lr": 0.01,
    "start_at_ratio": False,
}
FAST = {name: value for name, value in RECIPES["fast"].items() if name != "epochs"}


# accelerate's names.
PRECISIONS = {"float32": "no", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Scale:
    """Sizes of models and budgets.

    Args:
        model: TrainConfig's options for the dense model to train. None: the embedded model, which
            is trained already.
        dense_steps: training steps of the dense model.
        tuning_steps: steps of fine-tuning. They stand for the paper's 30 epochs.
        fewer_steps: other numbers of steps, for the rows of accuracy against steps.
        batch_size: images in a step.
        cluttered: use the images that `write_cluttered` makes.
    """

    model: dict[str, Any] | None
    dense_steps: int
    tuning_steps: int
    fewer_steps: tuple[int, ...]
    batch_size: int
    cluttered: bool = False


def _vit(name: str, side: int = 28, weights: str | None = None, **sizes: Any) -> dict[str, Any]:
    cfg = {"input_size": [1, side, side], "mean": [0.286], "std": [0.353], "crop_pct": 1.0}
    if weights is not None:
        cfg |= {"file": weights, "num_classes": 10}
    shared = {"img_size": side, "in_chans": 1, "num_classes": 10, "pretrained_cfg_overlay": cfg}
    return {"model": name, "model_kwargs": {**shared, **sizes}, "pretrained": weights is not None}


DENSE_49 = "benchmarks/results/small/dense/model.safetensors"  # of the small scale
SCALES = {
    # Some hours on two cores. The stem (a convolution and pooling, both with stride 2) gives 49
    # tokens. With it the model learns much faster than with patches of 4×4 pixels.
    "small": Scale(
        _vit("vit_tiny_r_s16_p8_224", patch_size=1, embed_dim=64, num_heads=2),
        dense_steps=9360,
        tuning_steps=900,
        fewer_steps=(100, 225, 450),
        batch_size=128,
    ),
    # For a GPU, or for the headline rows on two cores.
    "full": Scale(
        None,
        dense_steps=0,
        tuning_steps=900,
        fewer_steps=(100, 225, 450),
        batch_size=128,
    ),
    # Images with a background. The small scale's dense model is trained further at 40 pixels, where
    # its stem gives 10×10 tokens.
    "cluttered": Scale(
        _vit(
            "vit_tiny_r_s16_p8_224",
            side=CANVAS,
            weights=DENSE_49,
            patch_size=1,
            embed_dim=64,
            num_heads=2,
        ),
        dense_steps=1404,
        tuning_steps=900,
        fewer_steps=(100, 225, 450),
        batch_size=128,
        cluttered=True,
    ),
    # To try the command.
    "tiny": Scale(
        _vit("vit_tiny_patch16_224", patch_size=7, embed_dim=16, num_heads=2, depth=4),
        dense_steps=4,
        tuning_steps=6,
        fewer_steps=(3,),
        batch_size=10,
    ),
}
DENSE_LR = 1.5e-3


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: of its folder, without the seed.
        table: which comparison it belongs to.
        steps: of training, those of a warm start included; 0 for none.
        scorer: as of `sparsify`; None for the dense model.
        keep_ratio: of each stage.
        stages: how many, evenly spaced.
        headline: whether it is run with every seed.
        options: of TrainConfig, where they differ.
    """

    name: str
    table: str
    steps: int
    scorer: str | None = None
    keep_ratio: float | None = None
    stages: int = 3
    headline: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def folder(self) -> str:
        return self.name if self.seed == 0 else f"{self.name}-seed{self.seed}"


def plan(scale: Scale, seeds: int = 1, depth: int = 12) -> list[Row]:
    """All rows, the most important first: the main table, fewer steps, more seeds, other stages,
    losses left out, and the static mask without a warm start."""
    full = scale.tuning_steps
    learned = [
        Row(
            f"learned-{ratio}",
            "main",
            full,
            "learned",
            ratio,
            headline=ratio in BASELINE_RATIOS,
            options=BEST_START,
        )
        for ratio in (*BASELINE_RATIOS, 0.9, 0.8)
    ]
    untrained, tuned = [], []
    for ratio in BASELINE_RATIOS:
        for name in BASELINES:
            row = f"{name}-{ratio}"
            headline = ratio == 0.5 or name in STEP_BASELINES
            untrained.append(Row(f"{row}-untrained", "main", 0, name, ratio))
            options = BEST_START if SELECTORS[name].learns else {}
            tuned.append(Row(row, "main", full, name, ratio, headline=headline, options=options))
    # The dense model with the same fine-tuning: what fine-tuning gains when nothing leaves.
    kept = Row("all-kept", "main", full, "random", 1.0, headline=True)
    main = [*learned[:2], kept, *untrained, *tuned, *learned[2:]]
    variants: dict[str, tuple[str, float, dict[str, Any]]] = {
        "all_kept": ("random", 1.0, {}),
        "learned": ("learned", 0.7, {**REACH_RATIO, "start_at_ratio": False}),
        "learned_at_ratio": ("learned", 0.7, REACH_RATIO),
        "learned_warm": ("learned", 0.7, {**BEST_START, "start_at_ratio": False}),
        "learned_warm_at_ratio": ("learned", 0.7, BEST_START),
        **{name: (name, 0.7, {}) for name in STEP_BASELINES},
    }
    in_main = {"all_kept", "learned_warm_at_ratio", *STEP_BASELINES}
    fewer = [
        Row(
            f"steps-{steps}-{name}",
            "steps",
            steps,
            scorer,
            ratio,
            # The fast recipe has a quarter of the steps. It is compared with these rows.
            headline=steps == full // 4 and (name == "all_kept" or "warm" in name),
            options=options,
        )
        for steps in (*scale.fewer_steps, full)
        for name, (scorer, ratio, options) in variants.items()
        if steps < full or name not in in_main
    ]
    # The fast recipe, the same with all steps, and the same with all tokens kept.
    without_scorers = {k: v for k, v in FAST.items() if k not in ("start_at_ratio", "warm_start")}
    recipes = [
        Row("recipe-paper", "recipes", full, "learned", 0.7, options=PAPER),
        Row("recipe-fast", "recipes", full // 4, "learned", 0.7, options=FAST),
        Row("recipe-fast_full", "recipes", full, "learned", 0.7, options=FAST),
        Row("recipe-fast_all_kept", "recipes", full // 4, "random", 1.0, options=without_scorers),
    ]
    recipes = [replace(row, headline=True) for row in recipes]
    stages = [
        Row(
            f"stages-{n}",
            "stages",
            full,
            "learned",
            same_cost_ratio(0.7, n, depth),
            stages=n,
            options=BEST_START,
        )
        for n in (1, 2)
    ]
    losses = [
        Row(
            f"without-{loss}",
            "losses",
            full,
            "learned",
            0.7,
            options={**BEST_START, f"{loss}_weight": 0.0},
        )
        for loss in LOSSES
    ]
    # The static mask's warm start helps it at one ratio and not at the other.
    starts = [
        Row(f"static-{ratio}-no_warm_start", "starts", full, "static", ratio, options=REACH_RATIO)
        for ratio in BASELINE_RATIOS
    ]
    budget_options: dict[str, Any] = {**BEST_START, "keep_ratios": KEEP_RATIOS}
    budgets = [
        Row("budgets", "budgets", full, "learned", 0.7, headline=True, options=budget_options)
    ]
    first = [Row("dense", "dense", scale.dense_steps), *main, *recipes, *fewer, *budgets]
    more = [replace(row, seed=seed) for seed in range(1, seeds) for row in first if row.headline]
    return [*first, *more, *stages, *losses, *starts]


def same_cost_ratio(keep_ratio: float, stages: int, depth: int) -> float:
    """The keep ratio with which blocks see, on average, as many tokens as with three stages."""

    def share(ratio: float, stages: int) -> float:
        schedule = KeepSchedule.from_keep_ratio(ratio, depth, stages)
        edges = (0, *schedule.blocks, depth)
        kept = (1.0, *schedule.ratios)
        spans = [after - before for before, after in pairwise(edges)]
        return sum(k * span for k, span in zip(kept, spans, strict=True))

    low, high = 1e-3, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if share(middle, stages) < share(keep_ratio, 3) else (low, middle)
        )
    return round(low, 4)


@dataclass
class Bench:
    """A run of this command."""

    folder: Path
    scale_name: str
    scale: Scale
    data: str
    data_dir: str | None
    model: str | None  # the dense one's folder, where it is not trained here
    model_name: str | None
    precision: str
    workers: int
    console: Console = field(default_factory=lambda: Console(width=120))

    def __post_init__(self) -> None:
        if self.model is not None and isinstance(load_folder(self.model), SparseViT):
            raise ValueError(f"model must be a dense model's folder, got the sparse {self.model}")
        self.accelerator = Accelerator(mixed_precision=PRECISIONS[self.precision])
        self.images = {
            split: len(open_data(self.data, split, data_dir=self.data_dir, in_chans=1).dataset)
            for split in ("train", "val")
        }

    @property
    def dense(self) -> str:
        """The folder of the dense model."""
        return self.model or str(self.folder / "dense" / FINAL)

    @property
    def depth(self) -> int:
        """Blocks of the dense model."""
        if self.model is None:
            return int(cast(Any, self.scale.model)["model_kwargs"].get("depth", 12))
        return len(cast(Any, load_folder(self.model)).blocks)

    def steps_and_warm(self, row: Row) -> tuple[int, int]:
        """Steps of training, and of the warm start before them."""
        if row.scorer is None and self.model is not None:
            return 0, 0
        warm = min(row.options.get("warm_start", 0), row.steps // 2)
        return row.steps - warm, warm

    def config(self, row: Row) -> TrainConfig | None:
        """The training of a row; None if it is without."""
        steps, warm = self.steps_and_warm(row)
        if steps == 0:
            return None
        batch = self.scale.batch_size
        # Few epochs, because each ends with a validation. All have the same length, so that the
        # number of steps is nearly the one asked for.
        epochs = row.options.get("epochs") or -(-steps // max(1, self.images["train"] // batch))
        of_dense: dict[str, Any] = {
            **(self.scale.model or {}),
            "keep_ratio": None,
            "lr": DENSE_LR * 1024 / batch,
            "crop_scale": [0.8, 1.0],
            "warmup_epochs": epochs // 6,
        }
        # The backbone learns as fast as the scorers. At a tenth of that rate, it does not learn to
        # work without half of the tokens in so few steps.
        of_sparse: dict[str, Any] = {
            "model": self.dense,
            "scorer": row.scorer,
            "backbone_lr": 1.0,
        }
        if row.scorer is not None:
            schedule = self.schedule(row)
            of_sparse |= {"blocks": list(schedule.blocks), "ratios": list(schedule.ratios)}
        options = {
            **RECIPE,
            "lr": 1e-3 * 1024 / batch,  # 1e-3 in each step; it is multiplied by batch / 1024
            "kept_gradients": self.accelerator.device.type == "cpu" and row.scorer is not None,
            "start_at_ratio": row.scorer is not None and SELECTORS[row.scorer].learns,
            **(of_dense if row.scorer is None else of_sparse),
            "epochs": epochs,
            **row.options,
            "warm_start": warm,
            "workers": self.workers,
        }
        return TrainConfig(
            data=self.data,
            data_dir=self.data_dir,
            output=str(self.folder / row.folder),
            epoch_images=round(steps / epochs) * batch,
            batch_size=batch,
            precision=PRECISIONS[self.precision],
            checkpoint_steps=200,
            keep_checkpoints=1,
            seed=row.seed,
            **options,
        )

    def schedule(self, row: Row) -> KeepSchedule:
        """The schedule of a sparse row."""
        return KeepSchedule.from_keep_ratio(cast(float, row.keep_ratio), self.depth, row.stages)

    def settings(self, row: Row, config: TrainConfig | None) -> dict[str, Any]:
        """What a result depends on, without paths."""
        training = None
        if config is not None:
            training = {k: v for k, v in asdict(config).items() if k not in _PLACES}
        images = "embedded" if self.data_dir is None else "torch/fashion_mnist"
        return {
            "data": images + (", cluttered" if self.scale.cluttered else ""),
            "dense": self.model_name,
            "precision": PRECISIONS[self.precision],
            "train": training,
        }

    def check(self, row: Row) -> None:
        """Raise ValueError if a row's result has other settings."""
        path = self.folder / row.folder / RESULT
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged, remove it: {error}") from error
        settings = json.loads(json.dumps(self.settings(row, self.config(row))))
        # Early results of untrained rows lack the precision. It was float32.
        had = {"scale": result["scale"], "precision": "no"}
        had |= _flat(_completed(result["settings"]))
        have = {"scale": self.scale_name, **_flat(settings)}
        for found in (had, have):  # earlier results have other names
            found["precision"] = OLD_PRECISIONS.get(found["precision"], found["precision"])
        others = [key for key in {**had, **have} if had.get(key) != have.get(key)]
        if others:
            raise ValueError(
                f"{path} has a result of other settings: choose another folder, or remove it, got "
                + ", ".join(f"{key} {have.get(key)} (not {had.get(key)})" for key in others)
            )

    def run(self, row: Row) -> None:
        """Train and measure a row, and write its result."""
        folder = self.folder / row.folder
        config = self.config(row)
        settings = self.settings(row, config)
        start = time.perf_counter()
        set_seed(row.seed)
        model = self._train(row, config) if config is not None else self._untrained(row)
        save_folder(model, folder / FINAL)
        evaluation = self._evaluate(model, row.seed)
        if "keep_ratios" in row.options:
            evaluation["budgets"] = self._budgets(cast(SparseViT, model))
            save_folder(model, folder / FINAL)  # with its calibration
        steps, warm = self.steps_and_warm(row)
        if config is not None:
            steps = config.epochs * (cast(int, config.epoch_images) // cast(int, config.batch_size))
        result = {
            "row": row.folder,
            "table": row.table,
            "scorer": row.scorer,
            "keep_ratio": row.keep_ratio,
            "stages": row.stages if row.scorer else 0,
            "seed": row.seed,
            "steps": steps,
            "warm_start": warm,
            "scale": self.scale_name,
            **evaluation,
            "settings": settings,
            "environment": environment(),
            "seconds": round(time.perf_counter() - start, 1),  # of the last call, if resumed
        }
        write_text(folder / RESULT, json.dumps(result, indent=2) + "\n")
        for name in (CHECKPOINTS, BEST):  # the final model is what was measured
            shutil.rmtree(folder / name, ignore_errors=True)

    def _train(self, row: Row, config: TrainConfig) -> nn.Module:
        """The model after the last step: the best epoch would be chosen on the test images."""
        output = Path(config.output)
        train(config, resume=True)
        model = load_folder(output / BEST)
        state = torch.load(find_checkpoints(output)[-1], map_location="cpu", weights_only=True)
        model.load_state_dict(state["student"])
        return model

    def _untrained(self, row: Row) -> nn.Module:
        dense = load_folder(self.dense)
        if row.scorer is None:
            return dense
        return sparsify(dense, schedule=self.schedule(row), scorer=row.scorer)

    def _loader(self, model: nn.Module, split: str) -> Any:
        images = open_data(self.data, split, data_dir=self.data_dir, in_chans=1)
        backbone: Any = model.backbone if isinstance(model, SparseViT) else model
        loader = create_image_loader(
            images,
            256,
            resolve_input_data_config(backbone),
            training=False,
            workers=self.workers,
            device=self.accelerator.device,
        )
        return self.accelerator.prepare(loader)

    @torch.no_grad()
    def _budgets(self, model: SparseViT) -> list[dict[str, Any]]:
        """One model at several budgets: the same for all images, and each image its own.

        It is calibrated on images of the training split, prepared as for validation.
        """
        model.to(self.accelerator.device).eval()
        batches = islice(self._loader(model, "train"), CALIBRATION // 256)
        model.calibrate((images for images, _ in batches), LEVELS)
        cost, patches = model.budget().cost, cast(int, model.adapter.num_patches(model.backbone))
        points: list[dict[str, Any]] = [
            {"keep_ratio": ratio, "per_image": per_image}
            for ratio in BUDGETS
            for per_image in (False, True)
        ]
        models = [model.at(**point) for point in points]
        right, gmacs = [0] * len(points), [0.0] * len(points)
        count = 0
        for images, targets in self._loader(model, "val"):
            count += len(images)
            for number, each in enumerate(models):
                output = each.pruned(images)
                right[number] += int((output.logits.argmax(1) == targets).sum())
                schedules = [each.schedule] if each.levels is None else each.levels.schedules
                costs = {schedule.counts(patches)[0]: cost(schedule) for schedule in schedules}
                kept = output.keep[0].sum(dim=1).long().tolist()
                gmacs[number] += sum(costs[number_kept] for number_kept in kept)
        return [
            {**point, "top1": 100 * hits / count, "gmacs": total / count}
            for point, hits, total in zip(points, right, gmacs, strict=True)
        ]

    def _evaluate(self, model: nn.Module, seed: int) -> dict[str, Any]:
        loader = self._loader(model, "val")
        set_seed(seed)  # random selection draws here
        found = asdict(evaluate_model(model, loader, self.accelerator))
        del found["images_per_second"]  # of one pass, among whatever else runs
        return found

    # Estimates.

    def estimates(self, rows: Iterable[Row]) -> dict[str, float]:
        """Estimated seconds of each row, from a measured training step of each kind."""
        dense: Any
        if self.model is None:
            given = cast(Any, self.scale.model)
            dense = timm.create_model(given["model"], **given["model_kwargs"])
        else:
            dense = load_folder(self.model)
        device = self.accelerator.device
        batch = self.scale.batch_size
        channels, height, width = resolve_input_data_config(dense)["input_size"]
        images = torch.randn(batch, channels, height, width, device=device)
        labels = torch.zeros(batch, dtype=torch.long, device=device)
        calls: dict[str, Callable[[torch.Tensor], None]] = {}
        for kind in ("dense", "learned", "similarity_merging"):
            student = dense if kind == "dense" else sparsify(dense, 0.7, scorer=kind)
            task: nn.Module = DenseTask(student)
            if kind != "dense":
                kept = device.type == "cpu"
                sparse = cast(SparseViT, student)
                task = SparseTask(sparse, copy.deepcopy(dense), kept_gradients=kept)
            task.to(device).train()

            def step(images: torch.Tensor, task: nn.Module = task) -> None:
                with self.accelerator.autocast():
                    loss = task(images, labels)["loss"]
                loss.backward()

            calls[kind] = step
        times = interleave(list(calls.values()), [images], seconds=0, rounds=3)
        seconds = dict(zip(calls, medians(times), strict=True))
        found = {}
        for row in rows:
            steps, warm = self.steps_and_warm(row)
            if row.scorer is None:
                kind = "dense"
            else:
                kind = "similarity_merging" if row.scorer in MERGING else "learned"
            # Validations: after each epoch, at the end of `train`, and at the end of the row.
            passes = 1 + -(-steps // max(1, self.images["train"] // batch))
            # An image's forward pass is about a third of its training.
            validation = passes * self.images["val"] / batch * seconds["dense"] / 3
            found[row.folder] = (steps + warm) * seconds[kind] + validation
        return found


def _completed(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as written. Options that were added later have their default."""
    if settings["train"] is None:
        return settings
    added = asdict(TrainConfig(data="", output=""))
    added = {name: value for name, value in added.items() if name not in _PLACES}
    training = {**added, **settings["train"]}
    return {"precision": training["precision"], **settings, "train": training}


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings, with those of the training on the same level."""
    return {**settings, **(settings["train"] or {}), "train": settings["train"] is not None}


_PLACES = ("data", "data_dir", "output", "model", "workers", "trackers", "checkpoint_steps")


def report(bench: Bench, results: list[dict[str, Any]]) -> dict[str, Any]:
    """All rows in one JSON."""
    return {
        "scale": bench.scale_name,
        "sizes": asdict(bench.scale),
        "images": bench.images,
        "environment": environment(),
        "rows": results,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rows that are not done yet. Returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", help="where runs and results go; the same one to go on")
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument(
        "--rows", nargs="+", default=["*"], help="names or patterns; all by default"
    )
    parser.add_argument("--seeds", type=int, default=1, help="of the headline rows")
    parser.add_argument("--data_dir", help="torchvision's Fashion-MNIST; by default 8000 images")
    parser.add_argument("--model", help="a dense model's folder, instead of training or embedded")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="by default a GPU if there is one"
    )
    parser.add_argument("--precision", choices=PRECISIONS, help="by default bfloat16 on a GPU")
    parser.add_argument("--workers", type=int, default=0, help="data loading processes")
    parser.add_argument("--list", action="store_true", help="name the rows and what they take")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds must be 1 or more, got {options.seeds}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    if options.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if options.workers < 0:
        parser.error(f"--workers must be 0 or more, got {options.workers}")
    scale = SCALES[options.scale]
    if scale.cluttered and not Path(DENSE_49).is_file():
        parser.error(f"--scale {options.scale} starts from {DENSE_49}: run this where that lies")
    folder = Path(options.folder)
    gpu = torch.cuda.is_available() and options.device != "cpu"
    embedded = scale.model is None and options.model is None
    try:
        check_folder("folder", folder)
        data = "torch/fashion_mnist" if options.data_dir else str(unpack_images(folder / "data"))
        if scale.cluttered:
            of = "fashion_mnist" if options.data_dir else "embedded"
            data = str(write_cluttered(folder / f"cluttered_{of}", data, options.data_dir))
        bench = Bench(
            folder=folder,
            scale_name=options.scale,
            scale=scale,
            data=data,
            data_dir=options.data_dir,
            model=str(ASSETS / "model") if embedded else options.model,
            model_name="embedded" if embedded else options.model and os.path.relpath(options.model),
            precision=options.precision or ("bfloat16" if gpu else "float32"),
            workers=options.workers,
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    rows = plan(scale, options.seeds, bench.depth)
    chosen = [
        row
        for row in rows
        if any(fnmatch(name, asked) for name in (row.name, row.folder) for asked in options.rows)
    ]
    if not chosen:
        parser.error(f"--rows must name some of {', '.join(row.folder for row in rows)}")
    if options.list:
        _list(bench, chosen)
        return 0
    dense = next(row for row in rows if row.scorer is None)
    if dense not in chosen:
        chosen.insert(0, dense)  # all others start from it, and are compared with it
    try:
        done = _with_result(bench)
        for row in done:
            bench.check(row)  # not only what was asked for: all of it is in the same table
    except ValueError as error:
        parser.error(str(error))
    left = [row for row in chosen if row not in done]
    others = [row for row in rows if row.scorer and (folder / row.folder).exists()]
    begun = (folder / dense.folder / METRICS).exists()
    if dense in left and others and bench.model is None and not begun:
        parser.error(
            f"{folder} has rows ({others[0].folder}, …) but not the dense model that they are of: "
            "choose another folder"
        )
    for row in left:
        going_on = " (going on)" if (folder / row.folder / METRICS).exists() else ""
        bench.console.rule(f"{row.folder}{going_on}")
        try:
            bench.run(row)
        except ValueError as error:  # such as settings other than those it was begun with
            parser.error(f"{row.folder}: {error}")
        _collect(bench)
    print_table(bench.console, _collect(bench))
    return 0


def _with_result(bench: Bench) -> list[Row]:
    """The rows that have a result, of all seeds."""
    seeds = (path.name.rpartition("-seed")[2] for path in bench.folder.glob("*-seed*"))
    most = max((int(seed) for seed in seeds if seed.isdigit()), default=0)
    rows = plan(bench.scale, most + 1, bench.depth)
    return [row for row in rows if (bench.folder / row.folder / RESULT).exists()]


def _collect(bench: Bench) -> list[dict[str, Any]]:
    """Write all results. Returns them, with seeds summarised."""
    results = [
        json.loads((bench.folder / row.folder / RESULT).read_text(encoding="utf-8"))
        for row in _with_result(bench)
    ]
    write_text(bench.folder / JSON, json.dumps(report(bench, results), indent=2) + "\n")
    rows_shown = summarise(results)
    try:
        draw(bench.folder / PLOT, rows_shown)
    except ImportError:
        bench.console.print("no plot: pip install 'dynamicvit[plot]'", markup=False)
    return rows_shown


def _list(bench: Bench, rows: Sequence[Row]) -> None:
    minutes = {name: seconds / 60 for name, seconds in bench.estimates(rows).items()}
    table = Table("row", "scorer", "keep ratio", "stages", "steps", "about minutes", "")
    left = 0.0
    for row in rows:
        done = (bench.folder / row.folder / RESULT).exists()
        left += 0.0 if done else minutes[row.folder]
        table.add_row(
            row.folder,
            row.scorer or "",
            f"{row.keep_ratio or ''}",
            str(row.stages) if row.scorer else "",
            str(sum(bench.steps_and_warm(row))),
            f"{minutes[row.folder]:.1f}",
            "done" if done else "",
        )
    bench.console.print(table)
    bench.console.print(f"{len(rows)} rows, about {left / 60:.1f} hours left")


if __name__ == "__main__":
    sys.exit(main())
