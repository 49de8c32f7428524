"""The cheaper updates on a device: no read more than others have, and right in any order that CUDA would permit."""

import warnings

import pytest
import torch
from emulated_device import EmulatedDevice
from objective_cases import EACH
from pretended_device import DEVICE, counted_waits, pretended_device
from small_models import SHAPE, batch, build
from test_objectives import confident, own_labels, sgd

from bt_fast import PGD, BulletTrain, Engine, HalfDrawn, MARTLoss, PGDLoss, TRADESLoss

HALVES = pytest.mark.parametrize("half", [HalfDrawn(1), HalfDrawn(1, "half")], ids=str)
# of a plan for 8 samples, 3 / 1 / 0 steps: active, (outlier, boundary, robust), left-out ones with steps
PLANS = {HalfDrawn(1): [6, 2, 2, 2, 2, 4, 2], HalfDrawn(1, "half"): [4, 2, 2, 2, 2, 4, 0]}


@pytest.mark.parametrize("policy", ["three_groups", "gaussian"])
@HALVES
@EACH
def test_one_read_a_call_on_a_device(objective, half, policy):
    model = build("conv_bn", dtype=torch.float32).to(DEVICE)
    x, y = torch.empty(8, *SHAPE, device=DEVICE), torch.zeros(8, dtype=torch.int64, device=DEVICE)
    bullet = BulletTrain(3, half, 0, policy=policy, unperturbed="keep").to(DEVICE)
    with pretended_device(plan=PLANS[half]) as reads:
        objective.loss(model, x, y, sgd(model), perturb_steps=3, bullet=bullet).backward()
        assert reads.started == reads.waited == 1


@pytest.mark.parametrize("kind", [TRADESLoss, MARTLoss])
def test_one_read_a_call_with_a_shared_forward(kind):
    model = build("conv_bn", dtype=torch.float32).to(DEVICE)
    x, y = torch.empty(8, *SHAPE, device=DEVICE), torch.zeros(8, dtype=torch.int64, device=DEVICE)
    mining = BulletTrain(3, HalfDrawn(1), 0, unperturbed="skip")
    criterion = kind(PGD(0.1, 0.03, 3), mining=mining, clean_updates="shared", engine="exact").to(DEVICE)
    with pretended_device(plan=PLANS[HalfDrawn(1)]) as reads:
        criterion(model, x, y).backward()
        assert reads.started == reads.waited == 1


@HALVES
def test_reads_on_the_cpu_are_those_of_all(half):
    with counted_waits() as waits:
        TRADESLoss(PGD(0.1, 0.03, 3), mining=BulletTrain(3, half, 0))(confident(), *batch())
    assert len(waits) == 3


CRITERIA = {
    "half": lambda **o: TRADESLoss(PGD(0.1, 0.03, 3), mining=BulletTrain(3, HalfDrawn(2), 0, unperturbed="keep"), **o),
    "half, skip": lambda **o: MARTLoss(
        PGD(0.1, 0.03, 3), mining=BulletTrain(3, HalfDrawn(2), 0, unperturbed="skip"), **o
    ),
    "half, PGD": lambda **o: PGDLoss(PGD(0.1, 0.03, 3), mining=BulletTrain(3, HalfDrawn(2), 1), **o),
    "half before": lambda **o: TRADESLoss(PGD(0.1, 0.03, 3), mining=BulletTrain(3, HalfDrawn(2, "half"), 0), **o),
    "shared": lambda **o: TRADESLoss(
        PGD(0.1, 0.03, 3), mining=BulletTrain(3, HalfDrawn(2), 0, unperturbed="skip"), clean_updates="shared", **o
    ),
}


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("name", CRITERIA)
def test_under_graphs_and_on_streams_it_is_the_eager_loss_in_any_order(name, streams):
    batches = [(x, own_labels(confident(), x)) for x, _ in (batch(8, seed=k) for k in range(3))]

    def run(engine):
        model, result = confident(), []
        criterion = CRITERIA[name](engine=engine)
        criterion.mining.robust_fraction.fill_(0.5)
        for k, (x, y) in enumerate(batches):
            torch.manual_seed(k)
            loss = criterion(model, x, y)
            loss.backward()
            result += [v.detach().clone() for v in (loss, *(p.grad for p in model.parameters()), *model.buffers())]
            result += [criterion.last.x_adv, criterion.mining.robust_fraction.clone()]
            model.zero_grad()
        return result, criterion.explain()

    expected, _ = run("exact")
    with EmulatedDevice() as emulated, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result, explained = run(Engine(graphs=True, streams=streams))
    why = "its clean forward comes before" if name == "shared" else "half of the robust samples stand for all"
    assert f"update: eagerly, since {why}" in explained
    for seed in range(4):
        shuffled = emulated.shuffled(seed, result)
        assert all(torch.equal(a, b) for a, b in zip(shuffled, expected, strict=True)), seed
