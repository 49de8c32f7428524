"""Rows that are fetched ahead are those that the minibatch would have found, in whatever order the device works."""

import contextlib
from unittest import mock

import pytest
import torch
from emulated_device import EmulatedDevice, current
from small_models import CLASSES, conv_bn
from torch.utils._python_dispatch import _disable_current_modes

from bt_fast import PGD, BulletTrain, HalfDrawn, Memory, Plan, TRADESLoss, memory_rows, ops
from bt_fast import memory as memory_module

SAMPLES, SHAPE = 8, (1, 6, 6)
MINIBATCHES = [(0, 1, 2), (2, 3, 4), (4, 2, 0), (5, 6, 7), (1, 6, 2), (0, 1, 2), (2, 1, 0), (2, 1, 0)]


@pytest.fixture(autouse=True)
def rows_are_copied():
    with mock.patch.object(Memory, "_apart", return_value=True):
        yield


def batch(numbers):
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(SAMPLES, *SHAPE, generator=g), torch.arange(SAMPLES) % CLASSES
    numbers = torch.tensor(numbers)
    return x[numbers], y[numbers], numbers


def trained(ahead, between=lambda memory: None, **options):
    """The losses of the minibatches, and what is remembered at their end; `ahead` gives a call's indices."""
    torch.manual_seed(0)
    memory = Memory(SAMPLES, storage="host", dtype=torch.float32, **options)
    mining = BulletTrain(1, HalfDrawn(1, attacked="half"), 0)
    criterion, network = TRADESLoss(PGD(0.1, 0.1, 1), mining=mining, memory=memory), conv_bn(momentum=0.0)
    losses, given = [], None
    for step, numbers in enumerate(MINIBATCHES):
        x, y, indices = batch(numbers)
        indices = indices if given is None else given
        loss = criterion(network, x, y, indices=indices, generator=torch.Generator().manual_seed(step))
        following = torch.tensor(MINIBATCHES[(step + 1) % len(MINIBATCHES)])
        given = ahead(memory, following)
        if step == 4:
            between(memory)
        loss.backward()
        losses.append(loss.detach())
    memory.settle()
    return [*losses, memory.perturbations, memory.written, memory.clock, *(p.grad for p in network.parameters())]


def not_ahead(memory, following):
    return None


def ahead(memory, following):
    return memory.prefetch(following)


def of_others(memory, following):
    memory.prefetch((following + 1) % SAMPLES)


def changed(memory, following):
    given = memory.prefetch(following.flip(0))
    given.copy_(following)
    return given


def ahead_of_a_further_one(memory, following):
    memory.prefetch(torch.tensor([7, 0]))
    return memory.prefetch(following)


def reloaded(memory):
    memory.load_state_dict(memory.state_dict())


def test_what_is_fetched_ahead_changes_no_bit():
    expected = trained(not_ahead)
    for way in (ahead, of_others, changed, ahead_of_a_further_one):
        assert all(torch.equal(a, b) for a, b in zip(trained(way), expected, strict=True)), way


@pytest.mark.parametrize("between", [Memory.reset, reloaded])
def test_nor_does_it_where_all_is_forgotten_or_loaded_meanwhile(between):
    options = {"reset_after": 0.5, "share": torch.arange(SAMPLES)}
    results = [trained(way, between, **options) for way in (not_ahead, ahead)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_it_may_be_of_a_minibatch_after_the_next():
    kept = []
    for fetches in (False, True):
        torch.manual_seed(0)
        memory = Memory(SAMPLES, storage="host")
        criterion, network = TRADESLoss(PGD(0.1, 0.1, 1), memory=memory), conv_bn(momentum=0.0)
        given = {}
        for step, numbers in enumerate([(0, 1, 2), (2, 3, 5), (2, 3, 4)]):
            x, y, indices = batch(numbers)
            indices = given.get(step, indices)
            criterion(network, x, y, indices=indices, generator=torch.Generator().manual_seed(step))
            if fetches and step == 0:
                given[2] = memory.prefetch(torch.tensor((2, 3, 4)))
        memory.settle()
        kept.append(memory.perturbations)
    assert torch.equal(*kept)


def test_rows_are_fetched_once_and_those_of_both_minibatches_again():
    gathered = []

    def counted(stored, numbers, pinned, gather=memory_rows.gathered):
        gathered.append(len(numbers))
        return gather(stored, numbers, pinned)

    with mock.patch.object(memory_rows, "gathered", counted):
        trained(ahead)
    # the first minibatch makes the memory; then all of the next, and those that the one before is still writing
    assert gathered == [3, 3, 1, 3, 2, 3, 3, 1, 3, 2, 3, 3, 3, 3, 3]


def test_it_does_nothing_where_there_is_nothing_to_copy():
    memory, numbers = Memory(SAMPLES, storage="host"), torch.tensor([0, 1])
    assert memory.prefetch(numbers) is numbers
    criterion = TRADESLoss(PGD(0.1, 0.1, 1), memory=memory)
    x, y, indices = batch((0, 1))
    criterion(conv_bn(), x, y, indices=indices)
    with mock.patch.object(Memory, "_apart", return_value=False):
        assert memory.prefetch(numbers) is numbers
    assert memory._fetched is None


def test_indices_are_checked_before_anything_is_copied():
    memory = Memory(SAMPLES, storage="host")
    x, y, indices = batch((0, 1))
    TRADESLoss(PGD(0.1, 0.1, 1), memory=memory)(conv_bn(), x, y, indices=indices)
    for wrong, message in (([0, 8], r"indices must lie in 0..7"), ([3, 3], r"indices must be all different")):
        with pytest.raises(ValueError, match=message):
            memory.prefetch(torch.tensor(wrong))
    for other in (torch.tensor([0.5, 1.0]), [0, 1]):
        with pytest.raises(TypeError, match=r"^indices must be"):
            memory.prefetch(other)
    with pytest.raises(ValueError, match=r"^indices must have shape"):
        memory.prefetch(torch.tensor(3))
    assert memory._fetched is None


# On a GPU


class EmulatedCopy:
    """`HostCopy` on the emulated device: a copy there, for whose end the host waits."""

    def __init__(self, values):
        self.emulated, self.values = current(), values.clone()
        self.stream, self.work = self.emulated.stream, self.emulated.stream.last

    def wait(self):
        self.emulated.host_waits_for[self.stream] = self.work
        return self.values


def by_the_host(function):
    """What the host computes is no work of the device."""

    def run(*given, **named):
        with _disable_current_modes():
            return function(*given, **named)

    return run


def settled(memory):
    """`Memory.settle`, in which the host waits and then writes."""
    if memory._arriving is not None:
        (rows, numbers), memory._arriving = memory._arriving, None
        arrived = rows.wait()
        with _disable_current_modes():
            memory.perturbations.index_copy_(0, numbers, arrived)


@contextlib.contextmanager
def on_a_device():
    """Emulates a device whose memory lies on the host: only copies and what the images take part in are its work."""
    with contextlib.ExitStack() as stack:
        emulated = EmulatedDevice()
        stack.enter_context(mock.patch.object(memory_module, "HostCopy", EmulatedCopy))
        stack.enter_context(mock.patch.object(Memory, "settle", settled))
        for place, name in ((memory_rows, "gathered"), (memory_rows, "late"), (memory_module, "rows_of")):
            stack.enter_context(mock.patch.object(place, name, by_the_host(getattr(place, name))))
        stack.enter_context(mock.patch.object(memory_module.faults, "read"))
        stack.enter_context(emulated)
        yield emulated


def attacked(ahead):
    """Recalls, moves and remembers minibatches on an emulated device; returns it with all that it wrote."""
    memory = Memory(SAMPLES, SHAPE, storage="host", dtype=torch.float32)
    memory._allocate(SHAPE, torch.float32)
    seen, given = [], None
    with on_a_device() as emulated:
        for step, numbers in enumerate(MINIBATCHES):
            x, _, indices = batch(numbers)
            recalled = memory.recall(x, indices if given is None else given, None, l2=False)
            limits = ops.Limits(0.1)
            clean, start = ops.recall(x, recalled.rows, recalled.slots, torch.tensor([step, 0]), limits, noise=0.0)
            moved = start + 0.01 * (step + 1)
            memory.remember(recalled, moved, clean, Plan.uniform(len(x), 1, 0.1, x.device), 0.1, l2=False)
            seen += [start, memory._arriving[0].values]
            del recalled
            given = memory.prefetch(torch.tensor(MINIBATCHES[(step + 1) % len(MINIBATCHES)])) if ahead else None
            for _ in range(3):  # the update
                moved = moved * 0.5
        memory.settle()
    return emulated, seen, memory.perturbations


def test_in_every_order_that_cuda_permits_it_is_the_same():
    _, expected, kept = attacked(False)
    emulated, seen, memory = attacked(True)
    assert torch.equal(memory, kept)
    assert len({id(work.stream) for work in emulated.work}) > 1
    for seed in range(200):
        for one, other in zip(emulated.shuffled(seed, seen), expected, strict=True):
            assert torch.equal(one, other)
