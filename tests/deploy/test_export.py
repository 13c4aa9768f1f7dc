from __future__ import annotations

import errno
import json
import logging
import re
import signal
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dynamicvit import KeepSchedule, SparseViT, cli, sparsify
from dynamicvit.deploy import export as module
from dynamicvit.deploy import formats, verify, writers
from dynamicvit.deploy.engines import available
from dynamicvit.deploy.export import (
    FORMATS,
    Exported,
    export,
    export_model,
    print_exported,
    read_metadata,
)
from dynamicvit.deploy.runtime import openvino_core
from dynamicvit.deploy.samples import Sample, find_labels, load_samples, pick_samples
from dynamicvit.deploy.verify import Agreement, measure_agreement
from dynamicvit.io.load import load_model
from tests.conftest import randomise, tiny_vit, write_images

NAMES = ["ant", "bee", "cat", "dog", "élan"]


def _sparse(ratios: tuple[float, ...] = (0.5,), squeeze: bool = False, **options: Any) -> Any:
    """A stage before each block."""
    schedule = KeepSchedule(tuple(range(len(ratios))), ratios)
    dense = tiny_vit(**{"depth": len(ratios), **options})
    sparse = sparsify(dense, schedule=schedule, squeeze=squeeze)
    randomise(sparse.scorers)
    sparse.pretrained_cfg["label_names"] = NAMES
    return sparse


def _two_stages(**options: Any) -> Any:
    return _sparse((0.7, 0.3), **options)


def _check_onnx(
    path: Path, sparse: Any, images: Tensor, other: tuple[int, ...] | None = None
) -> None:
    """Run by hand, at a batch size not used before, with the file's counts or others."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [item.name for item in session.get_inputs()] == ["images"]
    stages = [f"kept_{stage}" for stage in range(1, 1 + len(sparse.scorers))]
    assert [item.name for item in session.get_outputs()] == ["logits", *stages]
    for value in (*session.get_inputs(), *session.get_outputs()):
        assert value.shape[0] == "batch"
    assert [value.shape[1] for value in session.get_outputs()[1:]] == [
        f"{name}_count" for name in stages
    ]
    assert [item.name for item in session.get_overridable_initializers()] == ["counts"]
    fed: dict[str, Any] = {"images": images.numpy()}
    if other is not None:
        fed["counts"] = np.array(other)
        start = sparse.backbone.patch_embed.num_patches
        ratios = tuple(count / start for count in other)
        sparse = sparse.at(schedule=KeepSchedule(sparse.schedule.blocks, ratios))
    logits, *kept = session.run(["logits", *stages], fed)
    expected = sparse.pruned(images)
    np.testing.assert_allclose(logits, expected.logits, atol=1e-5)
    for mask, stage in zip(expected.keep, kept, strict=True):
        positions = mask.nonzero()[:, 1].reshape(len(mask), -1)
        np.testing.assert_array_equal(np.sort(stage, axis=1), positions)


WORKING = [
    ("onnx", "float32"),
    ("onnx", "float16"),
    ("onnx", "int8"),
    ("openvino", "float32"),
    ("openvino", "bfloat16"),
    ("openvino", "int8"),
    ("torch", "float32"),
    ("torch", "float16"),
    ("torch", "bfloat16"),
    ("aoti", "float32"),  # its half precisions are the same program, and compile for long
]


@pytest.mark.parametrize(("format", "precision"), WORKING)
def test_exports_do_what_the_model_does(format: str, precision: str, tmp_path: Path) -> None:
    if (format, precision) == ("openvino", "bfloat16") and not available(format, precision):
        pytest.skip("this processor has no bfloat16")
    photos = None
    if precision == "int8":
        photos = str(write_images(tmp_path / "photos", {"train": 11}))
    path = tmp_path / "new" / f"model{FORMATS[format][0]}"
    done = export_model(_sparse(), path, format, precision, images=photos, samples=21)
    assert (done.path, done.format, done.precision) == (str(path), format, precision)
    agreement = done.agreement
    assert (agreement.images, agreement.batch_sizes) == (21, (1, 4, 16))
    assert agreement.kept_agreement is not None
    assert agreement.kept_agreement > 80
    others = [other.kept_counts for other in done.other_budgets]
    assert others == ([(16,), (4,)] if format in formats.COUNTED else [])
    if precision == "float32":
        assert agreement.max_difference < 1e-5
        assert (agreement.top1_agreement, agreement.kept_agreement) == (100, 100)
        assert (agreement.other_tokens, agreement.score_gap) == (0, 0)
    else:  # rounded, and not nothing
        assert 1e-5 < agreement.max_difference < 0.2 * agreement.largest_logit
    beside = [path.with_suffix(".bin")] if format == "openvino" else []
    assert sorted(path.parent.iterdir()) == sorted([path, *beside])
    if format != "aoti":  # nobody's source paths travel along, but the compiler's do
        assert b"site-packages" not in path.read_bytes()
    size = sum(part.stat().st_size for part in path.parent.iterdir())
    assert done.megabytes == pytest.approx(size / 1e6)

    metadata = read_metadata(path)
    assert metadata["class_names"] == NAMES
    assert metadata["precision"] == precision
    assert metadata["input_size"] == [3, 32, 32]
    assert (metadata["mean"], metadata["std"]) == ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
    assert (metadata["interpolation"], metadata["crop_pct"]) == ("bicubic", 0.9)
    assert (metadata["blocks"], metadata["ratios"]) == ([0], [0.5])
    assert metadata["kept_counts"] == [8]
    assert (metadata["channels"], metadata["layout"], metadata["dtype"]) == (
        "RGB",
        "NCHW",
        "float32",
    )
    assert (metadata["resize"], metadata["fit"], metadata["crop"]) == ([35, 35], "cover", [32, 32])
    assert [*metadata["inputs"]] == ["images", *["counts"] * (format in formats.COUNTED)]
    assert [*metadata["outputs"]] == ["logits", "kept_1"]
    kept = "counts[0]" if format in formats.COUNTED else "8"
    assert f"int64 [batch, {kept}]" in metadata["outputs"]["kept_1"]
    if format == "openvino":
        _check_openvino(path, metadata)
    assert metadata.get("inference_precision") == (
        formats.OPENVINO_HINTS[precision] if format == "openvino" else None
    )


def _check_openvino(path: Path, metadata: dict[str, Any]) -> None:
    """What a viewer shows."""
    import openvino

    model = openvino.Core().read_model(path)
    assert [value.get_any_name() for value in model.inputs] == ["images", "counts"]
    assert [value.get_any_name() for value in model.outputs] == ["logits", "kept_1"]
    assert model.get_parameters()[0].get_layout() == openvino.Layout("NCHW")
    assert model.get_rt_info(["outputs", "kept_1"]).value == metadata["outputs"]["kept_1"]


@pytest.mark.parametrize(
    "options",
    [
        {"name": "vit_tiny_patch16_224", "global_pool": "avg", "reg_tokens": 3},
        {"name": "eva02_tiny_patch14_224"},
        {"name": "lvvit_tiny", "img_size": 64, "patch_size": 16},
        {"squeeze": True},
    ],
    ids=lambda options: options.get("name", "squeezed"),
)
def test_kinds_of_models_as_onnx(options: dict[str, Any], tmp_path: Path) -> None:
    """Each with two stages, so that positions at the second are those of the first's."""
    import onnx

    sparse = _two_stages(**options)
    path = tmp_path / "model.onnx"
    export_model(sparse, path, samples=5)
    size = options.get("img_size", 32)
    with torch.no_grad():
        for other in (None, (9, 2), (16, 5)):
            _check_onnx(path, sparse, torch.randn(7, 3, size, size), other)

    model = onnx.load(str(path))
    assert [(item.domain, item.version) for item in model.opset_import] == [("", 18)]
    operators = {node.op_type for node in model.graph.node}
    assert not {"If", "Loop", "Scan", "NonZero", "Unique"} & operators
    assert not {name for name in operators if name.startswith("Scatter")}
    assert operators <= OPERATORS | (SQUEEZE_OPERATORS if sparse.squeeze else set())
    assert sum(node.op_type == "TopK" for node in model.graph.node) == 2
    assert not any(node.metadata_props for node in model.graph.node)
    described = read_metadata(path)
    inputs = {value.name: value.doc_string for value in model.graph.input}
    assert inputs == described["inputs"]
    outputs = {value.name: value.doc_string for value in model.graph.output}
    assert outputs == described["outputs"]
    assert len(model.functions) == 0


# What ONNX Runtime, OpenVINO and TensorRT all run.
OPERATORS = {
    *("Add", "Div", "Erf", "Mul", "Neg", "Sigmoid", "Sqrt", "Sub", "Tanh", "Relu", "Softmax"),
    *("MatMul", "Gemm", "Conv", "LayerNormalization", "BatchNormalization"),
    *("ReduceMax", "ReduceMean", "TopK", "Gather", "GatherElements", "Slice", "Split"),
    *("Cast", "Concat", "Constant", "Expand", "Range", "Reshape", "Shape", "Squeeze"),
    *("Transpose", "Unsqueeze"),
}
SQUEEZE_OPERATORS = {"ArgMax", "Clip", "Equal", "Exp", "ReduceL2", "ReduceSum"}


@pytest.mark.parametrize("format", ["openvino", "torch", "aoti"])
def test_squeezed_models(format: str, tmp_path: Path) -> None:
    done = export_model(
        _two_stages(squeeze=True), tmp_path / f"model{FORMATS[format][0]}", format, samples=5
    )
    assert (done.agreement.top1_agreement, done.agreement.kept_agreement) == (100, 100)


@pytest.mark.parametrize(
    ("ratios", "counts"), [((0.7, 0.3), [(16, 16), (5, 2)]), ((1.0, 1.0), [(8, 8), (4, 4)])]
)
def test_other_budgets_are_compared(
    ratios: tuple[float, ...], counts: list[tuple[int, ...]]
) -> None:
    found = module._other_budgets(_sparse(ratios), "onnx")
    assert list(found) == counts
    for each, sparse in found.items():
        assert sparse.schedule.counts(16) == each


def test_dense_models_and_the_command_line(
    dense_folder: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, results = tmp_path / "dense.pt2", tmp_path / "results.json"
    cli.main(
        f"export {dense_folder} {path} --images {images} --samples 6 --results {results}".split()
    )
    printed = capsys.readouterr().out
    assert "100.00%" in printed
    assert printed.endswith(f"the comparison is in {results}\n")
    assert read_metadata(path)["class_names"] == ["bright", "dark"]
    assert "blocks" not in read_metadata(path)
    report = json.loads(results.read_text())
    assert report["agreement"]["images"] == 6
    assert report["agreement"]["batch_sizes"] == [1, 4]
    assert report["agreement"]["kept_agreement"] is None
    assert report["environment"]["torch"] == torch.__version__
    # The folders are named as the classes are: what the model does is what evaluation says.
    cli.main(f"evaluate {dense_folder} --data {images} --split train --output {results}".split())
    top1 = json.loads(results.read_text())[str(dense_folder)]["top1"]
    done = export_model(
        load_model(str(dense_folder)), path, "torch", images=str(images / "train"), samples=16
    )
    assert done.agreement.accuracy == (top1, top1)
    (logits,) = torch.export.load(path).module()(torch.zeros(9, 3, 32, 32))
    assert logits.shape == (9, 2)


# Calls that must fail, before any work is done.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tflite"}, "format must be one of onnx, openvino, torch, aoti, got 'tflite'"),
        ({"precision": "int4"}, "precision must be one of .*, got 'int4'"),
        ({"format": "openvino"}, "output must end in .xml for format 'openvino', got .*model.onnx"),
        ({"output": "model"}, "output must end in .pt2, .xml, .onnx, got .*model"),
        ({"output": "folder.onnx"}, "output must be a file, got the folder .*folder.onnx"),
        ({"images": "nowhere"}, "images must be a folder of images, got nowhere"),
        ({"images": "."}, r"images must be a folder of images, got none in \."),
        ({"samples": 0}, "samples must be 1 or more, got 0"),
        ({"samples": 1e9}, "samples must be an integer, got 1000000000.0"),
        ({"precision": "int8"}, "calibration must be a folder of images for int8, got None"),
        ({"precision": "int8", "calibration": "."}, "calibration must be a folder .* got none in"),
        ({"calibration": "."}, "calibration is for precision int8, got it with 'float32'"),
        (
            {"format": "torch", "output": "m.pt2", "precision": "int8"},
            "precision int8 is for formats onnx and openvino, got 'torch'",
        ),
        ({"model": "headless"}, "model must have a classification head, got num_classes=0"),
    ],
)
def test_bad_arguments_are_named(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.onnx").mkdir()
    model = _sparse(num_classes=0) if options.get("model") else _sparse()
    given: dict[str, Any] = {"output": "model.onnx", "samples": 4, **options, "model": model}
    with pytest.raises((TypeError, ValueError), match=message):
        export_model(**given)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.onnx"]


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import exc

    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    for format, package in (("onnx", "onnx"), ("openvino", "onnx")):
        path = tmp_path / f"model{FORMATS[format][0]}"
        message = re.escape(f"format '{format}' needs {package}: pip install 'dynamicvit[export]'")
        with pytest.raises(ValueError, match=message):
            export_model(_sparse(), path, format)

    def compile(*arguments: Any, **options: Any) -> None:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile)
    with pytest.raises(ValueError, match=r"format 'aoti' needs a C\+\+ compiler"):
        export_model(_sparse(), tmp_path / "model.pt2", "aoti")
    assert list(tmp_path.iterdir()) == []


def test_a_precision_that_the_engine_lacks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino

    with pytest.raises(ValueError, match=r"float16 or int8 for format 'onnx', got 'bfloat16'"):
        export("no_such_model", str(tmp_path / "model.onnx"), precision="bfloat16")
    monkeypatch.setattr(openvino.Core, "get_property", lambda *names: ["FP32", "INT8"])
    for precision in ("float16", "bfloat16"):
        message = f"this processor has no {precision} for OpenVINO, which finds FP32, INT8"
        with pytest.raises(ValueError, match=message):
            export_model(_sparse(), tmp_path / "model.xml", "openvino", precision)
        with pytest.raises(ValueError, match=message):  # and before a model is looked for
            export("no_such_model", str(tmp_path / "model.xml"), "openvino", precision)
    assert list(tmp_path.iterdir()) == []


def test_remarks_of_exporters_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two modules' warnings, and of those alone."""
    names = (*writers._TALKERS, "torch.utils.other")
    loggers = [logging.getLogger(name) for name in names]

    def warn(*arguments: Any, **options: Any) -> None:
        for logger in loggers:
            logger.warning("no CUDA")

    fake: Any = types.ModuleType("nncf")
    fake.ModelType = types.SimpleNamespace(TRANSFORMER=0)
    fake.quantize = warn
    monkeypatch.setitem(sys.modules, "nncf", fake)
    fake.set_log_level = fake.Dataset = fake.IgnoredScope = lambda *rest, **options: None
    shown: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: shown.append(record.name))
    for logger in loggers:
        logger.addHandler(handler)
    try:
        writers.quantize([], lambda *step: None, None, [])
        warn()
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert shown == ["torch.utils.other", *names]


# Nothing half-written.


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Exported]:
    """An export whose program is the model itself, to save time."""
    opened: list[nn.Module] = []

    def write(program: nn.Module, path: Path, metadata: str) -> None:
        opened.append(program)
        path.write_bytes(metadata.encode())

    def trace(model: Any, dtype: torch.dtype, free_counts: bool) -> nn.Module:
        return writers._Graph(model.fuse(), dtype)

    monkeypatch.setattr(module, "trace", trace)
    monkeypatch.setattr(module, "write_torch", write)
    monkeypatch.setitem(module.LOADERS, "torch", lambda path, precision: opened[-1])

    def run(
        path: Path,
        wrong: Callable[..., Any] = lambda *outputs: outputs,
        model: nn.Module | None = None,
    ) -> Exported:
        def engine(path: Path, precision: str) -> Callable[[Tensor], Any]:
            return lambda images: wrong(*opened[-1](images))

        monkeypatch.setitem(module.LOADERS, "torch", engine)
        return export_model(model or _sparse(), path, "torch", samples=4)

    return run


def test_a_mismatch_leaves_no_file(tmp_path: Path, quick: Callable[..., Exported]) -> None:
    path = tmp_path / "model.pt2"
    message = r"logits differ by up to 0.01.* \(at most 0.001\); on 4 images, batch sizes 1, 3"
    with pytest.raises(ValueError, match=message):
        quick(path, lambda logits, *kept: (logits + 0.01, *kept))
    assert list(tmp_path.iterdir()) == []

    quick(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"top-1 agreement is .*% \(must be 100%\)"):
        quick(path, lambda logits, *kept: (-logits, *kept))
    with pytest.raises(ValueError, match="cannot run precision 'float32' here: out of luck"):
        quick(path, lambda logits, kept: _raise(RuntimeError("out of luck")))
    assert (list(tmp_path.iterdir()), path.read_bytes()) == ([path], before)


def _raise(error: Exception) -> Any:
    raise error


def test_the_model_is_left_as_it_was(tmp_path: Path, quick: Callable[..., Exported]) -> None:
    sparse = _sparse().train().double()
    before = {name: value.clone() for name, value in sparse.state_dict().items()}
    quick(tmp_path / "model.pt2", model=sparse)
    assert sparse.training
    for name, value in sparse.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_small_models_are_compared_in_one_thread(
    tmp_path: Path, quick: Callable[..., Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    monkeypatch.setattr(module.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(module.torch, "set_num_threads", threads.append)
    quick(tmp_path / "model.pt2")
    assert threads == [1, 2]
    monkeypatch.setattr(module, "_SMALL", 0)
    quick(tmp_path / "model.pt2")
    assert threads == [1, 2, 2, 2]


@pytest.mark.parametrize("format", ["openvino", "torch"])
def test_a_full_disk_leaves_no_file(
    format: str,
    dense_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import openvino

    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", lambda *arguments: _raise(full))
    if format == "openvino":  # its own writer, here without what comes before
        node = types.SimpleNamespace(set_layout=lambda layout: None)
        graph = types.SimpleNamespace(
            inputs=[None],
            set_rt_info=lambda *arguments: None,
            input=lambda name: types.SimpleNamespace(get_node=lambda: node),
        )
        program = types.SimpleNamespace(save=lambda *arguments, **options: None)
        monkeypatch.setattr(writers, "_to_onnx", lambda *arguments: program)
        monkeypatch.setattr(openvino, "convert_model", lambda path: graph)
        failed = RuntimeError("iostream error")
        monkeypatch.setattr(openvino, "save_model", lambda *arguments, **options: _raise(failed))
    path = tmp_path / "out" / f"model{FORMATS[format][0]}"
    with pytest.raises(SystemExit):
        cli.main(["export", str(dense_folder), str(path), "--format", format, "--samples", "1"])
    error = capsys.readouterr().err.splitlines()[-1]
    reason = "iostream error" if format == "openvino" else f"{full}"
    assert error == f"dynamicvit export: error: cannot write {path}: {reason}"
    assert list(path.parent.iterdir()) == []


def test_a_signal_leaves_no_file(tmp_path: Path, quick: Callable[..., Exported]) -> None:
    """SIGTERM, as `timeout` and job schedulers send it."""

    def end(*outputs: Tensor) -> None:
        assert [path.suffix for path in tmp_path.iterdir()] != []
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped:
        quick(tmp_path / "model.pt2", end)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_folder_that_cannot_be_written_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(module.tempfile, "TemporaryDirectory", lambda **options: _raise(full))
    path = tmp_path / "model.pt2"
    with pytest.raises(OSError, match=re.escape(f"cannot write {path}: {full}")):
        export_model(_sparse(), path, samples=1)


def test_weights_of_one_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_model` reads them; what it gives is exported."""
    asked: list[Any] = []

    def load(name: str, **options: Any) -> Any:
        asked.append((name, options))
        return _sparse()

    monkeypatch.setattr(module, "load_model", load)
    monkeypatch.setattr(module, "export_model", lambda model, *rest, **options: model)
    path = str(tmp_path / "model.pt2")
    found = export("vit_tiny_patch16_224", path, weights="mine.pth", quiet=True)
    assert isinstance(found, SparseViT)
    assert asked == [("vit_tiny_patch16_224", {"weights": "mine.pth"})]


def test_results_that_are_a_folder_are_seen_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="results must be a file, got the folder"):
        export("no_such_model", str(tmp_path / "model.onnx"), results=str(tmp_path))


def test_all_that_is_printed_fits_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    agreement = Agreement(2000, (1, 3, 4, 16), 1.2e-6, 12.3, 99.95, 99.91, 7, 1e-5, (91.25, 91.2))
    engine = "ONNX Runtime 1.32.0, which computes in float32 on a CPU"
    folder = "a_folder_with_a_name" * 5
    print_exported(Exported(f"{folder}/[m].onnx", "onnx", "float16", engine, 1234.5, agreement))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    printed = "\n".join(lines)
    assert "…" not in printed
    for whole in (
        "1234.5 MB",
        "1.2e-06",
        "12",
        "99.95%",
        "99.91%",
        "91.25%",
        "91.20%",
        "1, 3, 4, 16",
    ):
        assert whole in printed


def _page_code() -> list[str]:
    """The Python of docs/use-the-file.md."""
    page = Path(__file__).parents[2] / "docs" / "use-the-file.md"
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("options", [{}, {"in_chans": 1, "crop_mode": "squash"}], ids=str)
def test_use_the_file_gives_what_predict_gives(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's own code, on photos of odd sizes."""
    onnx, openvino, other_budget, _ = _page_code()
    sparse = _two_stages(in_chans=options.get("in_chans", 3))
    sparse.pretrained_cfg.update(
        {
            "crop_mode": options.get("crop_mode", "center"),
            "mean": (0.4, 0.5, 0.6)[: options.get("in_chans", 3)],
            "std": (0.2, 0.25, 0.3)[: options.get("in_chans", 3)],
            "input_size": (options.get("in_chans", 3), 32, 32),
        }
    )
    monkeypatch.chdir(tmp_path)
    # The page runs twice here, and a second core must not begin before the first ends.
    monkeypatch.setattr("openvino.Core", openvino_core)
    export_model(sparse, "model.onnx", samples=1)
    export_model(sparse, "model.xml", samples=1)
    scope: dict[str, Any] = {}
    for width, height in ((97, 61), (50, 133)):
        pixels = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        picture = Image.fromarray(pixels).resize((width, height))
        exif = Image.Exif()
        exif[0x0112] = 6  # lies on its side
        picture.save("photo.jpg", exif=exif)
        expected = {item.index: item.probability for item in sparse.predict("photo.jpg")}
        for code in (onnx, openvino):
            scope["probabilities"] = None
            exec(code, scope)
            for index, probability in expected.items():
                assert scope["probabilities"][index] == pytest.approx(probability, abs=1e-3)
        exec(other_budget, scope)
        half = sparse.at(schedule=KeepSchedule(sparse.schedule.blocks, (5 / 16, 2 / 16)))
        probabilities = scope["logits"] - scope["logits"].max()
        probabilities = np.exp(probabilities) / np.exp(probabilities).sum()
        for item in half.predict("photo.jpg"):
            assert probabilities[item.index] == pytest.approx(item.probability, abs=1e-3)


def test_metadata_of_other_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no exported model at"):
        read_metadata(tmp_path / "model.onnx")
    for name in ("model.onnx", "model.xml", "model.pt2"):
        (tmp_path / name).write_bytes(b"not a model")
        with pytest.raises(ValueError, match=f"{name} is not a model that dynamicvit exported"):
            read_metadata(tmp_path / name)


# The comparison.


def _agreement(sparse: SparseViT, wrong: Callable[..., Any], count: int = 6) -> Agreement:
    return _compare(sparse, wrong, pick_samples(None, count))


def _compare(sparse: SparseViT, wrong: Callable[..., Any], found: list[Sample]) -> Agreement:
    graph = writers._Graph(sparse, torch.float32)
    return measure_agreement(sparse, lambda images: wrong(images, *graph(images)), found)


def _swap(sparse: SparseViT) -> Callable[..., Any]:
    """An engine that keeps the best token that left instead of the worst that stayed, at the last
    stage, and whose logits are those of the tokens that it keeps."""

    def run(images: Tensor, logits: Tensor, kept: Tensor) -> Any:
        scores, keep = sparse.pruned(images).scores[-1], sparse.pruned(images).keep[-1]
        best = scores.masked_fill(keep > 0, float("-inf")).argmax(1)
        worst = scores.masked_fill(keep == 0, float("inf")).argmin(1)
        kept = torch.where(kept == worst[:, None], best[:, None], kept)
        final, _ = sparse.run(images, verify.GivenTokens([kept]))
        return sparse.forward_head(final.x), kept

    return run


def test_each_image_is_run_once_at_batch_sizes_in_turn() -> None:
    sizes: list[int] = []

    def run(images: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:
        sizes.append(len(images))
        return outputs

    agreement = _agreement(_sparse().eval(), run, 25)
    assert sizes == [1, 4, 16, 1, 3]
    assert (agreement.images, agreement.batch_sizes) == (25, (1, 3, 4, 16))


def test_a_faithful_engine_agrees() -> None:
    agreement = _agreement(_two_stages().eval(), lambda images, *outputs: outputs)
    assert agreement.max_difference < 1e-6
    assert (agreement.top1_agreement, agreement.kept_agreement) == (100, 100)
    assert (agreement.other_tokens, agreement.score_gap) == (0, 0)
    agreement.check("float32")


def test_other_tokens_are_right_only_where_scores_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = _sparse().eval()
    agreement = _agreement(sparse, _swap(sparse))
    assert agreement.max_difference < 1e-6  # the logits are those of the engine's tokens
    assert agreement.kept_agreement == pytest.approx(100 * 7 / 8)
    assert agreement.other_tokens == 6
    assert agreement.score_gap > verify.TIE
    with pytest.raises(ValueError, match=r"kept tokens agree to 87.50%, with score gaps of up to"):
        agreement.check("float32")
    assert agreement.score_gap > verify.HALF_TIE["bfloat16"]
    with pytest.raises(ValueError, match="score gaps"):  # rounding does not do that
        agreement.check("bfloat16")
    replace(agreement, score_gap=0.05).check("bfloat16")
    monkeypatch.setattr(verify, "TIE", 1.0)
    tied = _agreement(sparse, _swap(sparse))
    assert tied.top1_agreement == 100
    tied.check("float32")


def test_tokens_that_had_left_are_no_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "TIE", 1e9)
    sparse = _two_stages().eval()

    def swap_stages(images: Tensor, logits: Tensor, first: Tensor, second: Tensor) -> Any:
        gone = [next(n for n in range(16) if n not in row) for row in first.tolist()]
        return logits, first, torch.cat([second[:, :-1], torch.tensor(gone)[:, None]], dim=1)

    assert _agreement(sparse, swap_stages).score_gap == float("inf")
    with pytest.raises(ValueError, match="score gaps of up to inf"):
        _agreement(sparse, swap_stages).check("float32")
    twice = _agreement(sparse, lambda images, logits, first, second: (logits, first * 0, second))
    assert twice.score_gap == float("inf")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda images, logits, kept: (logits * float("nan"), kept), "logits differ by up to nan"),
        (
            lambda images, logits, kept: (logits[:, :3], kept),
            r"logits of the wrong shape: .*\[1, 3",
        ),
        (
            lambda images, logits, kept: (logits, kept[:, :3]),
            r"kept_1 of the wrong shape: .*\[1, 3",
        ),
        (lambda images, logits, kept: (logits,), "gives what 0 stages keep, expected 1"),
        (lambda images, logits, kept: (logits, kept + 16), "keeps tokens that there are not"),
    ],
)
def test_nonsense_is_refused(wrong: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _agreement(_sparse().eval(), wrong).check("float32")


@pytest.mark.parametrize(
    ("precision", "difference", "passes"),
    [
        ("float32", 9e-4, True),
        ("float32", 1.1e-3, False),
        ("float16", 0.019, True),
        ("float16", 0.021, False),
        ("bfloat16", 0.099, True),
        ("bfloat16", 0.101, False),
        ("int8", 1.0, True),
    ],
)
def test_tolerances(precision: str, difference: float, passes: bool) -> None:
    agreement = Agreement(1, (1,), difference, 2.0, 100.0, 100.0, 0, 0.0, None)
    if passes:
        agreement.check(precision)
    else:
        with pytest.raises(ValueError, match="does not do what the model does"):
            agreement.check(precision)
    for value in ("nan", "inf"):
        with pytest.raises(ValueError, match=value):
            replace(agreement, max_difference=float(value)).check(precision)


def test_accuracy_is_of_classes_that_are_known() -> None:
    picture = Image.new("RGB", (8, 8))

    def find(*folders: str) -> list[int] | None:
        found = find_labels([Sample(picture, folder) for folder in folders], ["bee", "ant"])
        return None if found is None else found.tolist()

    assert find("ant", "bee", "ant") == [1, 0, 1]
    assert find("bee") == [0]
    assert find("n02000002", "n01000001") == [1, 0]  # ImageNet's synsets, in order
    assert find("n02000002") is None
    assert find("ant", "cat") is None
    assert find("train", "val") is None
    sparse = _sparse().eval()
    names = ["3 Dress", "4 Coat", "5 Sandal", "6 Shirt", "8 Bag"]
    sparse.pretrained_cfg["label_names"] = names
    found = [item for item in pick_samples(None, 2000) if item.folder in names][::50]
    accuracy = _compare(sparse, lambda images, logits, kept: (-logits, kept), found).accuracy
    assert accuracy is not None
    assert accuracy[0] != accuracy[1]


def test_images_come_from_all_over_a_folder(images: Path) -> None:
    (images / "notes.txt").write_text("no image")
    chosen = pick_samples(str(images), 4)
    assert [str(Path(str(item.source)).relative_to(images)) for item in chosen] == [
        "train/bright/00.png",
        "train/bright/06.png",
        "train/dark/04.png",
        "val/bright/02.png",
    ]
    assert len(pick_samples(str(images), 100)) == 24
    assert isinstance(pick_samples(None, 1)[0].source, Image.Image)
    batches = list(load_samples(_sparse(), chosen, 3))
    assert [tuple(batch.shape) for batch in batches] == [(3, 3, 32, 32), (1, 3, 32, 32)]
