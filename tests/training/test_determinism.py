from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.data import Mixup
from timm.layers import DropPath

from dynamicvit.training.determinism import (
    Draws,
    EpochOrder,
    KeyedDropPath,
    Layout,
    key_drop_paths,
)
from tests.conftest import tiny_vit

CPU = torch.device("cpu")


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_a_global_batch_is_divided_without_gap_or_overlap(
    batch: int, processes: int, accumulate: int
) -> None:
    """In the order in which accelerate deals batches out: process by process."""
    rows = [
        row
        for micro in range(accumulate)
        for rank in range(processes)
        for row in range(100)[Layout(batch, processes, accumulate, rank).rows(micro)]
    ]
    assert rows == list(range(Layout(batch, processes, accumulate, 0).total))


@given(st.integers(1, 30), st.integers(1, 8), st.data())
def test_an_epoch_is_a_permutation_that_can_be_entered_anywhere(
    images: int, batch: int, data: st.DataObject
) -> None:
    order = EpochOrder(images, seed=3)
    order.seek(2, 0, 1)
    whole = list(order)
    assert sorted(whole) == list(range(images))
    seen = data.draw(st.integers(0, images))
    order.seek(2, seen, batch)
    rest = list(order)
    assert len(rest) == len(order) == (images - seen) // batch * batch
    assert rest == whole[seen : seen + len(rest)]


def test_an_epoch_may_take_some_images_and_others_the_next_time() -> None:
    order = EpochOrder(50, seed=3, length=20)
    epochs = []
    for epoch in range(2):
        order.seek(epoch, 0, 6)
        epochs.append(list(order))
        assert len(order) == 18 == len(set(epochs[-1]))
    assert set(epochs[0]) != set(epochs[1])
    assert max(epochs[0]) >= 20, "not the first ones, which are all of one class"
    order.seek(0, 6, 6)
    assert list(order) == epochs[0][6:]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        order = EpochOrder(50, seed)
        order.seek(epoch, 0, 1)
        orders.append(tuple(order))
    assert len(set(orders)) == 3


def _draws(batch: int, processes: int, accumulate: int, rank: int, seed: int = 5) -> Draws:
    return Draws.of_step(Layout(batch, processes, accumulate, rank), seed, 2, 7, 3, CPU)


def test_draws_follow_from_a_sample_s_place() -> None:
    whole = _draws(8, 1, 1, 0).apply(0, _paths())["noise"]
    parts = [
        _draws(2, 2, 2, rank).apply(micro, _paths())["noise"]
        for micro in range(2)
        for rank in range(2)
    ]
    for stage in range(2):
        assert whole[stage].shape == (8, 7)
        assert torch.equal(whole[stage], torch.cat([part[stage] for part in parts]))
    assert not torch.equal(whole[0], whole[1])
    other = _draws(8, 1, 1, 0, seed=6).apply(0, _paths())["noise"]
    assert not torch.equal(whole[0], other[0])


def _paths() -> list[KeyedDropPath]:
    return [KeyedDropPath(0.3).train() for _ in range(3)]


def test_a_keyed_drop_path_drops_whole_samples_at_its_rate() -> None:
    path = KeyedDropPath(0.3).train()
    path.noise = torch.arange(10) / 10
    out = path(torch.ones(10, 4, 2))
    assert torch.equal(out[:7], torch.full((7, 4, 2), 1 / 0.7))
    assert torch.equal(out[7:], torch.zeros(3, 4, 2))
    assert torch.equal(path.eval()(torch.ones(10, 4, 2)), torch.ones(10, 4, 2))


def test_drop_paths_of_a_model_are_replaced_where_they_drop() -> None:
    model = tiny_vit(drop_path_rate=0.2).train()
    before = [m for m in model.modules() if type(m) is DropPath]
    found = key_drop_paths(model)
    assert [path.drop_prob for path in found] == [path.drop_prob for path in before]
    assert len(found) == 2 * 3, "the first block's rate is 0"
    assert not any(type(module) is DropPath for module in model.modules())
    images = torch.randn(4, 3, 32, 32)
    for path in found:
        path.noise = torch.zeros(4)
    kept = model(images)
    found[0].noise = torch.tensor([0.0, 0.999, 0.0, 0.0])
    changed = (model(images) != kept).any(dim=1)
    assert changed.tolist() == [False, True, False, False]


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0)])
def test_mixup_mixes_neighbours_whatever_the_number_of_processes(
    alphas: tuple[float, float],
) -> None:
    mixup = Mixup(*alphas, num_classes=8, label_smoothing=0.0)
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8)
    whole = _draws(8, 1, 1, 0)
    mixed, targets = whole.mix(mixup, images.clone(), labels)
    for start in range(0, 8, 2):
        pair = slice(start, start + 2)
        part, part_targets = _draws(2, 4, 1, start // 2).mix(mixup, images[pair], labels[pair])
        assert torch.equal(part, mixed[pair])
        assert torch.equal(part_targets, targets[pair])
    shares = targets[range(8), labels]
    assert torch.allclose(shares, shares[0])
    assert 0 < shares[0] < 1, "nothing was mixed"
    assert torch.allclose(targets[range(8), labels ^ 1], 1 - shares)
    np.random.seed(0)
    again, _ = whole.mix(mixup, images.clone(), labels)
    assert torch.equal(again, mixed), "numpy's own state must not matter"
