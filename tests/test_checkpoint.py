from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dynamicvit import KeepSchedule, from_released, load
from dynamicvit.checkpoint import read_weights

RELEASED = Path(__file__).parent / "golden" / "deit" / "student.safetensors"
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
    averaged = {**wrapped, "model": {"old": torch.zeros(1)}, "model_ema": weights}
    torch.save(averaged, tmp_path / "averaged.pth")
    save_file(weights, tmp_path / "weights.safetensors")
    files = ["wrapped.pth", "bare.pth", "averaged.pth", "weights.safetensors"]
    forms: list[Any] = [wrapped, tmp_path / files[0], *(str(tmp_path / name) for name in files)]
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


def _without(*keys: str) -> Callable[[Weights], Any]:
    return lambda weights: {key: value for key, value in weights.items() if key not in keys}


def _with(**changes: Any) -> Callable[[Weights], Any]:
    return lambda weights: {**weights, **{key.replace("__", "."): v for key, v in changes.items()}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: {}, r"it has no \['patch_embed\.proj\.weight', 'pos_embed', 'cls_token'"),
        (_without("cls_token", "pos_embed"), r"it has no \['pos_embed', 'cls_token'\]"),
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
    with pytest.raises(ValueError, match=r"weights\.pth (holds no state dict|is damaged or not)"):
        read_weights(tmp_path / "weights.pth")


@pytest.mark.parametrize("where", ["nowhere", "./no/where", "a/b/c", "../x"])
def test_loading_a_folder_that_is_not_there_asks_no_hub(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def fail(*arguments: Any, **options: Any) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("dynamicvit.checkpoint.snapshot_download", fail)
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

    monkeypatch.setattr("dynamicvit.checkpoint.snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"no folder 'me/model' here.*unreachable"):
        load("me/model")
    assert asked == ["me/model"]
