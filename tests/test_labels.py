"""Labels of either kind: the class that counts, the target of an attack, and what is no label."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixed_images import MIXED
from pretended_device import DEVICE
from small_models import CLASSES, batch

from bt_fast import BulletTrain, faults
from bt_fast.labels import check_either, class_of, is_soft, target_of

CPU = torch.device("cpu")
shares = st.lists(st.lists(st.integers(0, 6), min_size=4, max_size=4).filter(any), min_size=1, max_size=6)
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@settings(max_examples=100, deadline=None)
@given(rows=shares, dtype=st.sampled_from(FLOATS))
def test_the_first_of_the_largest_parts_is_the_class(rows, dtype):
    parts = torch.tensor(rows, dtype=torch.float64)
    labels = (parts / parts.sum(dim=1, keepdim=True)).to(dtype)
    expected = [row.index(max(row)) for row in rows]
    assert class_of(labels).tolist() == expected
    assert int(faults.labels_outside(labels, 4, "y").count) == 0


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), classes=st.sampled_from([2, 10, 1000]), dtype=st.sampled_from(FLOATS))
def test_what_a_softmax_gives_is_a_distribution_in_every_dtype(seed, classes, dtype):
    logits = 5 * torch.randn(8, classes, generator=torch.Generator().manual_seed(seed))
    assert (class_of(logits.softmax(dim=1).to(dtype)) >= 0).all()
    assert (class_of(logits.to(dtype).softmax(dim=1)) >= 0).all()


NO_DISTRIBUTIONS = {
    "NaN": [math.nan, 1.0, 0.0],
    "infinite": [math.inf, 0.0, 0.0],
    "below 0": [1.5, -0.5, 0.0],
    "nothing": [0.0, 0.0, 0.0],
    "more than 1": [0.6, 0.6, 0.0],
    "a little less than 1": [0.999, 0.0, 0.0],
    "logits": [3.0, -1.0, 0.2],
    "two labels": [1.0, 1.0, 0.0],
}


@pytest.mark.parametrize("row", NO_DISTRIBUTIONS.values(), ids=NO_DISTRIBUTIONS)
def test_a_row_that_is_no_distribution_has_no_class_and_is_counted(row):
    labels = torch.tensor([[0.0, 0.0, 1.0], row, [0.25, 0.5, 0.25]])
    assert class_of(labels).tolist() == [2, -1, 1]
    fault = faults.labels_outside(labels, 3, "y")
    assert int(fault.count) == 1
    with pytest.raises(ValueError, match=r"y must hold distributions, .* but 1 of 3 are not: write y / y\.sum\(dim=1"):
        faults.read([fault]).wait()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_classes_stay_what_they_are(dtype):
    labels = torch.tensor([2, 0, 1], dtype=dtype)
    assert class_of(labels).dtype == torch.int64
    assert class_of(labels).tolist() == [2, 0, 1]
    assert not is_soft(labels)


def test_a_target_is_the_label_as_a_distribution_in_the_logits_dtype():
    like = torch.zeros(3, 4, dtype=torch.float64)
    assert torch.equal(
        target_of(torch.tensor([2, 0, 9]), like),
        torch.eye(4).double()[[2, 0, 3]] * (like[:, :1] + torch.tensor([[1], [1], [0]])),
    )
    soft = torch.tensor([[0.25, 0.75, 0.0, 0.0]] * 3)
    assert torch.equal(target_of(soft, like), soft.double())


@pytest.mark.parametrize("name", MIXED)
def test_mixed_images_have_distributions_as_labels(name):
    x, y = MIXED[name](*batch(12, dtype=torch.float32), CLASSES)
    check_either(y, len(x), x.device, "y")
    classes = class_of(y)
    assert (classes >= 0).all()
    assert torch.equal(y.gather(1, classes[:, None])[:, 0], y.amax(dim=1))


BAD = {
    "no tensor": ([[0.5, 0.5]], TypeError, r"y must be a tensor of integers, got list"),
    "floats": (torch.rand(2), TypeError, r"y must be integers, got torch\.float32: write y\.long\(\)$"),
    "bools": (torch.eye(2).bool(), TypeError, r"y must be integers, got torch\.bool: write y\.argmax\(dim=1\)"),
    "one-hot integers": (
        torch.eye(2).long(),
        ValueError,
        r"got \[2, 2\]: write y\.argmax\(dim=1\), if they are one-hot$",
    ),
    "a float column": (torch.ones(2, 1), ValueError, r"\[2, K\].*got \[2, 1\]: write y\.squeeze\(1\)\.long\(\)$"),
    "other rows": (torch.full((3, 2), 0.5), ValueError, r"\[2, K\].*got \[3, 2\]: give as many y as images$"),
    "three dimensions": (torch.full((2, 2, 2), 0.5), TypeError, r"y must be integers, got torch\.float32"),
    "elsewhere": (torch.full((2, 2), 0.5, device=DEVICE), ValueError, r"y must be on cpu.*are on meta: write y\.to"),
    "sparse": (torch.eye(2).to_sparse(), TypeError, r"y must be dense distributions, got .*: write y\.to_dense"),
    "8 bits": (
        torch.eye(2).to(torch.float8_e4m3fn),
        TypeError,
        r"y must be dense distributions.*: write .*\.float\(\)$",
    ),
}


@pytest.mark.parametrize(("labels", "error", "message"), BAD.values(), ids=BAD)
def test_bad_labels_are_reported_with_what_to_write(labels, error, message):
    with pytest.raises(error, match=message):
        check_either(labels, 2, CPU, "y")


# Mining


def seeded(seed):
    return torch.Generator().manual_seed(seed)


Z = 3 * torch.randn(16, CLASSES, generator=seeded(0), dtype=torch.float64)
SOFT = MIXED["mixup"](*batch(16), CLASSES)[1]


@pytest.mark.parametrize("options", [{}, {"metric": "margin"}, {"policy": "gaussian"}], ids=str)
def test_mining_judges_a_soft_label_by_its_class(options):
    states = []
    for labels in (SOFT, class_of(SOFT)):
        bullet = BulletTrain(5, 2, 1, **options)
        for _ in range(3):
            plan = bullet.plan(Z, labels)
            bullet.observe(Z + 0.5, labels)
        states.append([plan.steps, plan.group, plan.certainty, *bullet.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def spoilt(row):
    labels = SOFT.clone()
    labels[3] = torch.tensor(row)
    return labels


BAD_FOR_MINING = {
    "no distribution": (spoilt([0.5, 0.2, 0.0, 0.0, 0.0]), r"labels must hold distributions, .* but 1 of 16 are not"),
    "other classes": (SOFT[:, :4], r"labels must have a column for each of the model's 5 classes, got shape \[16, 4\]"),
    "other rows": (SOFT[:9], r"labels must have shape \[16, K\]"),
}


@pytest.mark.parametrize(("labels", "message"), BAD_FOR_MINING.values(), ids=BAD_FOR_MINING)
def test_mining_refuses_bad_soft_labels_and_stays_as_it_is(labels, message):
    bullet = BulletTrain()
    bullet.plan(Z, SOFT)
    bullet.observe(Z, SOFT)
    before = {name: value.clone() for name, value in bullet.state_dict().items()}
    for call in (bullet.plan, bullet.observe):
        with pytest.raises(ValueError, match=message):
            call(Z, labels)
    assert all(torch.equal(value, before[name]) for name, value in bullet.state_dict().items())


def test_an_empty_minibatch_of_soft_labels_can_be_planned():
    plan = BulletTrain().plan(Z[:0], SOFT[:0])
    assert plan.steps.shape == (0,)
