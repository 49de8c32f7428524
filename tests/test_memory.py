"""What a memory holds, forgets, saves and refuses."""

import copy
import math
import pickle
from unittest import mock

import pytest
import torch
from pretended_device import DEVICE, pretended_device
from small_models import CLASSES, conv_bn
from tolerances import assert_near

from bt_fast import APGD, AWP, PGD, BulletTrain, MARTLoss, Memory, PGDLoss, Placement, Plan, TRADESLoss, ops

SAMPLES, SHAPE = 6, (1, 6, 6)
ATTACK = PGD(0.1, 0.02, 10)


def batch(*numbers, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.rand(SAMPLES, *SHAPE, generator=g), torch.arange(SAMPLES) % CLASSES
    numbers = torch.tensor(numbers)
    return x[numbers], y[numbers], numbers


def model():
    torch.manual_seed(0)
    return conv_bn(momentum=0.0)  # so that a later call of another copy attacks the same network


def trained(memory, *minibatches, kind=TRADESLoss, of=None, **options):
    """Calls a loss with a memory on minibatches of these samples."""
    criterion, network = kind(ATTACK, memory=memory, **options), of or model()
    for numbers in minibatches:
        x, y, indices = batch(*numbers)
        criterion(network, x, y, indices=indices, generator=torch.Generator().manual_seed(sum(numbers)))
    return criterion


def same(a, b):
    return torch.equal(a.perturbations, b.perturbations) and torch.equal(a.written, b.written) and a.clock == b.clock


ALL = [(0, 1, 2), (3, 4, 5)]


# What it holds


def test_it_holds_nothing_until_a_minibatch_has_ended():
    memory = Memory(SAMPLES)
    assert memory.perturbations is None
    assert "nothing remembered yet" in memory.description()
    criterion = trained(memory, (0, 1))
    assert memory.perturbations.shape == (SAMPLES, *SHAPE)
    assert memory.perturbations.dtype == torch.int8
    assert not memory.perturbations[2:].any()
    assert memory.perturbations[:2].flatten(1).abs().amax(dim=1).tolist() == [127, 127]
    assert "memory: of 6 samples of [1, 6, 6], int8, 0.0 MiB on cpu; 1 / 1 / 0 steps" in criterion.explain()


@pytest.mark.parametrize("kind", [TRADESLoss, MARTLoss, PGDLoss])
def test_the_second_epoch_starts_where_the_first_ended(kind):
    memory = Memory(SAMPLES, dtype=torch.float32)
    criterion, network = kind(ATTACK, memory=memory, engine="exact"), model()
    x, y, indices = batch(*range(SAMPLES))
    starts = []
    recall = ops.recall
    with mock.patch("bt_fast.ops.recall", lambda *a, **k: starts.append(recall(*a, **k)) or starts[-1]):
        for _ in range(2):
            criterion(network, x, y, indices=indices, generator=torch.Generator().manual_seed(0))
            ended = criterion.last.x_adv
    first, second = (start for _, start in starts)
    assert (first - x).abs().max() < 0.006
    assert (second - x).abs().mean() > 0.04
    assert criterion.last.steps.tolist() == [1] * SAMPLES
    assert_near(memory.perturbations, ((ended - x) / 0.1).clamp(-1, 1))


def test_epsilon_may_follow_a_schedule():
    memory = Memory(SAMPLES, dtype=torch.float32)
    criterion, network = trained(memory, range(SAMPLES)), model()
    x, y, indices = batch(*range(SAMPLES))
    for epsilon in (0.05, 0.0, 0.2):
        criterion.attack = PGD(epsilon, epsilon / 4, 10)
        criterion(network, x, y, indices=indices)
        assert (criterion.last.x_adv - x).abs().max() <= epsilon * 1.00001
        assert bool(memory.perturbations.any()) == (epsilon > 0)  # at an ε of 0 no sample has steps


def test_the_minings_counts_become_the_memorys():
    mining = BulletTrain()
    criterion = TRADESLoss(ATTACK, mining=mining, memory=Memory(SAMPLES, steps=(2, 1, 0)))
    assert (mining.boundary_steps, mining.robust_steps, mining.outlier_steps) == (2, 1, 0)
    TRADESLoss(ATTACK, mining=BulletTrain(1, 1, 0), memory=Memory(SAMPLES))
    with pytest.raises(ValueError, match=r"^mining's steps must be those of the memory, \(1, 1, 0\), got \(3, 2, 0\)"):
        TRADESLoss(ATTACK, mining=BulletTrain(3, 2, 0), memory=Memory(SAMPLES))
    assert criterion.memory in set(criterion.modules())


def test_a_further_pass_remembers_nothing():
    for options in ({}, {"mining": BulletTrain()}):
        memory = Memory(SAMPLES)
        criterion = trained(memory, (0, 1, 2), **options)
        before = copy.deepcopy(memory)
        x, y, indices = batch(0, 1, 2)
        for reuse in (True, False):
            with criterion.again(reuse=reuse):
                criterion(model(), x, y, indices=indices)
            assert same(memory, before)


@pytest.mark.parametrize("mining", [None, BulletTrain()])
def test_what_is_remembered_is_looked_up_only_where_x_is_made_anew(mining):
    criterion = trained(Memory(SAMPLES), (0, 1, 2), mining=copy.deepcopy(mining))
    x, y, indices = batch(0, 1, 2)
    with mock.patch.object(Memory, "recall", autospec=True, side_effect=Memory.recall) as recall:
        with criterion.again():
            criterion(model(), x, y)  # which needs no indices
        assert recall.call_count == 0
        with criterion.again(reuse=False):
            criterion(model(), x, y, indices=indices)
        assert recall.call_count == 1


def test_the_two_passes_of_awp_remember_once():
    memory, network = Memory(SAMPLES), model()
    criterion, awp = TRADESLoss(ATTACK, memory=memory), AWP(network, gamma=0.01)
    x, y, indices = batch(0, 1, 2)
    with awp(criterion, x, y, indices=indices) as loss:
        loss.backward()
    assert memory.clock == 3


# Ages


def test_ages_are_epochs_since_the_last_writing():
    memory = Memory(SAMPLES)
    assert (memory.ages() == math.inf).all()
    trained(memory, (0, 1, 2), (3, 4), (0,))
    assert memory.ages().tolist() == [0, 3 / 6, 3 / 6, 1 / 6, 1 / 6, math.inf]
    memory.reset()
    assert (memory.ages() == math.inf).all()
    assert not memory.perturbations.any()


def test_a_perturbation_that_is_too_old_is_forgotten_also_where_the_crop_does_not_show_it():
    memory = Memory(SAMPLES, reset_after=1)
    criterion = trained(memory, (0, 1), (1, 2, 3), (1, 2, 4, 5))  # 0 is 7/6 of an epoch old, 1 has just been written
    assert memory.ages()[0] == 7 / 6
    full = memory.perturbations.clone()
    x, y, indices = batch(0, 1)
    place = Placement(torch.tensor([3, 3]), torch.tensor([0, 0]), torch.tensor([False, False]))
    criterion(model(), x, y, indices=indices, placement=place)
    assert not memory.perturbations[0, :, :3].any()
    assert memory.perturbations[0, :, 3:].any()
    assert torch.equal(memory.perturbations[1, :, :3], full[1, :, :3])


# Saving, loading, moving


@pytest.mark.parametrize("storage", ["device", "host"])
def test_a_resumed_run_is_the_uninterrupted_one(storage):
    def fresh(**options):
        return Memory(SAMPLES, storage=storage, **options)

    whole, half = fresh(), fresh()
    trained(whole, *ALL, *ALL)
    state = copy.deepcopy(trained(half, *ALL).state_dict())
    for resumed in (fresh(), fresh(shape=SHAPE, dtype=torch.int8), trained(fresh(), *ALL, (2, 3)).memory):
        criterion = TRADESLoss(ATTACK, memory=resumed)
        criterion.load_state_dict(state)
        assert same(resumed, half)
        trained(resumed, *ALL)
        assert same(resumed, whole)


def test_a_state_from_before_the_first_minibatch_forgets_all():
    memory = trained(Memory(SAMPLES), *ALL).memory
    memory.load_state_dict(Memory(SAMPLES).state_dict())
    assert memory.perturbations is None
    assert memory.clock == 0
    assert (memory.shape, memory.dtype) == (None, None)  # as when it was made


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"samples": 7}, r"^memory must have the samples of the saved memory, 6, got 7"),
        ({"dtype": torch.float16}, r"^memory must have the dtype of the saved memory, int8, got float16"),
        ({"shape": (1, 6, 7)}, r"^memory must have the shape of the saved memory"),
        ({"fingerprint": "digits"}, r"^memory must have the fingerprint of the saved memory, letters, got digits"),
        ({"share": torch.arange(3)}, r"^memory must have the share of the saved memory"),
    ],
)
def test_a_state_of_another_memory_is_refused(own, message):
    state = trained(Memory(SAMPLES, fingerprint="letters"), *ALL).state_dict()
    other = Memory(**{"samples": SAMPLES} | own)
    before = copy.deepcopy(other)
    with pytest.raises(ValueError, match=message):
        TRADESLoss(ATTACK, memory=other).load_state_dict(state)
    assert other.perturbations is None
    assert torch.equal(other.written, before.written)


def test_it_follows_moves_but_not_casts_and_is_copied_whole():
    memory = trained(Memory(SAMPLES, dtype=torch.float32), *ALL).memory
    before = copy.deepcopy(memory)
    memory.half()
    memory.double()
    assert same(memory, before)
    assert same(pickle.loads(pickle.dumps(memory)), before)
    memory.to("meta")
    assert memory.perturbations.is_meta
    held = trained(Memory(SAMPLES, storage="host"), *ALL).memory.to("meta")
    assert not held.perturbations.is_meta


@pytest.mark.parametrize("storage", ["host", "file"])
def test_on_the_host_it_stays_there_whatever_the_default_device_is(storage, tmp_path):
    (x, y, indices), network, share = batch(0, 1, 2), model(), torch.arange(SAMPLES)
    path = tmp_path / "all.mem" if storage == "file" else None
    with torch.device("meta"):  # on which a tensor has no values
        memory = Memory(SAMPLES, storage=storage, path=path, share=share)
        criterion = TRADESLoss(ATTACK, memory=memory)
        for _ in range(2):
            criterion(network, x, y, indices=indices)
    assert {name: buffer.device.type for name, buffer in memory.named_buffers()} == dict.fromkeys(
        ("share", "perturbations", "written", "clock"), "cpu"
    )
    before = copy.deepcopy(memory)
    criterion.to_empty(device="meta")
    assert same(memory, before)


def test_made_on_the_meta_device_it_is_filled_by_a_state():
    saved = trained(Memory(SAMPLES), *ALL, mining=BulletTrain())
    with torch.device("meta"):
        criterion = TRADESLoss(ATTACK, memory=Memory(SAMPLES), mining=BulletTrain())
    criterion.to_empty(device="cpu").load_state_dict(saved.state_dict())
    assert same(criterion.memory, saved.memory)
    trained(criterion.memory, *ALL)
    trained(saved.memory, *ALL)
    assert same(criterion.memory, saved.memory)


# Rows that are copied to the images' device and back, as from the host to a GPU


def test_rows_that_are_copied_and_written_back_are_those_of_the_memory():
    expected = trained(Memory(SAMPLES), *ALL, *ALL, mining=BulletTrain()).memory
    memory = Memory(SAMPLES, storage="host")
    with mock.patch.object(Memory, "_apart", return_value=True):
        trained(memory, *ALL, *ALL, mining=BulletTrain())
    memory.settle()
    assert same(memory, expected)


# Ranks


def test_a_rank_holds_its_share_alone():
    share = torch.tensor([4, 0, 2])
    memory = Memory(SAMPLES, share=share)
    trained(memory, (2, 4), (0, 2))
    whole = trained(Memory(SAMPLES), (2, 4), (0, 2)).memory
    assert memory.perturbations.shape == (3, *SHAPE)
    assert torch.equal(memory.perturbations, whole.perturbations[share.sort().values])
    x, y, indices = batch(0, 3)
    with pytest.raises(ValueError, match=r"^indices must be of this rank's share of 3 samples, but 1 of 2 are not"):
        TRADESLoss(ATTACK, memory=memory)(model(), x, y, indices=indices)


# On a GPU


def test_on_a_gpu_it_waits_for_nothing_and_its_faults_are_counted():
    memory = Memory(SAMPLES, SHAPE, reset_after=3).to(DEVICE)
    memory._allocate(SHAPE, torch.int8)
    x, _, indices = (t.to(DEVICE) for t in batch(0, 1, 2))
    place = Placement(indices.clone(), indices.clone(), torch.zeros(3, dtype=torch.bool, device=DEVICE))
    with pretended_device():
        recalled = memory.recall(x, indices, place, l2=False)
        assert len(recalled.wrong) == 3
        plan = Plan.uniform(3, 1, 0.1, DEVICE)
        memory.remember(recalled, x.clone(), x, plan, 0.1, l2=False)


# Errors


def call(memory=None, **given):
    memory = memory or Memory(SAMPLES, SHAPE)
    mining = BulletTrain()
    criterion, network = TRADESLoss(ATTACK, memory=memory, mining=mining), model()
    x, y, indices = batch(0, 1, 2)
    criterion(network, x, y, indices=indices)
    before = copy.deepcopy((memory.state_dict(), mining.state_dict(), network.state_dict()))

    def unchanged():
        after = memory.state_dict(), mining.state_dict(), network.state_dict()
        for old, new in zip(before, after, strict=True):
            assert all(torch.equal(old[k], new[k]) for k in old if isinstance(old[k], torch.Tensor))

    given = {"x": x, "y": y, "indices": indices} | given
    return lambda: criterion(network, **given), unchanged


def place_of(top, left=0, m=3):
    return Placement(torch.full((m,), top), torch.full((m,), left), torch.zeros(m, dtype=torch.bool))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"indices": None},
            ValueError,
            r"^indices must be given to a loss with a memory, got none: give each sample's",
        ),
        ({"indices": torch.tensor([0, 1, 6])}, ValueError, r"^indices must lie in 0..5, but 1 of 3 do not"),
        ({"indices": torch.tensor([0, -1, 6])}, ValueError, r"^indices must lie in 0..5, but 2 of 3 do not"),
        (
            {"indices": torch.tensor([2, 1, 2])},
            ValueError,
            r"^indices must be all different, but 1 of 3 are there again",
        ),
        ({"indices": torch.rand(3)}, TypeError, r"^indices must be integers"),
        ({"indices": torch.tensor([0, 1])}, ValueError, r"^indices must have shape \[3\]"),
        ({"placement": place_of(6)}, ValueError, r"^placement must show a part of each image, but 3 of 3"),
        ({"placement": place_of(0, m=2)}, ValueError, r"^placement.top must have shape \[3\]"),
        ({"placement": 3}, TypeError, r"^placement must be a Placement"),
        (
            {"x": torch.rand(3, 1, 5, 6)},
            ValueError,
            r"^images must have the memory's shape \[1, 6, 6\] where they have no",
        ),
        ({"x": torch.rand(3, 1, 6, 6) + 1.0}, ValueError, r"^x must lie in \[0, 1\]"),
    ],
)
def test_bad_input_is_one_clear_error_and_changes_nothing(given, error, message):
    run, unchanged = call(**given)
    with pytest.raises(error, match=message):
        run()
    unchanged()


def test_ranks_that_mine_together_raise_wrong_indices_with_their_one_read():
    x, _, _ = batch(0, 1, 2)
    recalled = Memory(SAMPLES).recall(x, torch.tensor([1, 9, 1]), None, l2=False, together=True)
    assert [int(fault.count) for fault in recalled.wrong] == [1, 1]
    assert (recalled.numbers < SAMPLES).all()


@pytest.mark.parametrize("mining", [None, BulletTrain()])
def test_wrong_indices_that_only_the_device_sees_are_raised_with_the_read_of_the_attack(mining):
    recall, memory = Memory.recall, trained(Memory(SAMPLES), *ALL).memory
    criterion, before = TRADESLoss(ATTACK, memory=memory, mining=copy.deepcopy(mining)), copy.deepcopy(memory)
    x, y, _ = batch(0, 1, 2)
    later = mock.patch.object(Memory, "recall", lambda *a, **options: recall(*a, **options | {"together": True}))
    for indices, message in (
        ([0, 7, 1], r"^indices must lie in 0..5, but 1 of 3"),
        ([0, 1, 0], "^indices must be all"),
    ):
        with later, pytest.raises(ValueError, match=message):
            criterion(model(), x, y, indices=torch.tensor(indices))
        assert same(memory, before)


def test_a_memory_elsewhere_is_an_error():
    x, _, indices = (t.to("meta") for t in batch(0, 1, 2))
    with pytest.raises(ValueError, match=r"^memory must be on meta like the images, but is on cpu"):
        Memory(SAMPLES).recall(x, indices, None, l2=False)


def test_the_norm_cannot_change_under_int8():
    criterion = trained(Memory(SAMPLES), (0, 1))
    criterion.attack = PGD(0.1, 0.02, 10, "l2")
    x, y, indices = batch(0, 1)
    with pytest.raises(ValueError, match=r"^memory's dtype must be floating point in l2, got torch.int8"):
        criterion(model(), x, y, indices=indices)


def test_a_placement_without_a_memory_is_an_error():
    x, y, _ = batch(0, 1, 2)
    with pytest.raises(ValueError, match=r"^placement is for a loss with a memory, but this TRADESLoss has none"):
        TRADESLoss(ATTACK)(model(), x, y, placement=place_of(0))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"samples": 0}, ValueError, r"^samples must be at least 1"),
        ({"samples": 2.0}, TypeError, r"^samples must be an integer"),
        ({"shape": 3}, TypeError, r"^shape must be a tuple of a sample's sizes"),
        ({"dtype": torch.bfloat16}, ValueError, r"^dtype must be one of torch.int8"),
        ({"storage": "disk"}, ValueError, r"^storage must be one of"),
        ({"storage": "file"}, ValueError, r"^path must be given for storage='file' alone"),
        ({"path": "x.mem"}, ValueError, r"^path must be given for storage='file' alone"),
        ({"share": [0, 1]}, TypeError, r"^share must be a torch.Tensor"),
        ({"share": torch.rand(3)}, TypeError, r"^share must be integers \[n\]"),
        ({"share": torch.tensor([0, 0])}, ValueError, r"^share must hold different numbers in 0..5"),
        ({"share": torch.tensor([0, 6])}, ValueError, r"^share must hold different numbers in 0..5"),
        ({"steps": 3}, TypeError, r"^steps must be three numbers"),
        ({"steps": (0, 1, 0)}, ValueError, r"^steps must be at least 1"),
        ({"reset_after": 0}, ValueError, r"^reset_after must be a finite number greater than 0"),
        ({"fingerprint": 3}, TypeError, r"^fingerprint must be a str or None"),
    ],
)
def test_a_wrong_option_is_an_error(given, error, message):
    with pytest.raises(error, match=message):
        Memory(**{"samples": SAMPLES} | given)


@pytest.mark.parametrize(
    ("attack", "memory", "error", "message"),
    [
        (ATTACK, 50_000, TypeError, r"^memory must be a Memory or None, got int"),
        (APGD(0.1, 10), Memory(6), TypeError, r"^attack must be a PGD, got APGD"),
        ("pgd", Memory(6), TypeError, r"^attack must be a PGD, got str: .*write PGD\(...\)"),
        (PGD(0.1, 0.02, 10, start="uniform"), Memory(6), ValueError, r"^attack's start must be 'normal' or None"),
        (PGD(0.1, 0.02, 10, "l2"), Memory(6, dtype=torch.int8), ValueError, r"^memory's dtype must be floating point"),
    ],
)
def test_an_attack_that_cannot_start_there_is_an_error(attack, memory, error, message):
    with pytest.raises(error, match=message):
        TRADESLoss(attack, memory=memory)


def test_a_mining_of_another_kind_is_an_error_that_names_it():
    with pytest.raises(TypeError, match=r"^mining must be a BulletTrain or None, got str"):
        TRADESLoss(ATTACK, mining="bullet", memory=Memory(SAMPLES))
