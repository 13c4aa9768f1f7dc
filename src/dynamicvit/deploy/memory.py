"""Memory that a model takes on a CPU, measured in a process that does nothing else."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from dynamicvit.deploy.engines import ENGINES, load, save


def peak_memory(
    model: nn.Module,
    engine: str,
    precision: str,
    shape: tuple[int, ...],
    fused_attention: bool = True,
) -> float | None:
    """The most resident memory of a process that runs the model, minus that after its imports.

    This counts weights, activations, and the engine's own memory, also that of a compiler.

    Args:
        model, engine, precision, fused_attention: as for `dynamicvit.deploy.engines.build`.
        shape: of the images, [B, C, H, W].

    Returns:
        10⁶ bytes. None on systems other than Linux, or if the process cannot read the model, such
        as one whose class is in the caller's script.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = save(model, engine, precision, Path(folder), fused_attention)
        numbers = map(str, (torch.get_num_threads(), *shape))
        command = [sys.executable, "-m", __name__, str(path), engine, precision, *numbers]
        done = subprocess.run(command, capture_output=True, text=True)
        return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def resident(field: str = "VmHWM") -> float | None:
    """A line of Linux's /proc/self/status in 10⁶ bytes: most memory resident so far, or VmRSS, what
    is now; None on other systems."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next(
        int(line.split()[1]) * 1024 / 1e6 for line in status.splitlines() if line.startswith(field)
    )


def _main() -> None:
    path, engine, precision, threads, *shape = sys.argv[1:]
    torch.set_num_threads(int(threads))
    images = torch.zeros([int(size) for size in shape])
    for package in ENGINES[engine][0]:
        importlib.import_module(package)
    before = resident()
    run = load(Path(path), engine, precision)
    for _ in range(2):
        run(images)
    after = resident()
    if before is None or after is None:
        raise SystemExit("this system does not tell how much memory is resident")
    print(after - before)


if __name__ == "__main__":
    _main()
