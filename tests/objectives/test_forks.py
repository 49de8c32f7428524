"""What forks of TRADES and PGD training compute, to 1e-8: loss, gradients, batch norm's buffers and random numbers."""

import copy
from functools import partial

import pytest
import reference_forks
import torch
import torch.nn.functional as F
from mixed_images import cutmix, mixup
from small_models import CLASSES, batch, build, gradients
from tolerances import UPDATES, assert_near, assert_near_nested

from bt_fast import PGD, AdversarialLoss, PGDLoss, TRADESLoss, ops

SIZES = {"epsilon": 0.1, "step_size": 0.03}


def pgd(**options):
    return PGD(**SIZES, steps=4, **options)


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal_steps(ours, theirs, networks, batches, steps=2):
    """Updates by SGD from the same seeds: `ours` and `theirs` are functions of networks and a minibatch."""
    twins = [copy.deepcopy(network) for network in networks]
    results = []
    for loss_of, of in ((ours, networks), (theirs, twins)):
        optimizer, result = torch.optim.SGD([p for n in of for p in n.parameters()], lr=0.1, momentum=0.9), []
        for k in range(steps):
            torch.manual_seed(k)
            optimizer.zero_grad()
            loss = loss_of(*of, *batches(k))
            loss.backward()
            result.append((loss.detach(), [gradients(n) for n in of], [state_of(n) for n in of], torch.get_rng_state()))
            optimizer.step()
        results.append(result)
    for (loss, grads, states, random), (their_loss, their_grads, their_states, their_random) in zip(
        *results, strict=True
    ):
        assert_near(loss, their_loss, UPDATES)
        for mine, other in zip(grads + states, their_grads + their_states, strict=True):
            assert_near_nested(mine, other, UPDATES)
        assert torch.equal(random, their_random)


def hard(k):
    return batch(seed=k)


def soft(k):
    return cutmix(*batch(seed=k), CLASSES, seed=k)


CLEAN_TERMS = {"torch": reference_forks.spread_over_all, "others": reference_forks.spread_over_the_others}


@pytest.mark.parametrize("engine", ["exact", "fast"])
@pytest.mark.parametrize("smoothing", CLEAN_TERMS)
def test_dm_improves_at(smoothing, engine):
    criterion = TRADESLoss(
        pgd(start="uniform"), 5.0, label_smoothing=0.1, smoothing=smoothing, clean_updates=1, engine=engine
    )
    clean_term = partial(CLEAN_TERMS[smoothing], s=0.1)
    theirs = partial(reference_forks.dm_improves_at, **SIZES, steps=4, beta=5.0, clean_term=clean_term)
    assert_equal_steps(criterion, theirs, [build("conv_bn")], hard)


def test_dm_improves_at_with_cutmix():
    """Their clean term is KL to the label, ours the cross-entropy: a constant apart, the labels' own entropy."""
    criterion = TRADESLoss(
        pgd(start="uniform", inner="cross_entropy"),
        5.0,
        clean_updates=1,
        engine="exact",
        extra=lambda batch: torch.xlogy(batch.y, batch.y).sum(dim=1).mean(),
    )
    theirs = partial(reference_forks.dm_improves_at, **SIZES, steps=4, beta=5.0)
    assert_equal_steps(criterion, theirs, [build("conv_bn")], soft)


def test_hat():
    model, helper = build("conv_bn"), build("conv_bn", seed=1).eval()
    options = {**SIZES, "steps": 4, "beta": 2.5, "gamma": 0.5, "h": 2.0}

    def helped(model, batch):
        with torch.no_grad():
            labels = helper(batch.x_adv).argmax(dim=1)
        return 0.5 * F.cross_entropy(model(batch.x + 2.0 * (batch.x_adv - batch.x)), labels)

    criterion = TRADESLoss(pgd(), 2.5, clean_updates=1, extra=partial(helped, model), engine="exact")
    assert_equal_steps(criterion, lambda m, x, y: reference_forks.hat(m, helper, x, y, **options), [model], hard)


class OfTeacher(AdversarialLoss):
    """LBGAT's loss of the network alone, without labels."""

    default_inner = "kl"

    def objective(self, clean_logits, adversarial_logits, y):
        return 3.0 / len(y) * ops.trades_kl(adversarial_logits, clean_logits)


def test_lbgat():
    def ours(model, teacher, x, y):
        def learns_the_teacher(batch):
            of_teacher = teacher(batch.x)
            return F.mse_loss(batch.adversarial_logits, of_teacher) + F.cross_entropy(of_teacher, batch.y)

        return OfTeacher(pgd(), engine="exact", extra=learns_the_teacher)(model, x, y)

    theirs = partial(reference_forks.lbgat, **SIZES, steps=4, beta=3.0)
    assert_equal_steps(ours, theirs, [build("conv_bn"), build("conv_bn", seed=1)], hard)


def test_bag_of_tricks():
    criterion = PGDLoss(pgd(), label_smoothing=0.2, smoothing="others", engine="exact")
    step = partial(reference_forks.bag_of_tricks, **SIZES, steps=4, smoothing=0.2)
    assert_equal_steps(criterion, lambda m, x, y: step(m, x, [(y, 1.0)]), [build("conv_bn")], hard)


def test_bag_of_tricks_with_mixup():
    criterion = PGDLoss(pgd(), label_smoothing=0.2, smoothing="others", engine="exact")
    step = partial(reference_forks.bag_of_tricks, **SIZES, steps=4, smoothing=0.2)

    minibatches = [batch(seed=k) for k in range(2)]
    labels = [y for _, y in minibatches]

    def theirs(model, x, y):
        first = labels.pop(0)
        return step(model, x, [(first, 0.75), (first.roll(1), 0.25)])

    assert_equal_steps(criterion, theirs, [build("conv_bn")], lambda k: mixup(*minibatches[k], CLASSES, share=0.75))
