from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dynamicvit import KeepSchedule, SparseViT, load, sparsify
from dynamicvit.io import folder as folder_module
from dynamicvit.io.folder import CONFIG, WEIGHTS, load_folder, save_folder
from dynamicvit.io.load import load_model
from tests.conftest import randomise, tiny_vit
from tests.io.limits import limited_file_size

NAMES = ["ant", "bee", "cat", "dog", "élan"]
SCHEDULE = KeepSchedule((1, 3), (0.7, 0.3))


def _sparse(**options: Any) -> SparseViT:
    sparse = sparsify(tiny_vit(**options), schedule=SCHEDULE)
    randomise(sparse.scorers)
    return sparse


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    _sparse().save_pretrained(tmp_path / "model", NAMES)
    return tmp_path / "model"


def _edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def _edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("name", ["model", "a/b/c", "with space #1 50%? @x"])
@torch.no_grad()
def test_a_sparse_model_comes_back_the_same(tmp_path: Path, name: str) -> None:
    sparse, images = _sparse(reg_tokens=2, img_size=(32, 48)), torch.randn(2, 3, 32, 48)
    sparse.save_pretrained(tmp_path / name)
    loaded = load(tmp_path / name)
    assert isinstance(loaded, SparseViT)
    assert loaded.schedule == SCHEDULE
    assert not loaded.training
    assert torch.equal(loaded(images), sparse(images))
    assert torch.equal(load(str(tmp_path / name))(images), sparse(images))


@torch.no_grad()
def test_a_dense_model_comes_back_the_same(tmp_path: Path) -> None:
    dense, images = tiny_vit(global_pool="avg"), torch.randn(2, 3, 32, 32)
    save_folder(dense.train(), tmp_path / "dense")
    with pytest.raises(TypeError, match=r"must hold a sparse model, got the dense .*load_model"):
        load(tmp_path / "dense")
    loaded = load_model(tmp_path / "dense")
    assert type(loaded) is type(dense)
    assert not loaded.training
    assert torch.equal(loaded(images), dense.eval()(images))
    # and by timm alone
    by_timm = timm.create_model(f"local-dir:{tmp_path / 'dense'}", pretrained=True).eval()
    assert torch.equal(by_timm(images), dense(images))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lvvit_small", {"stem_width": 8, "in_chans": 1}),
        ("deit_256", {}),
        ("deit_base_distilled_patch16_224", {}),
        ("eva02_tiny_patch14_224", {"dynamic_img_size": True}),
        ("vit_small_patch16_rope_mixed_224", {}),
        ("vit_small_patch16_dinov3", {}),
    ],
)
def test_every_family_comes_back_the_same(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    sparse = sparsify(tiny_vit(name, **options), schedule=SCHEDULE)
    randomise(sparse.scorers)
    sparse.save_pretrained(tmp_path / "model")
    images = torch.randn(2, sparse.in_chans, 32, 32)
    assert torch.equal(load(tmp_path / "model")(images), sparse(images))


@torch.no_grad()
def test_squeezing_and_budgets_for_each_image_travel(tmp_path: Path) -> None:
    sparse = sparsify(tiny_vit(img_size=48), keep_ratio=0.7, squeeze=True)
    randomise(sparse.scorers)
    images = torch.linspace(0.1, 2, 20).view(-1, 1, 1, 1) * torch.randn(20, 3, 48, 48)
    sparse.calibrate(images, (0.4, 0.7, 1.0))
    for model in (sparse, sparse.at(keep_ratio=0.5, per_image=True)):
        model.save_pretrained(tmp_path / "model")
        loaded = load(tmp_path / "model")
        assert loaded.squeeze
        assert loaded.calibration == sparse.calibration
        assert loaded.levels == model.levels
        assert torch.equal(loaded(images), model.eval()(images))
        each = loaded.at(keep_ratio=0.6, per_image=True)
        assert each.levels == sparse.at(keep_ratio=0.6, per_image=True).levels


@pytest.mark.parametrize(
    "change",
    [
        {"shares": [1.0] * 100},
        {"losses": [[1.0]]},
        {"keep_ratios": [0.7, 0.5]},
        {"bounds": 3},
        {"bounds": ["a"]},
    ],
)
def test_a_damaged_calibration_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    sparse = sparsify(tiny_vit(img_size=48), keep_ratio=0.7)
    sparse.calibrate(torch.randn(4, 3, 48, 48), (0.4, 0.7, 1.0))
    sparse.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / CONFIG).read_text())
    config["dynamicvit"]["calibration"] |= change
    _edit_config(tmp_path / "model", **config)
    with pytest.raises(ValueError, match=r"config\.json: calibration is damaged"):
        load(tmp_path / "model")


def test_class_names_travel(saved: Path, tmp_path: Path) -> None:
    assert json.loads((saved / CONFIG).read_text())["label_names"] == NAMES
    loaded = load_folder(saved)
    assert isinstance(loaded, SparseViT)
    assert loaded.pretrained_cfg["label_names"] == NAMES
    save_folder(loaded, tmp_path / "again")
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["label_names"] == NAMES
    loaded.reset_classifier(2)  # the names of another head must not travel with it
    save_folder(loaded, tmp_path / "other")
    assert "label_names" not in json.loads((tmp_path / "other" / CONFIG).read_text())
    with pytest.raises(ValueError, match="class_names must be one a class, 2, got 5"):
        save_folder(loaded, tmp_path / "wrong", NAMES)
    assert not (tmp_path / "wrong").exists()


def test_weights_can_be_stored_small(saved: Path, tmp_path: Path) -> None:
    model = load_folder(saved)
    save_folder(model, tmp_path / "small", dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "small" / WEIGHTS).values()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    loaded = load_folder(tmp_path / "small")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    for a, b in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b.bfloat16().float())


def test_saving_replaces_the_two_files_and_nothing_else(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    other = _sparse(depth=5)
    other.save_pretrained(saved)
    loaded = load_folder(saved)
    assert isinstance(loaded, SparseViT)
    assert len(loaded.backbone.blocks) == 5
    assert {path.name for path in saved.iterdir()} == {CONFIG, WEIGHTS, "notes.txt"}
    assert [path.name for path in saved.parent.iterdir()] == ["model"], "temporary files are left"


def test_a_failed_save_leaves_what_was_there(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def fail(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
        path.write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(folder_module, "save_file", fail)
    for target in (saved, saved.parent / "new"):
        with pytest.raises(OSError, match="no space left"):
            save_folder(_sparse(depth=5), target)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_saving_over_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"folder must be a folder, got .*file is a file"):
        save_folder(_sparse(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_model_that_cannot_be_built_again_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"must come from timm\.create_model.*got Linear"):
        save_folder(nn.Linear(2, 2), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_or_file_is_named(saved: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model folder at .*nowhere"):
        load_folder(saved.parent / "nowhere")
    with pytest.raises(FileNotFoundError, match="no model folder at"):
        load_folder(saved / CONFIG)
    for name in (CONFIG, WEIGHTS):
        content = (saved / name).read_bytes()
        (saved / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"is not a model folder: it has no {name}"):
            load_folder(saved)
        (saved / name).write_bytes(content)
    load_folder(saved)
    saved.rename(saved.parent / "best")  # as in the folder of a training run
    with pytest.raises(FileNotFoundError, match=rf"it has no {CONFIG}; .*best is one"):
        load_folder(saved.parent)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "config.json is not valid JSON"),
        (b'{"architecture": "vit_tiny', "config.json is not valid JSON"),
        (b"\xff\xfe{}", "config.json is not valid JSON"),
        (b"[]", "config.json names no architecture"),
        (b"{}", "config.json names no architecture"),
        (b'{"architecture": 5}', "config.json names no architecture"),
        (b'{"architecture": "vit_enormous"}', "timm has no architecture 'vit_enormous'"),
        (b'{"architecture": "../../vit"}', "timm has no architecture '../../vit'"),
        (b'{"architecture": "local-dir:/tmp"}', "timm has no architecture 'local-dir:/tmp'"),
        (b'{"architecture": "hf-hub:a/b"}', "timm has no architecture 'hf-hub:a/b'"),
        (
            b"[" * 100_000,
            "config.json is not valid JSON",
        ),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_damaged_config_is_refused(saved: Path, content: bytes, message: str) -> None:
    (saved / CONFIG).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_folder(saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_args": {"img_size": 32, "depth": "x"}},
        {"model_args": {"img_size": 32, "num_heads": 5}},
        {"model_args": {"img_size": 32, "embed_dim": -4}},
        {"model_args": {"img_size": 32, "no_such_option": 1}},
        {"model_args": {"img_size": 32, "num_heads": 0}},
        {"model_args": {"img_size": 32, "checkpoint_path": "../weights.pth"}},
        {"model_args": {"img_size": 32, "pretrained": True}},
        {"model_args": None},
        {"pretrained_cfg": None},
    ],
    ids=str,
)
def test_a_config_that_timm_cannot_build_is_refused(saved: Path, changes: dict[str, Any]) -> None:
    _edit_config(saved, **changes)
    with pytest.raises(ValueError, match=r"config\.json: timm cannot build this model"):
        load_folder(saved)


def test_a_config_points_at_no_other_file(saved: Path, tmp_path: Path) -> None:
    """Weights come from the folder, whatever its config says of others."""
    expected = load_folder(saved).state_dict()
    other = {key: torch.zeros_like(value) for key, value in expected.items()}
    torch.save(other, tmp_path / "other.pth")
    config = json.loads((saved / CONFIG).read_text())["pretrained_cfg"]
    elsewhere = {"file": "../other.pth", "url": "file:///other.pth", "hf_hub_id": "../other"}
    _edit_config(saved, pretrained_cfg=config | elsewhere)
    for key, value in load_folder(saved).state_dict().items():
        assert torch.equal(value, expected[key])


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (None, "'dynamicvit' must hold blocks and ratios, got None"),
        ([1], r"'dynamicvit' must hold blocks and ratios, got \[1\]"),
        ({"blocks": [1]}, "'dynamicvit' must hold blocks and ratios"),
        ({"blocks": None, "ratios": None}, "blocks must be a sequence, got None"),
        ({"blocks": "12", "ratios": [0.7, 0.5]}, "blocks must be a sequence, got '12'"),
        ({"blocks": [99], "ratios": [0.5]}, r"backbone's depth of 4, got \(99,\)"),
        ({"blocks": [1], "ratios": [7]}, r"ratios must lie in \(0, 1\], got 7"),
        ({"blocks": [1], "ratios": [float("nan")]}, r"ratios must lie in \(0, 1\], got nan"),
        ({"blocks": [1], "ratios": [float("inf")]}, r"ratios must lie in \(0, 1\], got inf"),
        ({"blocks": [1], "ratios": [0.001]}, "at least one of the 16 patch tokens"),
        (
            {"blocks": [1], "ratios": [10**400]},
            r"ratios must lie in \(0, 1\], got 1000",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_absurd_schedule_is_refused(saved: Path, schedule: Any, message: str) -> None:
    _edit_config(saved, dynamicvit=schedule)
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        load_folder(saved)


def test_a_schedule_on_a_model_that_is_not_understood_is_refused(saved: Path) -> None:
    _edit_config(saved, architecture="resnet18", model_args={}, pretrained_cfg={})
    with pytest.raises(ValueError, match=r"config\.json: ResNet is not supported"):
        load_folder(saved)


@pytest.mark.parametrize("keep", [0, 5, 1000, -10])
def test_truncated_weights_are_refused(saved: Path, keep: int) -> None:
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or not safetensors"):
        load_folder(saved)


def test_every_key_that_does_not_fit_is_listed(saved: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["extra"] = tensors.pop("backbone.cls_token")
        tensors["scorers.0.norm.bias"] = torch.zeros(3)

    _edit_weights(saved, change)
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit the model") as caught:
        load_folder(saved)
    problems = str(caught.value).partition(": ")[2].split("; ")
    assert problems == [
        "missing backbone.cls_token",
        "unexpected extra",
        "scorers.0.norm.bias has shape (3,), expected (32,)",
    ]


@torch.no_grad()
def test_folders_of_earlier_versions_are_read() -> None:
    """They were written, and run on these images, before the modules had their present layout."""
    images = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    expected = {
        "old_sparse": [-0.19018511474132538, -0.46626850962638855, 0.6467801332473755],
        "old_dense": [-0.11904982477426529, -0.44370904564857483, 0.5494568347930908],
    }
    for name, logits in expected.items():
        model = load_model(Path(__file__).parent / "data" / name)
        torch.testing.assert_close(model(images), torch.tensor([logits]), atol=1e-5, rtol=1e-5)
        assert isinstance(model, SparseViT) == (name == "old_sparse")
    model = load(Path(__file__).parent / "data" / "old_sparse")
    assert model.schedule == KeepSchedule((0, 1), (0.75, 0.5))
    assert model.pretrained_cfg["label_names"] == ["ant", "bee", "élan"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.fill_(float("nan")), "cls_token holds NaN or infinity"),
        (lambda value: value.fill_(float("inf")), "cls_token holds NaN or infinity"),
        (lambda value: value.to(torch.complex64), "cls_token holds torch.complex64, expected fl"),
        (lambda value: value.to(torch.int32), "cls_token holds torch.int32, expected floating"),
        (lambda value: value.to(torch.bool), "cls_token holds torch.bool, expected floating"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(
    saved: Path, change: Callable[[Tensor], Tensor], message: str
) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["backbone.cls_token"] = change(tensors["backbone.cls_token"])

    _edit_weights(saved, edit)
    with pytest.raises(ValueError, match=rf"model\.safetensors .*{message}"):
        load(saved)


def test_a_default_device_without_values_is_refused(saved: Path) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match="default device must hold values"):
        load(saved)
    assert next(load(saved).parameters()).device.type == "cpu"


def test_what_is_no_path_is_refused(tmp_path: Path) -> None:
    for value in (3, None, b"model", ["model"]):
        with pytest.raises(TypeError, match="folder_or_hub_id must be a path or a hub id, got"):
            load(value)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="folder must be a path, got"):
            save_folder(_sparse(), value)  # type: ignore[arg-type]
    for name in ("a\0b", "x" * 5000):
        with pytest.raises(FileNotFoundError, match="no model folder at"):
            load(name)


def test_a_full_disk_is_said_with_the_file(tmp_path: Path) -> None:
    with limited_file_size(2048), pytest.raises(OSError, match=r"new.model\.safetensors") as caught:
        _sparse().save_pretrained(tmp_path / "new")
    assert caught.value.errno == errno.EFBIG
    with limited_file_size(100), pytest.raises(OSError, match=r"new.config\.json"):
        _sparse().save_pretrained(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
