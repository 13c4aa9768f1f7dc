from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi, RepoUrl, constants
from huggingface_hub.errors import HfHubHTTPError

from dynamicvit import KeepSchedule, SparseViT, count_gmacs, load, sparsify
from dynamicvit.core.backbones import UnsupportedBackbone
from dynamicvit.io.folder import CONFIG, WEIGHTS
from dynamicvit.io.hub import offline_if_unreachable
from dynamicvit.io.load import check_backbone, load_model
from tests.conftest import randomise, tiny_vit

NAMES = ["ant", "bee", "cat", "dog", "élan"]


class _Hub:
    """The calls that reach the hub, answered from a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, api: HfApi, repo_id: str, **options: Any) -> RepoUrl:
        self.calls.append(("create", {"repo_id": repo_id, "token": api.token, **options}))
        self.folder.mkdir(exist_ok=True)
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def file_exists(self, api: HfApi, repo_id: str, filename: str) -> bool:
        return (self.folder / filename).exists()

    def upload_folder(self, api: HfApi, *, folder_path: Path, **options: Any) -> None:
        self.calls.append(("upload", options))
        shutil.copytree(folder_path, self.folder, dirs_exist_ok=True)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Hub:
    hub = _Hub(tmp_path / "hub")
    for name in ("create_repo", "file_exists", "upload_folder"):
        # a plain function, so that it is bound to the HfApi
        method = getattr(hub, name)
        monkeypatch.setattr(HfApi, name, lambda api, *a, _call=method, **o: _call(api, *a, **o))
    monkeypatch.setattr("dynamicvit.io.load.snapshot_download", lambda *a, **o: str(hub.folder))
    monkeypatch.setattr("dynamicvit.io.hub._reachable", lambda: True)
    monkeypatch.chdir(tmp_path)
    return hub


def _sparse(**options: Any) -> SparseViT:
    sparse = sparsify(tiny_vit(**options), schedule=KeepSchedule((1, 3), (0.7, 0.343)))
    randomise(sparse.scorers)
    return sparse


@torch.no_grad()
def test_what_is_pushed_is_what_is_loaded(hub: _Hub) -> None:
    sparse, images = _sparse(), torch.randn(2, 3, 32, 32)
    address = sparse.push_to_hub("me/tiny-vit_0.7", class_names=NAMES)
    assert address == "https://huggingface.co/me/tiny-vit_0.7"
    assert hub.calls == [
        (
            "create",
            {"repo_id": "me/tiny-vit_0.7", "token": None, "private": False, "exist_ok": True},
        ),
        (
            "upload",
            {"repo_id": "me/tiny-vit_0.7", "commit_message": "Upload a model made with dynamicvit"},
        ),
    ]
    assert {path.name for path in hub.folder.iterdir()} == {CONFIG, WEIGHTS, "README.md"}
    loaded = load("me/tiny-vit_0.7")
    assert isinstance(loaded, SparseViT)
    assert torch.equal(loaded(images), sparse(images))
    assert loaded.pretrained_cfg["label_names"] == NAMES


def test_options_reach_the_hub(hub: _Hub) -> None:
    _sparse().push_to_hub("me/model", private=True, token="hf_secret", commit_message="Second try")
    (_, created), (_, uploaded) = hub.calls
    assert (created["private"], created["token"]) == (True, "hf_secret")
    assert uploaded["commit_message"] == "Second try"
    assert all("hf_secret" not in path.read_text("latin-1") for path in hub.folder.iterdir())


def _card(hub: _Hub) -> tuple[dict[str, Any], str]:
    head, text = (hub.folder / "README.md").read_text(encoding="utf-8")[4:].split("---\n", 1)
    return yaml.safe_load(head), text


def test_the_card_says_what_the_model_is(hub: _Hub) -> None:
    sparse = _sparse()
    sparse.push_to_hub("me/model")
    head, text = _card(hub)
    assert head == {
        "license": "apache-2.0",
        "library_name": "dynamicvit",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "dynamicvit", "timm"],
    }
    for part in (
        "# me/model",
        "vit_tiny_patch16_224",
        'dynamicvit.load("me/model")',
        "input: 3 × 32 × 32, 5 classes",
        "before block 1: 70.0% of",
        "before block 3: 34.3% of",
        f"{count_gmacs(sparse, (3, 32, 32)):.3f} GMACs",
        f"{count_gmacs(sparse.backbone, (3, 32, 32)):.3f}",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("mit", {"license": "mit"}),
        ("dinov3-license", {"license": "other", "license_name": "dinov3-license"}),
        ("a: b\n---\nx", {"license": "other", "license_name": "a: b\n---\nx"}),
        ("unknown", {}),
        (None, {}),
        (["mit"], {}),
    ],
    ids=repr,
)
def test_the_card_names_a_licence_that_is_known(
    hub: _Hub, given: Any, expected: dict[str, str]
) -> None:
    sparse = _sparse()
    sparse.pretrained_cfg["license"] = given
    sparse.push_to_hub("me/model")
    text = (hub.folder / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(text[4:].split("\n---\n\n# me/model", 1)[0])
    assert {key: value for key, value in head.items() if "license" in key} == expected


def test_a_card_that_is_there_is_kept(hub: _Hub) -> None:
    hub.folder.mkdir()
    (hub.folder / "README.md").write_text("mine")
    _sparse().push_to_hub("me/model")
    assert (hub.folder / "README.md").read_text() == "mine"
    assert (hub.folder / WEIGHTS).exists()


@pytest.mark.parametrize(
    ("repo_id", "error"),
    [
        ("", ValueError),
        ("model", ValueError),
        ("a/b/c", ValueError),
        ("me/", ValueError),
        ("me/two words", ValueError),
        ("me/a--b", ValueError),
        ("me/model.git", ValueError),
        ("./model", ValueError),
        ("me/" + "a" * 100, ValueError),
        (None, TypeError),
        (Path("me/model"), TypeError),
    ],
    ids=repr,
)
def test_a_malformed_id_is_refused(hub: _Hub, repo_id: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"repo_id must be .*'owner/name', got "):
        _sparse().push_to_hub(repo_id)
    assert hub.calls == []


def test_a_model_that_cannot_be_saved_leaves_no_trace_on_the_hub(hub: _Hub) -> None:
    with pytest.raises(ValueError, match="class_names must be one a class, 5, got 2"):
        _sparse().push_to_hub("me/model", class_names=NAMES[:2])
    sparse = _sparse()
    sparse.pretrained_cfg.clear()
    with pytest.raises(TypeError, match=r"must come from timm\.create_model"):
        sparse.push_to_hub("me/model")
    assert hub.calls == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        # The hub's own wants a response of a server.
        (
            lambda: HfHubHTTPError.__new__(HfHubHTTPError),
            "cannot upload to me/model: HfHubHTTPError",
        ),
        (lambda: ConnectionError("no\n  route"), "cannot upload to me/model: no route"),
        (lambda: RuntimeError("closed"), "cannot upload to me/model: closed"),
    ],
)
def test_the_hub_s_errors_are_one_line(
    hub: _Hub, monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception], message: str
) -> None:
    problem = error()

    def refuse(*arguments: Any, **options: Any) -> None:
        raise problem

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(OSError, match=message) as caught:
        _sparse().push_to_hub("me/model")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is problem


def _count_connections(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """No network: what is asked for is noted, and refused."""
    asked: list[Any] = []

    def refuse(address: Any, **options: Any) -> None:
        asked.append(address)
        raise OSError("network is unreachable")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    return asked


def test_without_a_network_nothing_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = _count_connections(monkeypatch)
    monkeypatch.chdir(tmp_path)
    unreachable = "the Hugging Face Hub cannot be reached"
    with pytest.raises(OSError, match=f"cannot upload to me/model: {unreachable}"):
        _sparse().push_to_hub("me/model", token="hf_none")
    with pytest.raises(FileNotFoundError, match=f"no folder 'me/none' here, .*{unreachable}"):
        load("me/none")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=rf"'test_vit'.*{unreachable}|cannot create 'test_vit'"):
        load_model("test_vit")
    assert len(asked) == 3
    # What could not become sparse is told with it; and to whoever needs that, without the hub.
    unsupported = "ResNet is not supported: .*; near in size: "
    for name in ("resnet18", "timm/resnet18.a1_in1k"):
        with pytest.raises((ValueError, FileNotFoundError), match=f"made sparse: {unsupported}"):
            load_model(name)
    assert len(asked) == 5
    for name in ("resnet18", "timm/resnet18.a1_in1k"):
        with pytest.raises(UnsupportedBackbone, match=f"model '{name}': {unsupported}"):
            check_backbone(name)
    for name in ("deit_256", "dynamicvit_deit_256", "me/none", "folder"):
        check_backbone(name)
    with pytest.raises(ValueError, match=r"got 'vit_smal_patch16_224'; did you mean vit_small_pa"):
        load_model("vit_smal_patch16_224")
    assert len(asked) == 5
    assert not constants.HF_HUB_OFFLINE, "it is put back"


def test_behind_a_proxy_the_hub_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _count_connections(monkeypatch)
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy"})
    with offline_if_unreachable():
        assert not constants.HF_HUB_OFFLINE
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with offline_if_unreachable(asked=False):
        assert not constants.HF_HUB_OFFLINE
    assert asked == []
    with offline_if_unreachable():
        assert constants.HF_HUB_OFFLINE
    assert len(asked) == 1
