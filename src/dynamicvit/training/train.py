"""train(): set up a run, fit, validate."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import timm
from rich.console import Console

from dynamicvit.evaluation.accuracy import Evaluation
from dynamicvit.evaluation.console import plain
from dynamicvit.training.config import TrainConfig, choose_batch
from dynamicvit.training.distributed import lost_process_named, on_first_process
from dynamicvit.training.loop import fit
from dynamicvit.training.phases import needs_dense_training, train_dense, warm_start
from dynamicvit.training.run import Run, Session
from dynamicvit.training.run_folder import BEST, folder_locked
from dynamicvit.training.setup import check_new_run, load_dense, open_session, prepare, start


def train(config: TrainConfig, resume: bool = False, quiet: bool = False) -> Evaluation:
    """Train a sparse model from a dense one, or a dense model.

    It works in one process and with `accelerate launch`, `torchrun` and `srun`. It makes this
    process flush denormal numbers to zero, on CPUs that can.

    On SIGTERM it writes a checkpoint at the end of the step, and the process exits with 143. During
    validation, it does so after the next step; the last validation is finished. A second SIGTERM
    ends the process at once. So does the first one during a warm start, whose steps are not kept.

    Args:
        config: what to train, on what, how.
        resume: go on from the last whole checkpoint in `config.output` (from the start, if the run
            was stopped before its first one), with any number of processes. A complete run is
            validated again. On the command line, options that are not given are those of the run.
            Without resume, a folder that holds a run is refused.
        quiet: print nothing, neither results nor progress.

    Returns:
        The evaluation after the last epoch (of the moving average, if there is one).

    Raises:
        ValueError, FileNotFoundError: naming what is wrong with the config, data or checkpoint; or
            that losses were not finite, `config.max_skipped` steps in a row.
        OSError: naming the file that cannot be written.
        ConnectionError: if another process of the run was lost.
        SystemExit: after SIGTERM.
    """
    output = Path(config.output)
    if not resume:
        check_new_run(output)
    with lost_process_named(f"start them again with --resume, to go on from {output}"):
        session = open_session(config, quiet)
        images = len(cast(Any, session.train_data.dataset))
        config = choose_batch(config, images, session.accelerator.num_processes)
        with _locked(output):
            dense = load_dense(config)
            if needs_dense_training(config, dense, session.train_data.class_names):
                dense = train_dense(config, session, dense, resume)
            else:
                _warn_of_fresh_weights(config)
            ready = prepare(config, session, dense, resume)
            if ready.checkpoint is None:
                warm_start(ready)
            run = start(ready)
            evaluation = fit(run)
            _tell_images_met(session)
            _tell_best(run)
    return evaluation


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Inside, no other run can use the folder. The first process holds the lock for all."""
    with ExitStack() as stack:
        on_first_process(lambda: stack.enter_context(folder_locked(output)))
        yield


def _tell_best(run: Run) -> None:
    """Where the best model is, and the command that evaluates it."""
    config, best, console = run.config, str(run.output / BEST), run.session.console
    command = ["dynamicvit", "evaluate", best, "--data", config.data]
    command += ["--data_dir", config.data_dir] if config.data_dir is not None else []
    command += ["--split", config.val_split] if config.val_split != "val" else []
    text = f"best model: {best}, top-1 {run.best:.2f}%\nto evaluate it: {shlex.join(command)}"
    console.print(plain(text), markup=False, highlight=False, soft_wrap=True)


def _warn_of_fresh_weights(config: TrainConfig) -> None:
    fresh = not config.pretrained and config.weights is None and timm.is_model(config.model)
    if config.sparse and fresh:
        Console(stderr=True).print("warning: pretrained is false, so the teacher is untrained")


def _tell_images_met(session: Session) -> None:
    for name, images in (("training", session.train_data), ("validation", session.val_data)):
        for what, met in (
            (f"{name} images", images.describe_met()),
            (f"unreadable {name} images", images.describe_unreadable()),
        ):
            if met not in (None, "0"):
                session.console.print(f"{what} met: {met}", markup=False, soft_wrap=True)
