"""Write measured numbers into README and docs, between markers that name them.

    python tools/write_numbers.py            # make numbers
    python tools/write_numbers.py --check    # change nothing; exit with 1 if a page is out of date

A page marks a table or a figure with `<!-- NAME -->` and `<!-- /NAME -->`. Everything between the
two is written here, from the files in benchmarks/results. Multiply-adds are counted anew.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch

from benchmarks.tables import markdown, minus, tables
from dynamicvit import count_gmacs, sparsify
from dynamicvit.io.files import write_text

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
MARKED = re.compile(r"<!-- (?P<name>\w[\w -]*) -->(?P<body>.*?)<!-- /(?P=name) -->", re.DOTALL)
# One marker without the other would leave a figure that nobody writes.
MARKER = re.compile(r"<!-- /?(\w[\w -]*) -->")


@cache
def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def deit() -> str:
    """README's first table: what DeiT-S gains."""
    published = _published_rows()["deit_small_patch16_224"]
    result = _read("speed_deit_small_openvino.json")
    dense, sparse = result["gmacs"]["dense"], result["gmacs"]["sparse"]
    rows = [
        ["GMACs an image", f"{dense:.2f}", f"{sparse:.2f} ({minus(sparse / dense - 1, '.0%')})"]
    ]
    for item in result["measurements"]:
        if item["precision"] == "float32" and item["batch_size"] in (1, 16):
            rows.append(
                [
                    f"images a second, batch {item['batch_size']}",
                    f"{item['dense']:.1f}",
                    f"{item['sparse']:.1f} ({item['speed_up']:.2f}×)",
                ]
            )
    rows.append(
        ["top-1 on ImageNet, from the paper"]
        + [f"{published[ratio]['top1']}%" for ratio in ("dense", "0.7")]
    )
    return markdown(("DeiT-S", "dense", "sparse, keep ratio 0.7"), rows)


def quickstart() -> str:
    """What the quickstart's models have."""
    result = _read("quickstart.json")
    names = {"dense": "dense", "sparse": "**sparse**", "random_selection": "random tokens leave"}
    return markdown(
        ("embedded model", "top-1", "GMACs", "patch tokens"),
        [
            [
                name,
                f"{result[key]['top1']:.2f}%",
                f"{result[key]['gmacs']:.3f}",
                _tokens(result[key]["tokens"]),
            ]
            for key, name in names.items()
        ],
    )


def quickstart_speed() -> str:
    return markdown(
        ("batch", "dense → sparse, images/s", "speed-up"),
        [
            [str(item["batch_size"]), _rates(item["dense"], item["sparse"]), _speed_up(item)]
            for item in _read("quickstart.json")["speed"]
        ],
    )


def quickstart_deviation() -> str:
    """The standard deviation of the dense model's accuracy on so many images, in points."""
    result = _read("quickstart.json")["dense"]
    share = result["top1"] / 100
    return f"{100 * (share * (1 - share) / result['images']) ** 0.5:.1f}"


def quickstart_machine() -> str:
    result = _read("quickstart.json")
    return f"{_machine(result)}; {result['seconds']:.0f} seconds for everything"


def embedded_model() -> str:
    [measured] = _read("embedded_model.json").values()
    return f"{measured['top1']:.2f}%"


def _published_rows() -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    text = (ROOT / "benchmarks" / "published.json").read_text(encoding="utf-8")
    for row in json.loads(text)["rows"]:
        found.setdefault(row["model"], {})[row["keep_ratio"]] = row
    return found


def published() -> str:
    """What was published, beside what we count."""
    lines = []
    for name, rows in _published_rows().items():
        with torch.device("meta"):
            dense = timm.create_model(name)
            for ratio, row in rows.items():
                model = dense if ratio == "dense" else sparsify(dense, float(ratio))
                gmacs = f"{count_gmacs(model, (3, 224, 224)):.2f}"
                lines.append([f"`{name}`", ratio, row["top1"], row["gmacs"], gmacs])
    head = ("model", "keep ratio", "top-1, published", "GMACs, published", "GMACs, counted here")
    return markdown(head, lines)


def compared() -> str:
    """What `dynamicvit compare` found of the comparison's model."""
    found = _read("small/compare/compare.json")
    low, high = (minus(-end, "+.2f") for end in reversed(found["interval"]))
    worst, best = found["classes"][0], found["classes"][-1]
    lines = [
        ["images", f"{found['images']:,}"],
        ["dense and pruned agree", f"{found['agreement']:.2f}%"],
        ["from right to wrong", str(found["right_to_wrong"])],
        ["from wrong to right", str(found["wrong_to_right"])],
        ["pruned against dense, points", minus(-found["points_lost"], "+.2f")],
        ["its 95% interval", f"{low} to {high}"],
        *(
            [f"class that {verb} most", f"{row['name']} ({minus(-row['points_lost'], '+.1f')})"]
            for verb, row in (("loses", worst), ("gains", best))
        ),
        *(
            [f"{pair['dense']} becomes {pair['sparse']}", f"{pair['images']}, {right}"]
            for pair in found["confusion"][:3]
            for right in [f"{pair['sparse_right']} of them right"]
        ),
        [
            "kept tokens that one mask for all images would keep, by stage",
            ", ".join(f"{share:.0f}%" for share in found["static_share"]),
        ],
    ]
    return markdown(("learned selection at 0.7", ""), lines)


def compare_interval() -> str:
    """Half the length of the 95% interval of the difference, in points."""
    low, high = _read("small/compare/compare.json")["interval"]
    return f"{(high - low) / 2:.1f}"


def speed() -> str:
    """OpenVINO, the engine in which dense models are fastest."""
    files = {
        "DeiT-S": "speed_deit_small_openvino.json",
        "DeiT-S, align 16": "speed_deit_small_align16.json",
        "LV-ViT-S": "speed_lvvit_small.json",
        "DeiT-S, align 16, 384 px": "speed_deit_small_384.json",
        "DeiT-S, align 16, 512 px": "speed_deit_small_512.json",
    }
    return markdown(
        ("model", "precision", "batch", "dense → pruned, images/s", "speed-up", "efficiency"),
        [
            [
                *(model, item["precision"], str(item["batch_size"])),
                *(_rates(item["dense"], item["sparse"]), _speed_up(item)),
                f"{item['efficiency']:.2f}",
            ]
            for model, file in files.items()
            for item in _read(file)["measurements"]
            if item["engine"] == "openvino"
        ],
    )


def speed_ideal() -> str:
    """What multiply-adds promise."""
    named = {"DeiT-S": "speed_deit_small.json", "LV-ViT-S": "speed_lvvit_small.json"}
    return " and ".join(
        f"{_read(file)['ideal_speed_up']:.2f}× for {model}" for model, file in named.items()
    )


def align_cost() -> str:
    """Multiply-adds that `align=16` adds to DeiT-S."""
    files = ("speed_deit_small_align16.json", "speed_deit_small_openvino.json")
    aligned, published = (_read(file)["gmacs"]["sparse"] for file in files)
    return f"{aligned / published - 1:.1%}"


def engines(file: str = "speed_deit_small.json") -> str:
    head = ("engine", "precision", "batch", "dense → pruned, images/s", "speed-up", "efficiency")
    return markdown(
        (*head, "peak MB"),
        [
            [
                *(item["engine"], item["precision"], str(item["batch_size"])),
                *(_rates(item["dense"], item["sparse"]), _speed_up(item)),
                f"{item['efficiency']:.2f}",
                " → ".join(f"{megabytes:.0f}" for megabytes in item["peak_mb"] or ()),
            ]
            for item in _read(file)["measurements"]
        ],
    )


def packed() -> str:
    return engines("speed_deit_small_packed.json")


def profile() -> str:
    """Operations that take a third of a millisecond or more, the largest first."""
    rows = sorted(
        _read("profile_openvino.json")["milliseconds"],
        key=lambda row: (row["precision"] != "float32", -row["dense"]),
    )
    return markdown(
        ("precision", "operation", "dense → pruned, ms"),
        [
            [row["precision"], row["operation"], f"{row['dense']:.2f} → {row['pruned']:.2f}"]
            for row in rows
            if row["dense"] >= 0.3
        ],
    )


def fastest() -> str:
    def form(side: Mapping[str, Any]) -> str:
        attention = f", {side['attention']} attention" if side["attention"] else ""
        return f"{side['engine']}, {side['precision']}{attention}"

    return markdown(
        ("batch", "pruned counts", "dense", "pruned", "images/s", "speed-up"),
        [
            [
                *(str(row["batch_size"]), row["schedule"], form(row["dense"]), form(row["sparse"])),
                _rates(row["dense_images_per_second"], row["sparse_images_per_second"]),
                _speed_up(row),
            ]
            for row in _read("fastest.json")["rows"]
        ],
    )


def exports() -> str:
    def share(value: float) -> str:
        return f"{value:.2f}%"

    lines = []
    for row in _read("export_quickstart.json")["exports"]:
        found = row["agreement"]
        lines.append(
            [
                *(row["format"], row["precision"], f"{row['megabytes']:.1f}"),
                f"{found['max_difference']:.2g} of {found['largest_logit']:.0f}",
                *(share(found["top1_agreement"]), share(found["kept_agreement"])),
                " → ".join(map(share, found["accuracy"])),
            ]
        )
    head = ("format", "precision", "MB", "largest difference of a logit", "same class")
    return markdown((*head, "same tokens", "top-1, PyTorch → file"), lines)


def training_step() -> str:
    return _steps(_read("training_step.json")["steps"])


def gpu_step() -> str:
    return _steps(_read("gpu.json")["training"]["steps"])


def gpu() -> str:
    """Speed-ups of each model, engine and batch size that were measured, by keep ratio."""
    rows: dict[tuple[str, str, int], dict[Any, Any]] = {}
    for item in _read("gpu.json")["inference"]:
        if item["align"] is None:
            key = (item["model"], item["engine"], item["batch_size"])
            rows.setdefault(key, {"dense": item["dense"]})[item["keep_ratio"]] = (
                f"{item['speed_up']:.2f}× ({item['efficiency']:.2f})"
            )
    ratios = (0.9, 0.7, 0.5)
    return markdown(
        ("model", "engine", "batch", "dense, images/s", *map(str, ratios)),
        [
            [
                model,
                engine,
                str(batch),
                f"{found['dense']:.0f}",
                *(found.get(r, "") for r in ratios),
            ]
            for (model, engine, batch), found in sorted(rows.items())
        ],
    )


def gpu_per_image() -> str:
    return markdown(
        ("model", "batch", "fixed counts, images/s", "a budget for each image"),
        [
            [row["model"], str(row["batch_size"]), f"{row['fixed']:.0f}", f"{row['per_image']:.0f}"]
            for row in _read("gpu.json")["per_image"]
        ],
    )


def gpu_name() -> str:
    return str(_read("gpu.json")["environment"]["gpu"])


def training_gradients() -> str:
    """The largest difference between gradients of our step and the reference."""
    compared = _read("training_step.json")["gradients"].values()
    return f"{max(side['largest_error'] for sides in compared for side in sides.values()):.0e}"


def training_cost() -> str:
    """What the guide's own code counts."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    found: dict[str, Any] = {}
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    with redirect_stdout(None):
        exec(code, found)
    teacher = count_gmacs(found["dense"], (3, 224, 224))
    parameters = sum(parameter.numel() for parameter in found["student"].parameters())
    return markdown(
        ("DeiT-S at 0.7", ""),
        [
            ["teacher, forward, GMACs an image", f"{teacher:.2f}"],
            ["student, forward, all tokens present", f"{found['gmacs']['forward'] - teacher:.2f}"],
            ["a training step", f"{found['gmacs']['step']:.2f}"],
            ["30 epochs of ImageNet, million GMACs", f"{found['total'] / 1e6:.0f}"],
            ["a checkpoint, MB", f"{16 * parameters / 1e6:.0f}"],
        ],
    )


def _steps(rows: Iterable[Mapping[str, Any]]) -> str:
    return markdown(
        ("step", "precision", "batch", "images/s", "speed-up", "peak MB"),
        [
            [
                *(row["side"], row["precision"], str(row["batch_size"])),
                *(f"{row['images_per_second']:.1f}", _speed_up(row), f"{row['peak_mb']:.0f}"),
            ]
            for row in rows
        ],
    )


def _tokens(counts: Iterable[int]) -> str:
    return " → ".join(map(str, counts))


def _rates(dense: float, sparse: float) -> str:
    return f"{dense:.1f} → {sparse:.1f}"


def _speed_up(item: Mapping[str, Any]) -> str:
    low, high = item["spread"]
    return f"{item['speed_up']:.2f}× ({low:.2f}–{high:.2f})"


def _machine(result: Mapping[str, Any]) -> str:
    found = result["environment"]
    torch_version = found["torch"].split("+")[0]
    return f"{found['processor']}, {found['threads']} threads, torch {torch_version}"


def _accuracy() -> dict[str, Callable[[], str]]:
    """The tables of benchmarks/accuracy.py, by scale and name."""
    files = {
        "small": "accuracy.json",
        "full": "accuracy_full.json",
        "cluttered": "accuracy_cluttered.json",
    }
    return {
        f"{scale} {name}": lambda table=table: table  # type: ignore[misc]
        for scale, file in files.items()
        for name, table in tables(_read(file)["rows"]).items()
    }


def _machines() -> dict[str, Callable[[], str]]:
    """The machine of each result, by the file's name."""
    return {
        f"machine {path.stem}": lambda path=path: _machine(_read(path.name))  # type: ignore[misc]
        for path in RESULTS.glob("*.json")
        if path.stem != "embedded_model"
    }


NUMBERS: dict[str, Callable[[], str]] = {
    "deit": deit,
    "quickstart": quickstart,
    "quickstart speed": quickstart_speed,
    "quickstart machine": quickstart_machine,
    "embedded model": embedded_model,
    "published": published,
    "compare": compared,
    "speed": speed,
    "speed ideal": speed_ideal,
    "engines": engines,
    "packed": packed,
    "gpu": gpu,
    "gpu name": gpu_name,
    "gpu per image": gpu_per_image,
    "gpu step": gpu_step,
    "profile": profile,
    "fastest": fastest,
    "exports": exports,
    "training step": training_step,
    "training cost": training_cost,
    "training gradients": training_gradients,
    "align cost": align_cost,
    "quickstart deviation": quickstart_deviation,
    "compare interval": compare_interval,
    **_accuracy(),
    **_machines(),
}


def written(text: str) -> str:
    """A page with what its markers name, as it is now.

    Raises:
        ValueError: a marker names nothing, has no partner, or stands before a figure at the start
            of a line, where Markdown takes the line for HTML.
    """

    def fill(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in NUMBERS:
            raise ValueError(f"markers must name one of {', '.join(NUMBERS)}, got {name!r}")
        number = NUMBERS[name]()
        if "\n" in number:  # Markdown wants empty lines around a table
            number = f"\n\n{number}\n\n"
        elif found.string[: found.start()].rpartition("\n")[2].strip() == "":
            raise ValueError(f"a figure's marker must not begin a line, got {name!r}")
        return f"<!-- {name} -->{number}<!-- /{name} -->"

    alone = MARKER.search(MARKED.sub("", text))
    if alone:
        raise ValueError(f"markers must be pairs, got {alone[0]!r} alone")
    return MARKED.sub(fill, text)


def main(arguments: list[str]) -> int:
    """Write the pages; with `--check`, name those that are out of date and return 1."""
    if arguments not in ([], ["--check"]):
        sys.exit(__doc__)
    outdated = 0
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        try:
            new = written(old)
        except ValueError as error:
            sys.exit(f"{page.relative_to(ROOT)}: {error}")
        if new != old:
            outdated += 1
            if arguments:
                print(f"{page.relative_to(ROOT)} is out of date: make numbers")
            else:
                write_text(page, new)
                print(f"wrote {page.relative_to(ROOT)}")
    return int(bool(arguments and outdated))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
