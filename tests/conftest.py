"""What every test shares: tiny models, one thread, repeatable random numbers."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from hypothesis import settings
from PIL import Image
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from dynamicvit.io.folder import save_folder

# Tiny matrices gain nothing from threads, and lose much where cores are shared.
torch.set_num_threads(1)

# Repeatable: the same examples each time. No deadline: a busy machine is not a failure.
settings.register_profile("repeatable", max_examples=30, deadline=None, derandomize=True)
settings.load_profile("repeatable")

# `make test` leaves these to `make test-all`: tests with one of these fixtures, and tests of these
# names.
SLOW_FIXTURES = {"browser", "server", "launched", "root"}
SLOW_TESTS = {
    "test_a_config_trains",
    "test_a_notebook_shows_what_its_code_gives",
    "test_a_row_that_fails_is_written_down_and_leaves_others_alone",
    "test_a_run_killed_ten_times_is_the_run_never_stopped",
    "test_benchmark_writes_what_it_measured",
    "test_budgets_of_commands",
    "test_choosing_rules_are_exported",
    "test_engines_of_files_are_candidates",
    "test_exports_do_what_the_model_does[aoti-float32]",
    "test_exports_do_what_the_model_does[onnx-int8]",
    "test_exports_do_what_the_model_does[openvino-int8]",
    "test_files_give_each_image_what_the_model_gives[eva-onnx]",
    "test_files_give_each_image_what_the_model_gives[eva-openvino]",
    "test_files_give_each_image_what_the_model_gives[squeezed-onnx]",
    "test_files_give_each_image_what_the_model_gives[squeezed-openvino]",
    "test_int8_files_are_cut_too",
    "test_it_runs_without_optional_packages",
    "test_kinds_of_models_as_onnx",
    "test_more_shapes_are_compiled_than_torch_compiles_one_function_for",
    "test_squeezed_models[aoti]",
    "test_steps_are_timed_and_memory_is_measured",
    "test_the_command_runs_whole_without_optional_packages",
    "test_the_page_passes_the_validator",
    "test_what_does_not_fit_into_the_time_is_named",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        names = {item.name, getattr(item, "originalname", None)}
        if names & SLOW_TESTS or SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


TINY: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 5,
}


def tiny_vit(name: str = "vit_tiny_patch16_224", **options: Any) -> VisionTransformer:
    """A small timm model (16 patch tokens by default), the same each time, in eval mode.

    Every parameter is moved away from timm's initial values: those are so small that a wrong
    forward pass would come close to the right logits.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, **{**TINY, **options})
    assert isinstance(model, VisionTransformer | Eva)
    randomise(model)
    return cast(VisionTransformer, model.eval())  # what both have serves


def randomise(model: torch.nn.Module) -> None:
    """Add noise to every parameter, the same each time."""
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))


@pytest.fixture(autouse=True)
def _repeatable_numbers() -> Iterator[None]:
    torch.set_flush_denormal(False)  # training sets it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # it compiles a function for eight models at most, in all tests


CLASSES = ("bright", "dark")


def write_images(root: Path, counts: dict[str, int], classes: tuple[str, ...] = CLASSES) -> Path:
    """`root/SPLIT/CLASS/INDEX.png`, 32 px, noise around a brightness that tells the class."""
    numbers = np.random.default_rng(0)
    for split, count in counts.items():
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = numbers.normal(200 - 140 * label, 30, (32, 32, 3)).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:02}.png")
    return root


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", {"train": 8, "val": 4})


@pytest.fixture
def dense_folder(tmp_path: Path) -> Path:
    """A dense model of two classes, as a model folder."""
    save_folder(tiny_vit(num_classes=2), tmp_path / "dense", class_names=CLASSES)
    return tmp_path / "dense"


@pytest.fixture
def options(images: Path, dense_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Arguments of a TrainConfig that trains in a second."""
    return {
        "data": str(images),
        "output": str(tmp_path / "run"),
        "model": str(dense_folder),
        "workers": 0,
        "epochs": 2,
        "batch_size": 4,
        "warmup_epochs": 1,
        "freeze_epochs": 0,
        "lr": 1e-3,
        "start_at_ratio": False,
        "log_steps": 1,
        "trackers": [],
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium, driven by Playwright."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs Chromium")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=options)
        yield started
        started.close()
