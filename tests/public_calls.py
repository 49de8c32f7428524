"""Every public call that takes tensors, as `call(model, x, y)` with a separate random generator."""

import copy
import sys
from types import SimpleNamespace
from unittest import mock

import torch
from small_models import CLASSES
from torch import nn

from bt_fast import (
    APGD,
    AWP,
    METRICS,
    PGD,
    AugMixLoss,
    BulletTrain,
    Frozen,
    Gaussian,
    Guard,
    HalfDrawn,
    Logits,
    MARTLoss,
    Memory,
    Normalization,
    Normalize,
    Oracle,
    PerSample,
    PGDLoss,
    Placement,
    Plan,
    PowerMonitor,
    ThreatModel,
    TRADESLoss,
    Update,
    augmix_loss,
    generate,
    mart_loss,
    perturb,
    pgd_loss,
    trades_loss,
)
from bt_fast.augment import CropAndFlip, crop
from bt_fast.augment.mix import augment_and_mix, draw_choices
from bt_fast.autoattack import autoattack
from bt_fast.baselines.fast import fast_loss
from bt_fast.baselines.grad_align import grad_align
from bt_fast.baselines.yopo import yopo_loss
from bt_fast.evaluation import evaluate

THREAT, STEPS = ThreatModel(0.1), 2


def seeded():
    return torch.Generator().manual_seed(0)


def loss(loss_of, bullet=None, **options):
    """Calls a loss with a separate generator, so that it draws from no other."""

    def run(model, x, y):
        return loss_of(
            model, x, y, None, perturb_steps=STEPS, bullet=copy.deepcopy(bullet), generator=seeded(), **options
        )

    return run


ATTACK = PGD(0.1, 0.05, STEPS)


def criterion(kind, mining=None, attack=ATTACK, **options):
    """Calls a loss as a module, and checks what it has to log."""

    def run(model, x, y):
        made = kind(attack, mining=copy.deepcopy(mining), **options)
        result = made(model, x, y, generator=seeded())
        assert made.last.x_adv.shape == x.shape
        return result

    return run


def remembering(kind, mining=None, engine="exact"):
    """Calls a loss with a memory twice on the same samples, once of them mirrored."""

    def run(model, x, y):
        indices, zeros = torch.arange(len(x), device=x.device), torch.zeros(len(x), dtype=torch.int64, device=x.device)
        place = Placement(zeros, zeros + 1, zeros == 0)
        given = [t.clone() for t in (indices, *vars(place).values())]
        memory = Memory(len(x)).to(x.device)
        made = kind(ATTACK, mining=copy.deepcopy(mining), memory=memory, engine=engine)
        made(model, x, y, indices=indices, generator=seeded())
        result = made(model, x, y, indices=indices, placement=place, generator=seeded())
        assert all(torch.equal(a, b) for a, b in zip((indices, *vars(place).values()), given, strict=True))
        return result

    return run


def remembered_by(loss_of, bullet=None, **options):
    """Calls a drop-in with a memory."""

    def run(model, x, y):
        memory, indices = Memory(len(x)).to(x.device), torch.arange(len(x), device=x.device).flip(0)
        given = {"bullet": copy.deepcopy(bullet), "memory": memory, "indices": indices, "generator": seeded()}
        return loss_of(model, x, y, None, **given, **options)

    return run


def begun_at_a_memory(model, x, y):
    """Attacks by `perturb` from what is remembered, twice."""
    memory, indices = Memory(len(x)).to(x.device), torch.arange(len(x), device=x.device).flip(0)
    for _ in range(2):
        minibatch = memory.minibatch(x, indices, THREAT, generator=seeded())
        x_adv = perturb(model, x, y, ATTACK, per_sample=PerSample(start=minibatch.start))
        given = x_adv.clone()
        minibatch.keep(x_adv)
        assert torch.equal(x_adv, given)
    return x_adv


def weight_perturbed(mining=None, **options):
    def run(model, x, y):
        made = TRADESLoss(ATTACK, mining=copy.deepcopy(mining))
        with AWP(model, **options)(made, x, y, generator=seeded()) as loss:
            return loss.detach()

    return run


def perturbed(mining=None, attack=ATTACK, **options):
    def run(model, x, y):
        bullet = copy.deepcopy(mining)
        result = perturb(model, x, y, attack, bullet, generator=seeded(), **options)
        if bullet is not None:
            bullet.observe(logits_of(x), y)
        return result

    return run


def softly(call):
    """With distributions as labels, which stay as they are, too."""

    def run(model, x, y):
        labels = 0.75 * nn.functional.one_hot(y, CLASSES).to(x.dtype) + 0.25 / CLASSES
        given = labels.clone()
        result = call(model, x, labels)
        assert torch.equal(labels, given)
        return result

    return run


def perturbed_by_sample(mining=None, **options):
    """Each sample with sizes and a start of its own, and without mining with steps of its own."""

    def run(model, x, y):
        m, bullet = len(x), copy.deepcopy(mining)
        counts = None if mining is not None else torch.arange(m, device=x.device) % 3
        radii = torch.linspace(0.0, 0.2, m, device=x.device)
        own = PerSample(counts, radii, 0.4 * radii, x.detach().roll(1, 0))
        before = [None if t is None else t.clone() for t in vars(own).values()]
        result = perturb(model, x, y, ATTACK, bullet, per_sample=own, generator=seeded(), **options)
        assert all(a is b or torch.equal(a, b) for a, b in zip(vars(own).values(), before, strict=True))
        if bullet is not None:
            bullet.observe(logits_of(x), y)
        return result

    return run


def away(outputs, rows):
    """An inner loss of one's own."""
    return (outputs - rows.clean_outputs).square().sum(dim=1)


def cropped(model, x, y):
    out, placement = CropAndFlip(padding=2)(x, generator=seeded())
    assert torch.equal(crop(x, placement), out)
    return out


def selected(model, x, y):
    return perturb(Logits(model, lambda output: output), x, y, ATTACK, generator=seeded())


def augmix(bullet=None, **options):
    return lambda model, x, y: augmix_loss(model, x, y, bullet=copy.deepcopy(bullet), generator=seeded(), **options)


def generated(**options):
    def run(model, x, y):
        target = nn.functional.one_hot(y, CLASSES).to(x.dtype)
        schedule = Plan.uniform(len(x), STEPS, 0.05, x.device)
        return generate(model, x, x, target, schedule, THREAT, generator=seeded(), **options)

    return run


def evaluated(attack=ATTACK, **options):
    def run(model, x, y):
        result = evaluate(model, [(x, y)], attack, generator=seeded(), **options)
        return torch.tensor([result.clean_correct, result.robust_correct, *result.restart, *result.step])

    return run


def yopo(objective):
    def run(model, x, y):
        options = {"propagations": 2, "layer_steps": 2, "epsilon": 0.1, "step_size": 0.05, "generator": seeded()}
        return yopo_loss(model, x, y, None, objective=objective, **options)

    return run


def autoattacked(model, x, y):
    """Calls `autoattack` with a fake of AutoAttack's package, which returns its images unchanged."""
    attack = SimpleNamespace(run_standard_evaluation=lambda x, y, bs: x)
    package = SimpleNamespace(AutoAttack=lambda *_, **__: attack)
    with mock.patch.dict(sys.modules, {"autoattack": package}):
        result = autoattack(model, x, y, THREAT)
    return result.x_adv + result.clean_correct


def logits_of(x):
    """Returns the logits that a script gives to mining."""
    return torch.randn(len(x), CLASSES, generator=seeded(), dtype=x.dtype)


def mined(model, x, y):
    """Plans a minibatch and checks that the caller's logits do not change."""
    bullet, logits = BulletTrain(STEPS, 1, 0), logits_of(x)
    given = logits.clone()
    assignment = bullet.plan(logits, y)
    bullet.observe(logits, y)
    steps = Plan.from_steps(assignment.steps, assignment.step_size.clamp(min=1e-3)).steps
    assert torch.equal(logits, given)
    return steps + bullet.robust_fraction


def measured(model, x, y):
    logits = logits_of(x)
    given = logits.clone()
    result = torch.stack([metric(logits, y) for metric in METRICS.values()])
    assert torch.equal(logits, given)
    return result


def guarded(model, x, y):
    weight = nn.Parameter(logits_of(x))
    guard = Guard(torch.optim.SGD([weight], lr=0.1), nn.ParameterList([weight]))
    with guard.minibatch(y):
        loss = nn.functional.cross_entropy(weight, y)
        guard.step(loss)
    guard.settle()
    return loss.detach()


def watched(model, x, y):
    with PowerMonitor("cpu") as monitor:
        monitor.mark("loss")
    return torch.tensor(len(monitor.labels))


def divergence_from_x(given):
    """A further term of a loss."""
    return (given.adversarial_logits * (given.x_adv - given.x).mean()).sum()


LOSSES = (TRADESLoss, MARTLoss, PGDLoss)
THREE, ONE, PIXELS = BulletTrain(STEPS, 1, 0), BulletTrain(1, 0, 0), Normalization((0.0,), (1.0,))
CALLS = {
    **{f"{f.__name__}": loss(f) for f in (trades_loss, mart_loss, pgd_loss)},
    **{f"{f.__name__}, bullet": loss(f, THREE) for f in (trades_loss, mart_loss, pgd_loss)},
    **{f"{f.__name__}, view": loss(f, frozen=Frozen(), update=Update()) for f in (trades_loss, mart_loss, pgd_loss)},
    "trades_loss, l_2": loss(trades_loss, distance="l_2"),
    "trades_loss, skip": loss(trades_loss, THREE, unperturbed="skip"),
    "trades_loss, normalised": loss(trades_loss, THREE, normalization=PIXELS),
    "trades_loss, auto": loss(trades_loss, THREE, runner="auto"),
    "trades_loss, oracle": loss(trades_loss, BulletTrain(STEPS, 1, 0, policy=Oracle(2))),
    "trades_loss, half": loss(trades_loss, BulletTrain(STEPS, HalfDrawn(1), 0)),
    "pgd_loss, half before": loss(pgd_loss, BulletTrain(STEPS, HalfDrawn(1, "half"), 0)),
    "trades_loss, gaussian": loss(trades_loss, BulletTrain(STEPS, 1, 0, policy=Gaussian())),
    **{f"{kind.__name__}": criterion(kind) for kind in LOSSES},
    **{f"{kind.__name__}, exact": criterion(kind, engine="exact") for kind in LOSSES},
    **{f"{kind.__name__}, mining": criterion(kind, THREE) for kind in LOSSES},
    "TRADESLoss, shared": criterion(TRADESLoss, THREE, clean_updates="shared"),
    "MARTLoss, shared, exact": criterion(MARTLoss, THREE, clean_updates="shared", engine="exact"),
    "TRADESLoss, bf16": criterion(TRADESLoss, THREE, engine="bf16"),
    "TRADESLoss, normalised": criterion(TRADESLoss, attack=PGD(0.1, 0.05, STEPS, normalization=PIXELS)),
    **{f"{kind.__name__}, soft labels": softly(criterion(kind, THREE)) for kind in LOSSES},
    **{
        f"{kind.__name__}, details": criterion(
            kind, THREE, label_smoothing=0.1, smoothing="others", extra=divergence_from_x
        )
        for kind in LOSSES
    },
    "TRADESLoss, one move": criterion(TRADESLoss, THREE, clean_updates=1),
    "perturb, soft labels": softly(perturbed(THREE)),
    "augmix_loss, soft labels": softly(augmix(ONE)),
    "AWP": weight_perturbed(),
    **{f"Memory, {kind.__name__}": remembering(kind) for kind in (TRADESLoss, MARTLoss, PGDLoss)},
    "Memory, mining": remembering(TRADESLoss, BulletTrain(), engine="fast"),
    "Memory, minibatch": begun_at_a_memory,
    "trades_loss, memory": remembered_by(trades_loss, BulletTrain()),
    "AWP, mining": weight_perturbed(THREE),
    "AWP, moved": weight_perturbed(THREE, samples="moved"),
    "AWP, warm-up": weight_perturbed(gamma=0),
    "TRADESLoss, selected": criterion(TRADESLoss, THREE, logits=lambda output: output),
    "MARTLoss, batch": criterion(MARTLoss, attack=PGD(0.1, 0.05, STEPS, statistics="batch")),
    "PGDLoss, tracked": criterion(PGDLoss, attack=PGD(0.1, 0.05, STEPS, statistics="tracked")),
    "Logits": selected,
    "perturb": perturbed(),
    "perturb, dlr, mining": perturbed(THREE, PGD(0.1, 0.05, STEPS, inner="dlr")),
    "perturb, a function": perturbed(attack=PGD(0.1, 0.05, STEPS, inner=away)),
    "perturb, mining": perturbed(THREE, engine="fast"),
    "perturb, by sample": perturbed_by_sample(),
    "perturb, by sample, mining": perturbed_by_sample(THREE, engine="fast"),
    "perturb, normalised": perturbed(attack=PGD(0.1, 0.05, STEPS, normalization=PIXELS)),
    "TRADESLoss, APGD": criterion(TRADESLoss, THREE, APGD(0.1, STEPS)),
    "PGDLoss, APGD": criterion(PGDLoss, attack=APGD(0.1, STEPS, inner="dlr_targeted")),
    "PGDLoss, best": criterion(PGDLoss, attack=PGD(0.1, 0.05, STEPS, keep="best"), engine="exact"),
    "perturb, APGD": perturbed(THREE, attack=APGD(0.1, STEPS, "l2", "uniform", "dlr")),
    "AugMixLoss": lambda m, x, y: AugMixLoss()(m, x, y, generator=seeded()),
    "AugMixLoss, mining": lambda m, x, y: AugMixLoss(copy.deepcopy(ONE))(m, x, y, generator=seeded()),
    "augmix_loss": augmix(),
    "augmix_loss, no jsd": augmix(jsd=False),
    "augmix_loss, bullet": augmix(ONE),
    "fast_loss": lambda m, x, y: fast_loss(trades_loss, m, x, y, None, epsilon=0.1, generator=seeded()),
    "grad_align": lambda m, x, y: grad_align(m, x, y, epsilon=0.1, generator=seeded()),
    **{f"yopo_loss, {objective}": yopo(objective) for objective in ("pgd", "trades", "mart")},
    "generate": generated(),
    "generate, view": generated(engine="fast"),
    "generate, margin": generated(inner="margin"),
    "generate, a function": generated(inner=away),
    "evaluate": evaluated(),
    "evaluate, margin, view": evaluated(loss="margin", engine="fast"),
    "evaluate, APGD": evaluated(APGD(0.1, STEPS), restarts=2, engine="fast"),
    "evaluate, lse": evaluated(loss="lse"),
    "autoattack": autoattacked,
    "augment_and_mix": lambda m, x, y: augment_and_mix(x, draw_choices(len(x), x.device, generator=seeded())),
    "CropAndFlip": cropped,
    "Normalize": lambda m, x, y: Normalize((0.5,), (0.25,))(x),
    "BulletTrain": mined,
    "METRICS": measured,
    "Guard": guarded,
    "PowerMonitor": watched,
}
