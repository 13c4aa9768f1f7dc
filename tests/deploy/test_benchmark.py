from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from dynamicvit import KeepSchedule, SparseViT, cli, sparsify
from dynamicvit.deploy import benchmark as module
from dynamicvit.deploy import engines
from dynamicvit.deploy.benchmark import benchmark, print_benchmark
from dynamicvit.deploy.memory import peak_memory
from dynamicvit.deploy.part_times import part_times
from dynamicvit.evaluation.environment import environment
from tests.conftest import randomise, tiny_vit


def test_environment_says_what_a_number_was_measured_on() -> None:
    found = environment()
    assert found["torch"] == torch.__version__
    assert found["processor"]
    assert found["threads"] == torch.get_num_threads()


def _sparse(**options: Any) -> SparseViT:
    sparse = sparsify(tiny_vit(**options), keep_ratio=0.7)
    randomise(sparse.scorers)
    return sparse


@pytest.fixture
def folder(tmp_path: Path) -> str:
    _sparse().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


QUIET = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@torch.no_grad()
@pytest.mark.skipif(not engines.installed("packed"), reason="torch has no MKL or oneDNN")
def test_packed_layers_serve_any_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    for model in (_sparse(), _sparse(name="eva02_tiny_patch14_224")):
        run = engines.build(model, "packed", "float32")
        for batch in (1, 3, 1):
            images = torch.randn(batch, 3, 32, 32)
            torch.testing.assert_close(run(images), model(images), atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(engines, "can_pack", lambda: False)
    with pytest.raises(ValueError, match="'packed' needs a torch with MKL and oneDNN"):
        engines.build(model, "packed", "float32")
    assert not engines.installed("packed")


@QUIET
def test_compiled_weights_are_constants_on_a_cpu() -> None:
    run = engines.build(tiny_vit(depth=1), "compile", "float32")
    _, [code] = run_and_get_code(run, torch.zeros(1, 3, 32, 32))
    assert "_frozen_param" in code


@QUIET
@pytest.mark.parametrize(
    ("engine", "precision"),
    [(engine, precision) for engine, (_, known) in engines.ENGINES.items() for precision in known],
)
@torch.no_grad()
def test_each_engine_computes_the_model(engine: str, precision: str) -> None:
    if precision == "bfloat16" and not engines.available(engine, precision):
        pytest.skip("this processor has no bfloat16")
    sparse = _sparse()
    images = torch.randn(3, 3, 32, 32)
    # In bfloat16 near-tied tokens of so small a model change places.
    for model in (sparse.backbone, sparse)[: 2 if precision == "float32" else 1]:
        expected = model(images)
        logits = engines.build(model, engine, precision)(images)
        logits = logits[0] if isinstance(logits, tuple) else logits
        error = (torch.as_tensor(logits).float() - expected).norm() / expected.norm()
        assert error < (1e-4 if precision == "float32" else 0.1)


def test_attention_can_be_plain_or_fused() -> None:
    dense = tiny_vit()
    for fused in (True, False):
        run = engines.build(dense, "eager", "float32", fused_attention=fused)
        torch.testing.assert_close(run(torch.ones(1, 3, 32, 32)), dense(torch.ones(1, 3, 32, 32)))
    assert all(m.fused_attn for m in dense.modules() if hasattr(m, "fused_attn")), "a copy is run"


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell")
def test_memory_is_that_of_a_process_with_the_model_alone() -> None:
    models = tiny_vit(), tiny_vit(embed_dim=768)
    small, large = (peak_memory(model, "eager", "float32", (2, 3, 32, 32)) for model in models)
    size = sum(parameter.numel() for parameter in models[1].parameters()) * 4 / 1e6
    assert small is not None
    assert large is not None
    assert size < large - small < 3 * size


def test_memory_of_a_model_that_another_process_cannot_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = types.ModuleType("script")
    exec(
        "from timm.models import VisionTransformer\nclass Mine(VisionTransformer): pass",
        vars(script),
    )
    monkeypatch.setitem(sys.modules, "script", script)
    model = tiny_vit()
    model.__class__ = script.Mine
    assert peak_memory(model, "eager", "float32", (2, 3, 32, 32)) is None


def test_stages_are_named_and_timed() -> None:
    sparse = _sparse()
    found = part_times(sparse, torch.randn(2, 3, 32, 32), rounds=2)
    assert [*found] == [
        *("embed", "block 0", "scorer 1", "block 1", "scorer 2", "block 2", "scorer 3"),
        *("block 3", "norm and head", "other"),
    ]
    assert all(value > 0 for value in found.values())
    assert not any("forward" in vars(module) for module in sparse.modules())
    schedule = KeepSchedule((0, 2), (0.5, 0.25))
    found = part_times(sparsify(tiny_vit(), schedule=schedule), torch.randn(1, 3, 32, 32))
    assert [*found][:4] == ["embed", "scorer 1", "blocks 0–1", "scorer 2"]


def test_benchmark_writes_what_it_measured(
    folder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engines, "has_bfloat16", lambda: True)  # torch computes it everywhere
    output, plot = tmp_path / "speed.json", tmp_path / "speed.svg"
    arguments = ["benchmark", folder, "--engines", "[eager]", "--batch_sizes", "[1,2]"]
    arguments += ["--seconds", "0", "--output", str(output), "--plot", str(plot)]
    assert cli.main(arguments) == 0
    result = json.loads(output.read_text())
    assert [(m["precision"], m["batch_size"]) for m in result["measurements"]] == [
        *(("float32", 1), ("float32", 2), ("bfloat16", 1), ("bfloat16", 2)),
    ]
    for item in result["measurements"]:
        assert item["efficiency"] == pytest.approx(item["speed_up"] / result["ideal_speed_up"])
        assert {item["dense_attention"], item["sparse_attention"]} <= {"fused", "plain"}
        assert item["dense_ms"][0] <= item["dense_ms"][1]
        assert (item["peak_mb"] is None) == (item["batch_size"] == 1)
    assert result["tokens"] == [16, 11, 7, 5]
    assert result["environment"]["torch"] == torch.__version__
    assert plot.read_text().startswith("<?xml")
    text = capsys.readouterr().out
    assert text.endswith(f"the results are in {output}\nthe plot is in {plot}\n")
    printed = " ".join(text.split())
    assert "so the ideal speed-up is" in printed
    assert "scorer 1" in printed


def test_all_that_is_printed_fits_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The largest numbers, and the longest names, that there will be."""
    measurement = {
        "engine": "openvino",
        "precision": "bfloat16",
        "batch_size": 1024,
        "dense": 12345.6,
        "sparse": 23456.7,
        "speed_up": 12.34,
        "spread": (11.11, 13.13),
        "efficiency": 0.98,
        "dense_ms": (98765.4, 98766.4),
        "sparse_ms": (987.64, 987.66),
        "peak_mb": (34567.8, 45678.9),
    }
    result = {
        "measurements": [measurement, {**measurement, "speed_up": 0.5, "peak_mb": None}],
        "gmacs": {"dense": 123.456, "sparse": 0.0065432},
        "ideal_speed_up": 1.887,
        "stages_ms": {"blocks 10–12": 1234.56},
        "failed": [{"engine": "compile", "precision": "float32", "reason": "no [C++] compiler"}],
    }
    monkeypatch.setenv("COLUMNS", "80")
    print_benchmark(result)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    printed = "\n".join(lines)
    assert "…" not in printed
    for whole in (
        *("engine, precision", "batch", "dense", "pruned", "speed-up", "efficiency", "peak MB"),
        *("12346", "23457", "12.34× (11.11–13.13)", "0.98", "98765 (98766)", "988 (988)"),
        *("34568 → 45679", "1235", "123.5 → 0.006543 GMACs", "no [C++] compiler"),
        "in 1 of 2 rows the dense model is faster",
    ):
        assert whole in printed
    monkeypatch.setenv("COLUMNS", "40")  # wrapped by the terminal, not cut
    print_benchmark(result)
    assert "…" not in capsys.readouterr().out


def test_progress_is_lines_without_a_terminal_and_can_be_silenced(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "peak_memory", lambda *arguments: None)  # starts processes
    options: dict[str, Any] = {"engines": ["eager"], "precisions": ["float32"], "batch_sizes": [1]}
    benchmark(folder, seconds=0.0, **options)
    assert "eager, float32: batch size 1\n" in capsys.readouterr().err
    benchmark(folder, seconds=0.0, quiet=True, **options)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engines": []}, r"engines must be one or more of eager, .*, got \[\]"),
        ({"precisions": []}, r"precisions must be one or more of float32, .*, got \[\]"),
        ({"output": "."}, "output must be a file, got the folder"),
        ({"plot": "."}, "plot must be a file, got the folder"),
        (
            {"engines": ["tensorrt"]},
            "engines must be of eager, packed, compile, onnx, openvino, got 'tens",
        ),
        ({"plot": "speed.foo"}, "plot must end in .png or .svg, got speed.foo"),
        ({"align": 8}, "align is for dense models, got 8 with the sparse model"),
        ({"img_size": 48}, "img_size is for timm's names, got it with "),
        ({"weights": "x.pth"}, "weights go with a timm name, not with .*, got x.pth"),
        ({"precisions": ["float32", "float16"]}, "'eager' does not compute in float16 here"),
        ({"precisions": ["int4"]}, "precisions must be of float32, bfloat16, float16, got 'int4'"),
        ({"engines": ["onnx"], "precisions": ["bfloat16"]}, "'onnx' does not compute in bfloat16"),
        ({"batch_sizes": [0]}, r"batch_sizes must be 1 or more, got \[0\]"),
        ({"batch_sizes": []}, r"batch_sizes must be 1 or more, got \[\]"),
        ({"seconds": -1.0}, "seconds must be 0 or more, got -1.0"),
        ({"device": "gpu"}, "device must be one of cpu.* here, got 'gpu'"),
        ({"device": "mps"}, "device must be one of cpu.* here, got 'mps'"),
        ({"device": "cuda:99"}, r"device must be one of cpu.* here, got 'cuda:99'"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    options: dict[str, Any], message: str, folder: str
) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark(folder, **options)


def test_images_smaller_than_a_patch_are_refused() -> None:
    with pytest.raises(ValueError, match="img_size must be at least the size of a patch, got 7"):
        benchmark("vit_tiny_patch16_224", img_size=7, pretrained=False)


def test_a_ratio_is_refused_before_a_model_is_looked_for() -> None:
    with pytest.raises(ValueError, match=r"keep_ratio must .* got 1\.5"):
        benchmark("no_such_model", keep_ratio=1.5)


def test_on_a_processor_without_bfloat16(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name it is refused before a model is looked for; by default it is left out."""
    monkeypatch.setattr(engines, "has_bfloat16", lambda: False)
    message = "this processor has no bfloat16, got it for engine 'eager'"
    with pytest.raises(ValueError, match=message):
        benchmark("no_such_model", engines=["eager"], precisions=["bfloat16"])
    result = benchmark(folder, engines=["eager"], batch_sizes=[1], seconds=0)
    assert [item["precision"] for item in result["measurements"]] == ["float32"]
    engines.check_engine("eager", "bfloat16", "cuda")


def test_engines_of_the_cpu_are_refused_on_a_gpu() -> None:
    with pytest.raises(ValueError, match="'onnx' computes on the CPU here, got device 'cuda'"):
        engines.check_engine("onnx", "float32", "cuda")
    engines.check_engine("compile", "float16", "cuda")
    with pytest.raises(ValueError, match="'compile' does not compute in float16 here"):
        engines.check_engine("compile", "float16")


def test_more_shapes_are_compiled_than_torch_compiles_one_function_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All models of a class share the code that torch counts compilations of."""
    compile = torch.compile

    def only_trace(model: Any, fullgraph: bool, dynamic: bool, options: dict[str, Any]) -> Any:
        return compile(model, fullgraph=fullgraph, dynamic=dynamic, backend="eager")

    monkeypatch.setattr(torch, "compile", only_trace)
    sparse = _sparse()
    for fused in (True, False):
        run = engines.build(sparse, "compile", "float32", fused)
        for batch in range(1, 6):
            images = torch.randn(batch, 3, 32, 32)
            torch.testing.assert_close(run(images), sparse(images), atol=1e-4, rtol=1e-4)


def test_an_engine_that_is_not_installed_names_the_extra(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "installed", lambda engine: engine in ("eager", "compile"))
    with pytest.raises(ValueError, match=r"'onnx' needs the extra: pip install 'dynamicvit\[exp"):
        benchmark(folder, engines=["onnx"])
