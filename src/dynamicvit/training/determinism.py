"""Random numbers keyed by seed, epoch and sample, independent of process layout.

The key of a step is the epoch and the number of images before it. The key of a sample has also its
row of the global batch (the batch of all processes and accumulated micro-batches together). So no
generator's state has to be saved, and runs of one and of many processes draw the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from accelerate import skip_first_batches
from accelerate.utils import set_seed
from timm.data import Mixup
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from dynamicvit.evaluation.data import ImageData, seed_of


class EpochOrder(Sampler[int]):
    """The order of an epoch's images, a permutation that follows from seed and epoch.

    Args:
        images: how many there are.
        seed: of the run.
        length: how many of them an epoch takes, other ones each time; by default all.
    """

    def __init__(self, images: int, seed: int, length: int | None = None) -> None:
        self.images, self.seed, self.length = images, seed, length or images
        self.seek(0, 0, 1)

    def seek(self, epoch: int, seen: int, batch: int) -> None:
        """Go on in `epoch` after `seen` images, while whole batches of `batch` are left."""
        self.epoch, self.start = epoch, seen
        self.stop = seen + max(0, self.length - seen) // batch * batch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, "order", self.epoch))
        order = torch.randperm(self.images, generator=generator)
        yield from order[self.start : self.stop].tolist()

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """How a global batch is divided: into micro-batches, and each of these over the processes.

    Attributes:
        batch: images of one process in a micro-batch.
        processes: how many there are.
        accumulate: micro-batches in a step.
        rank: of this process.
    """

    batch: int
    processes: int
    accumulate: int
    rank: int

    @property
    def total(self) -> int:
        """Images in the global batch."""
        return self.batch * self.processes * self.accumulate

    def rows(self, micro: int) -> slice:
        """Rows of the global batch that are this process's in a micro-batch."""
        start = (micro * self.processes + self.rank) * self.batch
        return slice(start, start + self.batch)


@dataclass
class Feed:
    """The training images that this process gets, in the order that follows from the seed.

    Attributes:
        data: where they come from.
        loader: what loads them, prepared by accelerate.
        order: of the loader; None if the data is read as a stream.
        layout: how a global batch is divided.
        seed: of the run.
    """

    data: ImageData
    loader: DataLoader
    order: EpochOrder | None
    layout: Layout
    seed: int

    @property
    def images(self) -> int:
        """How many an epoch has."""
        return len(self.data.dataset) if self.order is None else self.order.length

    def batches(self, epoch: int, seen: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's micro-batches in `epoch`, after `seen` images of all processes."""
        # What is read as a stream is shuffled by processes that torch's generator seeds.
        set_seed(seed_of(self.seed, "epoch", epoch))
        self.data.set_epoch(self.seed, epoch)
        if self.order is not None:
            self.order.seek(epoch, seen, self.layout.total)
            return iter(self.loader)
        cast(Any, self.loader).set_epoch(epoch)  # accelerate counts epochs by itself, from 0
        skip = seen // (self.layout.batch * self.layout.processes)
        return iter(skip_first_batches(self.loader, skip) if skip else self.loader)


class KeyedDropPath(DropPath):
    """Stochastic depth that draws from `noise`, [B] uniform in [0, 1), where it is given."""

    noise: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.noise is None or not self.training or self.drop_prob == 0.0:
            out: Tensor = super().forward(x)
            return out
        share = 1.0 - self.drop_prob
        kept = (self.noise < share).to(x.dtype)
        if self.scale_by_keep:
            kept = kept / share
        return x * kept.view(-1, *[1] * (x.ndim - 1))


def key_drop_paths(model: nn.Module) -> list[KeyedDropPath]:
    """Replace a model's `DropPath`s that drop anything by keyed ones; returns these, in order."""
    found = []
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is DropPath and child.drop_prob > 0.0:
                keyed = KeyedDropPath(child.drop_prob, child.scale_by_keep)
                setattr(module, name, keyed.train(child.training))
                found.append(keyed)
    return found


@dataclass(frozen=True)
class Draws:
    """What a step draws, for its whole global batch of G images.

    Attributes:
        layout: how the batch is divided.
        seed: of the step.
        keep: [G, S, N] uniform, for keep decisions; S = 0 in dense training.
        paths: [G, D] uniform, for stochastic depth.
        budget: uniform, for the budget of the step.
    """

    layout: Layout
    seed: int
    keep: Tensor
    paths: Tensor
    budget: float = 0.0

    @classmethod
    def of_step(
        cls, layout: Layout, seed: int, stages: int, tokens: int, paths: int, device: torch.device
    ) -> Draws:
        """The draws of the step with this seed: the same for every process."""
        generator = torch.Generator(device=device).manual_seed(seed)
        keep, path = (
            torch.rand(layout.total, *shape, generator=generator, device=device)
            for shape in ((stages, tokens), (paths,))
        )
        budget = float(torch.rand((), generator=torch.Generator().manual_seed(seed)))
        return cls(layout, seed, keep, path, budget)

    def apply(self, micro: int, drop_paths: list[KeyedDropPath]) -> dict[str, Any]:
        """Give a micro-batch's draws to `drop_paths`; returns those for the task.

        What draws from torch's own generators (dropout) is seeded by process.
        """
        set_seed(seed_of(self.seed, micro, self.layout.rank))
        rows = self.layout.rows(micro)
        for module, noise in zip(drop_paths, self.paths[rows].unbind(1), strict=True):
            module.noise = noise
        return {"noise": self.keep[rows].unbind(1)} if self.keep.shape[1] else {}

    def mix(self, mixup: Mixup, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """timm's Mixup of neighbours, which are in one process whatever their number.

        timm mixes row i with row B - 1 - i, at a share that it draws from numpy's generator.
        """
        np.random.seed(self.seed)
        rows = torch.arange(len(images), device=images.device)
        order = torch.cat([rows[::2], rows[1::2].flip(0)])
        mixed, labels = mixup(images[order], targets[order])
        back = order.argsort()
        return mixed[back], labels[back]
