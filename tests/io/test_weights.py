from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dynamicvit import cli
from dynamicvit.io.load import load_model
from tests.conftest import randomise

NAME = "test_vit"
Weights = dict[str, Tensor]


def _model(**options: Any) -> Any:
    model = timm.create_model(NAME, **options)
    randomise(model)
    return model.eval()


def _under(prefix: str) -> Callable[[Weights], Any]:
    return lambda weights: {f"{prefix}{key}": value for key, value in weights.items()}


def _lightning(weights: Weights) -> Any:
    keys = _under("model.net.")(weights) | {"criterion.weight": torch.ones(3)}
    state = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    return {"epoch": 3, "state_dict": keys, "optimizer_states": [state], "loops": {"fit": {}}}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"model": weights, "epoch": 1},
        lambda weights: {"state_dict_ema": weights, "state_dict": {"other": torch.ones(1)}},
        lambda weights: {"model_ema": weights, "optimizer": {"state": {}}},
        lambda weights: {"checkpoint": {"student": weights}},
        _under("module."),
        _under("backbone."),
        _under("_orig_mod."),
        _under("net.module._orig_mod.encoder."),
        _lightning,
    ],
    ids=range(10),
)
def test_a_user_s_weights_are_found_wherever_they_lie(
    wrap: Callable[[Weights], Any], tmp_path: Path
) -> None:
    model = _model(num_classes=7)
    torch.save(wrap(model.state_dict()), tmp_path / "weights.ckpt")
    found = load_model(NAME, weights=str(tmp_path / "weights.ckpt"))
    assert not found.training
    for key, value in model.state_dict().items():
        assert found.state_dict()[key].equal(value), key


def test_safetensors_and_a_compiled_block_are_read(tmp_path: Path) -> None:
    model = _model()
    weights = {
        re.sub(r"^blocks\.(\d+)\.", r"blocks.\1._orig_mod.", key): value
        for key, value in model.state_dict().items()
    }
    save_file(weights, tmp_path / "weights.safetensors")
    found = load_model(NAME, weights=str(tmp_path / "weights.safetensors"))
    assert found.num_classes == 1000
    assert found.blocks[0].attn.qkv.weight.equal(model.blocks[0].attn.qkv.weight)


def test_the_average_goes_before_the_last_weights(tmp_path: Path) -> None:
    last, average = _model(), _model()
    average.cls_token.data.fill_(3.0)
    both = {"state_dict": last.state_dict(), "state_dict_ema": average.state_dict()}
    torch.save(both, tmp_path / "weights.pth")
    found = load_model(NAME, weights=str(tmp_path / "weights.pth"))
    assert found.cls_token.equal(average.cls_token)


def test_another_head_is_made_only_if_asked_for(tmp_path: Path) -> None:
    model = _model(num_classes=7)
    torch.save(model.state_dict(), tmp_path / "seven.pth")
    headless = {key: value for key, value in model.state_dict().items() if "head." not in key}
    torch.save(headless, tmp_path / "none.pth")
    for name in ("seven.pth", "none.pth"):
        found = load_model(NAME, weights=str(tmp_path / name), num_classes=3)
        assert found.num_classes == 3
        assert found.blocks[1].mlp.fc1.weight.equal(model.blocks[1].mlp.fc1.weight)
    with pytest.raises(ValueError, match=r"none\.pth does not fit the model: missing head\.weight"):
        load_model(NAME, weights=str(tmp_path / "none.pth"))


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(
        {"model": nn.Linear(2, 3).state_dict() | {f"k{i}": torch.ones(1) for i in range(9)}}, path
    )
    with pytest.raises(
        ValueError, match=r"weights must be .*the 11 keys weight, bias, k0, k1, k2, …"
    ):
        load_model(NAME, weights=str(path))
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"weights must be those of the model.*with no tensors"):
        load_model(NAME, weights=str(path))
    weights = _model().state_dict()
    weights["norm.scale"] = weights.pop("norm.weight")
    weights["cls_token"] = torch.zeros(1, 1, 3)
    torch.save(weights, path)
    with pytest.raises(
        ValueError,
        match=r"missing norm\.weight; unexpected norm\.scale; cls_token has shape \(1, 1, 3",
    ):
        load_model(NAME, weights=str(path))
    with pytest.raises(FileNotFoundError, match="no weights file at"):
        load_model(NAME, weights=str(tmp_path / "nowhere.pth"))


def test_weights_go_with_a_timm_name(dense_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"weights go with a timm name, not with .*dense, got x"):
        load_model(str(dense_folder), weights="x")


def test_evaluate_takes_weights(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(_lightning(_model(num_classes=2).state_dict()), tmp_path / "last.ckpt")
    arguments = [NAME, "--weights", str(tmp_path / "last.ckpt"), "--data", str(images)]
    assert cli.main(["evaluate", *arguments, "--workers", "0"]) == 0
    assert NAME in capsys.readouterr().out
