from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import docstring_parser
import pytest
import yaml

from dynamicvit import __version__, cli
from dynamicvit.training.config import TrainConfig, find_recipe


def _fail(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a user's mistake gives."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.endswith("\n")
    assert error.count("\n") == 1, error
    return error


def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"  {name} " in text
    assert cli.main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_the_overview_has_each_function_s_own_summary() -> None:
    for name, (_, summary) in cli.COMMANDS.items():
        doc = docstring_parser.parse(cli.find_function(name).__doc__ or "")
        assert summary == doc.short_description, name


@pytest.mark.parametrize("argument", ["--help", "--version", "tarin"])
def test_what_needs_no_model_loads_no_torch(argument: str) -> None:
    script = (
        "import sys, dynamicvit_command as command\n"
        f"try: command.main([{argument!r}])\n"
        "except SystemExit as end: assert end.code == 2\n"
        "loaded = {'torch', 'timm', 'dynamicvit', 'rich'} & sys.modules.keys()\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_command_loads_its_own_subject_alone() -> None:
    script = (
        "import sys, dynamicvit_command as command\n"
        "try: command.main(['models', '--help'])\n"
        "except SystemExit: pass\n"
        "print(*(name for name in sys.modules if name.startswith('dynamicvit.')))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    parts = {name.split(".")[1] for name in run.stdout.splitlines()[-1].split()}
    assert parts & {"training", "deploy", "views", "quickstart"} == set()


def test_models_are_in_timm_s_registry_once_the_package_is_imported() -> None:
    script = "import dynamicvit, timm; assert timm.is_model('dynamicvit_lvvit_small')"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    parser, _ = cli.build_parser(name)
    for action in parser._actions:
        assert action.help, f"{name} {action.dest}"


def test_train_offers_every_field_of_its_config() -> None:
    parser, _ = cli.build_parser("train")
    options = {action.dest for action in parser._actions}
    assert {field.name for field in dataclasses.fields(TrainConfig)} <= options
    assert "resume" in options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tarin"], "no command 'tarin'; commands are quickstart, train, evaluate"),
        (["train"], "required: --data, --output"),
        (
            ["train", "--data", "x", "--output", "y", "--epochs", "1.5"],
            "epochs must be an integer, got 1.5",
        ),
        (["train", "--data", "x", "--output", "y", "--epochs", "-1"], "epochs must be 0 or more"),
        (["train", "--data", "x", "--output", "y", "--colour", "1"], "colour"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "--config"], "expected one argument"),
        (["train", "--resume", "--output"], "expected one argument"),
        (["evaluate"], "required: models, --data"),
        (["train", "--output", "nowhere", "--resume"], "got nowhere, which has no config.yaml"),
        (["benchmark", "resnet18"], "ResNet is not supported"),
        (["evaluate", "no_such_model", "--data", "x"], "model must be a folder, a hub id or a"),
        (["evaluate", "./nowhere", "--data", "x"], "no model folder at nowhere"),
        (
            ["search", "m", "--data", "x", "--keep_ratios", "0.7"],
            "keep_ratios must be list[float] or null, such as [0.7], got 0.7\n",
        ),
        (
            ["search", "m", "--data", "x", "--max_loss", "a"],
            "max_loss must be float or null, got a",
        ),
        (["quickstart", "--data", "x"], "model must be given with data"),
        (["predict", "--model", "x"], "required: images"),
        (["predict", "cat.jpg"], "model"),
        (["predict", "cat.jpg", "--model", "./nowhere"], "no image at cat.jpg"),
        (["predict", __file__, "--model", "./nowhere"], "no model folder at nowhere"),
        (["predict", __file__, "--model", __file__], "--weights FILE"),
        (["quickstart", "--model", "x"], "data must be given with model"),
        (
            ["predict", "cat.jpg", "--model", "x", "--top_k", "many"],
            "top_k must be an integer, got many",
        ),
        (["explain", "cat.jpg", "--model", "x"], "images must be files or folders, got no file at"),
        (["explain", ".", "--model", "x", "--formats", "[bmp]"], "formats must be of png, gif"),
    ],
)
def test_a_user_s_mistake_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = _fail(arguments, capsys)
    assert message in error
    assert "error: " in error


def test_an_unreadable_image_in_a_loader_process_is_one_line(
    images: Path,
    dense_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = images / "val" / "dark" / "01.png"
    bad.write_text("not an image")
    error = _fail(["evaluate", str(dense_folder), "--data", str(images), "--workers=1"], capsys)
    assert f"cannot read image {bad}" in error


def test_config_file_with_overrides_and_dashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def fake(config: TrainConfig, resume: bool = False) -> None:
        seen.update(config=config, resume=resume)

    fake.__doc__ = cli.find_function("train").__doc__
    monkeypatch.setattr("dynamicvit.training.train.train", fake)
    fake.__annotations__ = {"config": TrainConfig, "resume": bool}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"data": "a", "output": "b", "epochs": 7, "keep_ratio": 0.9}))
    cli.main(["train", "--config", str(file), "--keep-ratio", "0.8", "--batch-size=6", "--resume"])
    expected = TrainConfig(data="a", output="b", epochs=7, keep_ratio=0.8, batch_size=6)
    assert seen == {"config": expected, "resume": True}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"batch_size: \xff\xfe", "must be UTF-8"),
        (b"", "config.yaml must hold options, each as NAME: VALUE, got nothing in it"),
        (b"batch_size: [1", "config"),
        (b"- 1", "config"),
        (
            b"colour: 1",
            "config.yaml has options that dynamicvit {command} does not have: ['colour']",
        ),
        (b"batch_size: many", "batch_size"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "train"])
def test_a_bad_config_file_is_one_line(
    content: bytes, message: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    assert message.format(command=command) in _fail([command, "--config", str(file)], capsys)


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m dynamicvit models deit_256 | true"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert run.stderr == ""


def test_evaluate_from_the_command_line(
    images: Path,
    dense_folder: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "out" / "results.json"
    arguments = [str(dense_folder), "--data", str(images), "--workers", "0"]
    assert cli.main(["evaluate", *arguments, "--output", str(output)]) == 0
    assert json.loads(output.read_text())[str(dense_folder)]["images"] == 8


def test_a_quiet_command_prints_its_result_alone(
    images: Path, dense_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it writes no named file. With one it prints nothing."""
    for arguments in (
        ["evaluate", str(dense_folder), "--data", str(images), "--workers=0"],
        ["predict", str(images / "val"), "--model", str(dense_folder)],
        ["models", "deit_256"],
    ):
        assert cli.main([*arguments, "--quiet"]) == 0
        found, error = capsys.readouterr()
        assert len(json.loads(found)) in (1, 8)
        assert error == ""
        assert cli.main([*arguments, "--quiet", "--output", str(tmp_path / "out.json")]) == 0
        assert capsys.readouterr() == ("", "")


def test_predict_from_the_command_line(
    images: Path,
    dense_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = [str(images / "val" / name / "00.png") for name in ("dark", "bright")]
    output = tmp_path / "predictions.json"
    model = ["--model", str(dense_folder)]
    assert cli.main(["predict", *files, *model, "--top-k", "1", "--output", str(output)]) == 0
    assert [len(found) for found in json.loads(output.read_text()).values()] == [1, 1]
    capsys.readouterr()
    for content, message in ((b"text", "cannot read image"), (None, "no image at")):
        Path(files[1]).unlink()
        if content is not None:
            Path(files[1]).write_bytes(content)
        assert f"{message} {files[1]}" in _fail(["predict", *files, *model], capsys)
    assert "top_k must be 1 or more, got 0" in _fail(
        ["predict", files[0], *model, "--top_k", "0"], capsys
    )


def test_a_recipe_gives_defaults_and_what_is_given_goes_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[TrainConfig] = []

    def train(config: TrainConfig, /, resume: bool = False) -> None:
        """Train.

        Args:
            config: of the run.
            resume: go on.
        """
        seen.append(config)

    monkeypatch.setattr("dynamicvit.training.train.train", train)
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 5\nwarm_start: 7\n")
    start = ["train", "--data", "x", "--output", "y"]
    for more in (
        [],
        ["--recipe", "paper"],
        ["--recipe", "fast"],
        ["--epochs", "30", "--recipe=fast"],
        ["--config", str(file), "--warm-start", "0", "--recipe", "fast"],
    ):
        assert cli.main([*start, *more]) == 0
    fast = TrainConfig(data="x", output="y", **find_recipe("fast"))
    paper = TrainConfig(data="x", output="y")
    assert seen == [
        paper,
        paper,
        fast,
        dataclasses.replace(fast, epochs=30),  # the paper's number, asked for
        dataclasses.replace(fast, epochs=5, warm_start=0),
    ]
    assert fast != paper
    assert fast.epochs * 4 <= paper.epochs
    with pytest.raises(ValueError, match="recipe must be one of paper, fast, got 'slow'"):
        find_recipe("slow")
