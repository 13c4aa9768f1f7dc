from __future__ import annotations

import argparse
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dynamicvit import KeepSchedule, UnsupportedBackbone, cli, from_released, load
from dynamicvit.io.load import load_model
from dynamicvit.io.weights import read_weights
from tests.conftest import randomise

RELEASED = Path(__file__).parents[1] / "golden" / "deit" / "student.safetensors"
Weights = dict[str, Tensor]


@pytest.fixture
def weights() -> Weights:
    tensors: Weights = load_file(RELEASED)
    return tensors


@pytest.fixture
def logits(weights: Weights) -> Tensor:
    with torch.no_grad():
        result: Tensor = from_released(weights, num_heads=2)(IMAGES)
    return result


IMAGES = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_every_form_of_the_released_weights_is_read(
    weights: Weights, logits: Tensor, tmp_path: Path
) -> None:
    wrapped = {"model": weights, "epoch": 3, "args": [1, "a"]}
    torch.save(wrapped, tmp_path / "wrapped.pth")
    torch.save(weights, tmp_path / "bare.pth")
    averaged = {"model_ema": weights, "args": argparse.Namespace(lr=1e-3), "epoch": 3}
    torch.save(averaged, tmp_path / "averaged.pth")
    # What the authors evaluate goes before the average, in a file and in a dict.
    both = {"model": weights, "model_ema": {"other": torch.zeros(1)}}
    torch.save(both, tmp_path / "both.pth")
    parallel = {f"module.{key}": value for key, value in weights.items()}
    save_file(weights, tmp_path / "weights.safetensors")
    files = ["wrapped.pth", "bare.pth", "averaged.pth", "both.pth", "weights.safetensors"]
    forms: list[Any] = [
        averaged,
        both,
        parallel,
        {"model": parallel},
        wrapped,
        tmp_path / files[0],
        *(str(tmp_path / name) for name in files),
    ]
    for form in forms:
        assert torch.equal(from_released(form, num_heads=2)(IMAGES), logits)


@torch.no_grad()
def test_sizes_other_than_the_papers_are_read_from_the_weights(weights: Weights) -> None:
    small = {
        key: value for key, value in weights.items() if not key.startswith("score_predictor.2")
    }
    small = {key: value for key, value in small.items() if ".attn.qkv.bias" not in key}
    small["patch_embed.proj.weight"] = torch.zeros(32, 1, 8, 8)
    small["pos_embed"] = torch.zeros(1, 1 + 5 * 5, 32)
    small["head.weight"], small["head.bias"] = torch.zeros(3, 32), torch.zeros(3)
    sparse = from_released(small, KeepSchedule((0, 11), (0.5, 0.2)), num_heads=4)
    assert sparse(torch.zeros(2, 1, 40, 40)).shape == (2, 3)
    assert sparse.schedule.counts(25) == (12, 5)
    attention: Any = sparse.backbone.blocks[0].attn
    assert attention.qkv.bias is None
    assert attention.num_heads == 4


def test_weights_are_copied_into_float32(weights: Weights) -> None:
    assert weights["cls_token"].dtype == torch.float16
    sparse = from_released(weights)  # one head: width 32 is less than 64
    assert {parameter.dtype for parameter in sparse.parameters()} == {torch.float32}
    attention: Any = sparse.backbone.blocks[0].attn
    assert attention.num_heads == 1
    for key in ("bias", "weight"):
        copied = sparse.state_dict()[f"scorers.1.head.2.{key}"]
        assert torch.equal(copied, weights[f"score_predictor.1.out_conv.2.{key}"].float())


SMALL: dict[str, Any] = {"embed_dim": 128, "depth": 4, "num_heads": 2, "num_classes": 5}


def _dense(name: str = "deit_small_patch16_224", **options: Any) -> Any:
    model = timm.create_model(name, **(SMALL | {"img_size": 64} | options))
    randomise(model)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit_small_patch16_224", {}),
        ("deit_small_patch16_224", {"img_size": 48, "patch_size": 8, "in_chans": 1}),
        ("deit_small_distilled_patch16_224", {}),
        ("vit_small_patch16_224", {"global_pool": "avg"}),
        ("vit_small_patch16_224", {"global_pool": "avg", "class_token": False}),
        ("vit_small_patch16_224", {"init_values": 0.1, "qkv_bias": False}),
        ("vit_small_patch16_224", {"reg_tokens": 4}),
        ("vit_small_patch16_224", {"reg_tokens": 4, "no_embed_class": True}),
        ("vit_small_patch16_224", {"embed_dim": 176, "num_heads": 2, "mlp_ratio": 4.46}),
        ("deit_256", {}),
        ("lvvit_small", {"stem_width": 16, "in_chans": 1}),
        ("lvvit_tiny", {"embed_dim": 240, "num_heads": 4, "img_size": 48}),
    ],
)
def test_dense_weights_of_each_kind_are_read(name: str, options: dict[str, Any]) -> None:
    dense = _dense(name, **options)
    sparse = from_released(dense.state_dict())
    assert sparse.schedule.ratios[0] == 0.7
    size = dense.patch_embed.img_size
    images = torch.randn(2, dense.in_chans, *size)
    torch.testing.assert_close(sparse.backbone(images), dense(images))
    assert timm.data.resolve_input_data_config(sparse.backbone)["input_size"][1:] == size


@torch.no_grad()
@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch14_reg4_dinov2"])
def test_an_architecture_may_be_named_where_sizes_do_not_tell(name: str) -> None:
    dense = timm.create_model(name, img_size=56, num_classes=3)
    sparse = from_released(dense.state_dict(), architecture=name)
    images = torch.randn(1, 3, 56, 56)
    torch.testing.assert_close(sparse.backbone(images), dense.eval()(images))
    for wrong in ("no_such_model", 3):
        message = f"architecture must be the name of a timm model, got {wrong!r}"
        with pytest.raises(ValueError, match=message):
            from_released(dense.state_dict(), architecture=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"architecture {name!r} does not fit state_dict"):
        from_released(dense.state_dict(), num_heads=5, architecture=name)
    with pytest.raises(UnsupportedBackbone, match="ResNet is not supported"):
        from_released(dense.state_dict(), architecture="resnet18")


@torch.no_grad()
@pytest.mark.parametrize("name", ["deit_small_patch16_224", "lvvit_small"])
def test_position_embeddings_are_resampled_for_another_size(name: str) -> None:
    dense = _dense(name)
    sparse = from_released(dense.state_dict(), img_size=(96, 64))
    dense.set_input_size((96, 64))
    images = torch.randn(1, 3, 96, 64)
    torch.testing.assert_close(sparse.backbone(images), dense(images))
    assert sparse(images).shape == (1, 5)
    for size in (100, 0, -16, (64,), (64, 64, 64), "96", 96.0, (64.0, 64.0)):
        with pytest.raises((ValueError, TypeError), match=r"img_size must be .*, got"):
            from_released(_dense(name).state_dict(), img_size=size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"pos_embed \(1, 25, 128\) is not a square grid and 1"):
        from_released(dense.state_dict())


@torch.no_grad()
def test_a_grid_that_is_not_square_can_be_said() -> None:
    """Weights of 4×9 patches look like those of 6×6."""
    dense = _dense(img_size=(64, 144))
    images = torch.randn(1, 3, 64, 144)
    sparse = from_released(dense.state_dict(), img_size=(64, 144))
    assert torch.equal(sparse.backbone(images), dense(images))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_small_patch16_224", {"pre_norm": True}, "architecture must be given for weights"),
        (
            "vit_small_patch16_224",
            {"global_pool": "avg", "class_token": False, "fc_norm": False},
            "architecture must be given for weights",
        ),
        (
            "vit_small_patch16_224",
            {"embed_dim": 1280, "depth": 1, "num_heads": 16},
            "num_heads must be given for weights of width 1280, got None",
        ),
    ],
)
def test_weights_that_could_be_of_several_models_are_refused(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        from_released(_dense(name, **options).state_dict())


@torch.no_grad()
def test_convert_writes_what_the_file_holds(
    weights: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = _dense("lvvit_small")
    save_file(dense.state_dict(), tmp_path / "dense.safetensors")
    save_file(weights, tmp_path / "sparse.safetensors")

    def run(file: str, *options: str) -> Any:
        out = str(tmp_path / "out")
        assert cli.main(["convert", str(tmp_path / file), out, *options]) == 0
        return load_model(out)

    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(run("dense.safetensors")(images), dense(images))
    assert "dense, 5 classes, 4 blocks of width 128" in capsys.readouterr().out
    made = run("dense.safetensors", "--keep_ratio", "0.5", "--img_size", "96")
    assert made.schedule.counts(36) == (18, 9, 4)
    assert "sparse, scorers untrained, 5 classes" in capsys.readouterr().out
    made = run("sparse.safetensors", "--num_heads", "2", "--keep_ratio", "0.9")
    released = from_released(weights, KeepSchedule.from_keep_ratio(0.9, depth=12), num_heads=2)
    assert torch.equal(made(IMAGES), released(IMAGES))
    printed = " ".join(capsys.readouterr().out.split())
    assert "from deit_small_patch16_224: 2 heads, 224×224 pixels mean" in printed
    for arguments, message in (
        (["nowhere.pth", "new"], "no weights file at"),
        (["dense.safetensors", "new", "--keep_ratio", "0"], "keep_ratio must lie in (0, 1], got 0"),
        (["dense.safetensors", "new", "--num_heads", "3"], "num_heads must divide the width 128"),
        (["dense.safetensors", "new", "--architecture", "resnet50"], "ResNet is not supported"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["convert", *(str(tmp_path / name) for name in arguments[:2]), *arguments[2:]])
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


def _without(*keys: str) -> Callable[[Weights], Any]:
    return lambda weights: {key: value for key, value in weights.items() if key not in keys}


def _with(**changes: Any) -> Callable[[Weights], Any]:
    return lambda weights: {**weights, **{key.replace("__", "."): v for key, v in changes.items()}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: {},
            r"it has no \['patch_embed\.proj\.weight', 'pos_embed', 'head\.weight'",
        ),
        (_without("cls_token", "pos_embed"), r"it has no \['pos_embed'\]"),
        (_without("cls_token"), "architecture must be given for weights that are not"),
        (_without("norm.bias"), r"does not fit the model: missing norm\.bias$"),
        (_with(extra=torch.zeros(1)), r"does not fit the model: unexpected extra$"),
        (_with(norm__bias=torch.zeros(7)), r"norm\.bias has shape \(7,\), expected \(32,\)"),
        (_with(norm__bias=[0.0]), r"must hold tensors alone, got others at \['norm\.bias'\]"),
        (_with(pos_embed=torch.zeros(1, 1 + 6, 32)), r"pos_embed \(1, 7, 32\) is not a square"),
        (
            lambda weights: {k: v for k, v in weights.items() if "predictor.2" not in k},
            r"missing score_predictor\.2\.in_conv\.0\.weight; missing score_predictor\.2\.in_conv",
        ),
        (
            lambda weights: (
                weights
                | {
                    k.replace(".2.in", ".3.in"): v
                    for k, v in weights.items()
                    if "predictor.2.in" in k
                }
            ),
            r"unexpected score_predictor\.3\.in_conv\.0\.bias",
        ),
        (_with(pos_embed=torch.zeros(5)), "pos_embed"),
        (_with(pos_embed=torch.zeros(1, 0, 32)), "pos_embed"),
        (_with(patch_embed__proj__weight=torch.zeros(5)), "proj"),
        (_with(head__weight=torch.tensor(0.0)), r"head\.weight"),
    ],
)
def test_weights_of_another_format_are_refused(
    weights: Weights, change: Callable[[Weights], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        from_released(change(weights), num_heads=2)


@pytest.mark.parametrize(
    ("num_heads", "error"),
    [
        (3, ValueError),
        (0, ValueError),
        (-2, ValueError),
        ("2", TypeError),
        (2.0, TypeError),
    ],
)
def test_heads_that_do_not_divide_the_width_are_refused(
    weights: Weights, num_heads: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match=f"num_heads must .*, got {num_heads!r}"):
        from_released(weights, num_heads=num_heads)


def test_what_is_no_state_dict_is_refused() -> None:
    with pytest.raises(TypeError, match="state_dict must be a dict or a path, got list"):
        from_released([])  # type: ignore[arg-type]


class _Payload:
    """Runs code when unpickled: it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_file_that_would_run_code_is_refused(weights: Weights, tmp_path: Path, form: str) -> None:
    content = {"model": weights, "payload": _Payload(tmp_path / "ran")}
    path = tmp_path / "weights.pth"
    if form == "pickle":
        path.write_bytes(pickle.dumps(content["payload"], protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match=r"weights\.pth is damaged"):
        from_released(path, num_heads=2)
    assert not (tmp_path / "ran").exists()


def test_the_refusal_says_why_and_advises_nothing_unsafe(tmp_path: Path) -> None:
    torch.save({"payload": _Payload(tmp_path / "ran")}, tmp_path / "weights.pth")
    with pytest.raises(
        ValueError, match="other objects than tensors, which could run code"
    ) as caught:
        read_weights(tmp_path / "weights.pth")
    assert "weights_only=False" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no weights file at {path}"):
            from_released(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(
    weights: Weights, tmp_path: Path, suffix: str, share: float
) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    content = path.read_bytes()
    path.write_bytes(content[: math.floor(share * len(content))])
    with pytest.raises(ValueError, match=rf"weights{suffix} is damaged"):
        read_weights(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        b"hello world\n",
        b"PK\x03\x04abc",
        b"\x93NUMPY\x01\x00",
        torch.randint(0, 256, (4000,), generator=torch.Generator().manual_seed(0))
        .to(torch.uint8)
        .numpy()
        .tobytes(),
        b"\x80",
        b"\x80\x02.",
    ],
    ids=["text", "zip", "numpy", "random", "byte", "pickle"],
)
def test_a_foreign_file_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"weights{suffix} is damaged"):
        read_weights(path)


@pytest.mark.parametrize(
    "content", [[1], torch.ones(2), 5, {"model": None}, {"model": {"a": 1}}], ids=str
)
def test_a_torch_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(
        ValueError, match=r"weights\.pth (must hold a state dict|is damaged or not)"
    ):
        read_weights(tmp_path / "weights.pth")


@pytest.mark.parametrize("where", ["nowhere", "./no/where", "a/b/c", "../x"])
def test_loading_a_folder_that_is_not_there_asks_no_hub(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def fail(*arguments: Any, **options: Any) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("dynamicvit.io.load.snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match="no model folder at"):
        load(where)


def test_a_hub_id_is_fetched_or_the_failure_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []

    def offline(hub_id: str, **options: Any) -> str:
        asked.append(hub_id)
        raise OSError("network is unreachable")

    monkeypatch.setattr("dynamicvit.io.load.snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"no folder 'me/model' here.*unreachable"):
        load("me/model")
    assert asked == ["me/model"]
