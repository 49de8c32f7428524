import math

import pytest
import reference_trades
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plain_pgd import by_input, loss_of, projected_step
from pretended_device import DEVICE, pretended_device
from small_models import CLASSES, SHAPE, Dead, Undefined, assert_unchanged, batch, build, snapshot, with_bright
from tolerances import DTYPES, TOLERANCES, assert_near
from torch import nn

from bt_fast import Plan, ThreatModel, generate
from bt_fast.attack.inner import NAMES
from bt_fast.attack.runners import input_gradient
from bt_fast.plan import Known

NORMS = ["l_inf", "l_2"]
EPSILON = {"l_inf": 0.031, "l_2": 0.3}
STEPS = torch.tensor([3, 0, 1, 5, 0, 2, 5, 1])


def case(m=8, model="conv_bn", dtype=torch.float64, seed=0):
    """Returns a model, clean images, starts, and the clean distribution."""
    model = build(model, seed, dtype)
    x, _ = batch(m, seed, dtype)
    start = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    model.eval()
    target = model(x).detach().softmax(dim=1)
    return model.train(), x, start, target


def sizes_of(m):
    return torch.linspace(0.004, 0.04, m, dtype=torch.float64)


def attack(model, x, start, target, steps, sizes, norm="l_inf", **options):
    """Runs `generate` and returns the result in the batch's own order."""
    plan = Plan.from_steps(steps, sizes)
    threat = ThreatModel(EPSILON[norm], norm)
    rows = [plan.sort(t) for t in (x, start, target)]
    result = generate(model, *rows, plan, threat, **options)
    unsorted = torch.full_like(result, math.nan)
    unsorted[plan.order] = result
    return unsorted


def one_by_one(model, x, start, steps, sizes, norm):
    """Attacks each sample alone by the authors' loops; ℓ2 runs step by step, since each step has its own size."""
    model.eval()
    result = start.clone()
    for i, n in enumerate(steps.tolist()):
        one, x_i, size = result[i : i + 1], x[i : i + 1], sizes[i].item()
        for _ in range(n):
            if norm == "l_inf":
                one = reference_trades.linf_attack(model, x_i, one, size, EPSILON[norm], 1)
                continue
            probe = one.detach().requires_grad_()
            (g,) = torch.autograd.grad(reference_trades.divergence(model, probe, x_i), probe)
            assume(g.norm() > 0)
            delta = (one + size * g / g.norm()).clamp(0, 1) - x_i
            one = x_i + delta.renorm(2, 0, EPSILON[norm])
        result[i : i + 1] = one
    model.train()
    return result


# The result


@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.integers(0, 1000))
def test_every_policy_of_steps_is_each_sample_attacked_alone(norm, steps, seed):
    model, x, start, target = case(len(steps), seed=seed)
    steps, sizes = torch.tensor(steps), sizes_of(len(steps))
    result = attack(model, x, start, target, steps, sizes, norm)
    assert_near(result, one_by_one(model, x, start, steps, sizes, norm))


@pytest.mark.parametrize("norm", NORMS)
def test_a_samples_result_does_not_depend_on_its_batch(norm):
    model, x, start, target = case()
    whole = attack(model, x, start, target, STEPS, sizes_of(8), norm)
    for rows in ([3], [1, 4], [7, 2, 0, 5], list(range(7, -1, -1))):
        part = [t[rows] for t in (x, start, target, STEPS, sizes_of(8))]
        assert_near(attack(model, *part, norm), whole[rows])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_steps_give_the_start_to_the_bit_even_outside_the_threat_model(norm, dtype):
    model, x, start, target = case(dtype=dtype)
    start[1], start[4] = 7.0, -math.inf
    result = attack(model, x, start, target, STEPS, sizes_of(8), norm)
    assert torch.equal(result[STEPS == 0], start[STEPS == 0])
    assert not torch.equal(result[STEPS > 0], start[STEPS > 0])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_perturbation_stays_in_the_threat_model(norm, dtype):
    model, x, _, target = case(dtype=dtype)
    far = x + 5.0 * torch.randn(x.shape).to(dtype)
    result = attack(model, x, far, target, STEPS.clamp(min=1), 10 * sizes_of(8), norm)
    delta = (result - x).double().flatten(1)
    size = delta.abs().amax(dim=1) if norm == "l_inf" else delta.norm(dim=1)
    assert (size <= EPSILON[norm] + TOLERANCES[dtype]["atol"]).all()
    assert result.min() >= 0.0
    assert result.max() <= 1.0


@pytest.mark.filterwarnings("ignore:epsilon=")
def test_bounds_other_than_0_and_1():
    model, x, start, target = case()
    plan = Plan.uniform(8, 5, 0.5, x.device)
    result = generate(model, x, start, target, plan, ThreatModel(10.0, "l_inf", -0.25, 0.75))
    assert (result.min(), result.max()) == (-0.25, 0.75)


@pytest.mark.parametrize("norm", NORMS)
def test_an_attack_ascends(norm):
    model, x, start, target = case()
    result = attack(model, x, start, target, torch.full((8,), 5), sizes_of(8) + 0.02, norm)
    model.eval()
    before, after = (
        torch.tensor([reference_trades.divergence(model, t[i : i + 1], x[i : i + 1]).item() for i in range(8)])
        for t in (start, result)
    )
    assert (after > before).all()


def test_nothing_to_attack():
    model, x, start, target = case()
    none = torch.zeros(8, dtype=torch.int64)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(attack(model, x, start, target, none, sizes_of(8)), start)
    empty = attack(model, x[:0], start[:0], target[:0], none[:0], sizes_of(8)[:0])
    assert empty.shape == (0, *SHAPE)
    assert not calls


def unit(grad):
    return grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def test_the_input_gradient_points_along_that_of_the_divergence_and_of_the_cross_entropy():
    model, x, start, target = case()
    model.eval()
    probe = start.clone().requires_grad_()
    (of_kl,) = torch.autograd.grad(reference_trades.divergence(model, probe, x), probe)
    assert_near(unit(input_gradient(model, start, target)), unit(of_kl))
    y = torch.arange(8) % CLASSES
    (of_ce,) = torch.autograd.grad(nn.functional.cross_entropy(model(probe), y, reduction="sum"), probe)
    one_hot = nn.functional.one_hot(y, CLASSES).double()
    assert_near(unit(input_gradient(model, start, one_hot)), unit(of_ce))


class HalfBody(nn.Module):
    """A 16-bit body under a float32 head: logits are float32, but the gradient passes through 16 bits."""

    def __init__(self, dtype):
        super().__init__()
        self.body, self.dtype = nn.Linear(36, CLASSES).to(dtype), dtype

    def forward(self, x):
        return self.body(x.flatten(1).to(self.dtype)).float()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_tiny_gradient_survives_a_16_bit_body(dtype):
    torch.manual_seed(0)
    model, (x, _) = HalfBody(dtype), batch(dtype=torch.float32)
    logits = model(x).detach()
    target = logits.double().softmax(dim=1).float()  # rounded as the op rounds its target
    target[:, 0] += 1e-7
    target[:, 1] -= 1e-7
    grad = input_gradient(model, x, target)
    expected = (model.body.weight[1] - model.body.weight[0]).float().sign().view(1, *SHAPE)
    assert (grad.sign() == expected).float().mean() > 0.95


@pytest.mark.parametrize("norm", NORMS)
def test_samples_whose_gradient_holds_nan_stay_and_are_marked(norm):
    model, (x, _) = build(Undefined), with_bright([0, 3, 4])
    target = model.eval()(x).detach().flip(1).softmax(dim=1)
    plan, faulty = Plan.from_steps(STEPS, sizes_of(8)), torch.zeros(8, dtype=torch.int32)
    rows = [plan.sort(t) for t in (x, x, target)]
    result = generate(model, *rows, plan, ThreatModel(EPSILON[norm], norm), faulty=faulty)
    marked = torch.tensor([1, 0, 0, 1, 0, 0, 0, 0], dtype=torch.bool)  # sample 4 takes no step
    assert torch.equal(faulty.bool(), marked[plan.order])
    stays = (result == rows[0]).flatten(1).all(dim=1)
    assert torch.equal(stays, (marked | (STEPS == 0))[plan.order])
    with pytest.raises(ValueError, match=r"faulty must have shape \[8\], got \[7\]"):
        generate(model, *rows, plan, ThreatModel(0.03), faulty=faulty[1:])


# The inner loss


def along(loss, model, x, start, steps, sizes, norm):
    """Attacks each sample alone by a plain loop; `loss` is a function of the model's outputs and the sample's row."""
    model.eval()
    result = start.clone()
    for i, n in enumerate(steps.tolist()):
        one = result[i : i + 1]
        for _ in range(n):
            probe = one.detach().requires_grad_()
            grad = by_input(loss(model(probe), i), probe)
            one = projected_step(one, grad, x[i : i + 1], ThreatModel(EPSILON[norm], norm), sizes[i].item())
        result[i : i + 1] = one
    model.train()
    return result


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("inner", NAMES)
@pytest.mark.parametrize("engine", ["exact", "fast"])
def test_every_inner_loss_is_that_of_each_sample_attacked_alone(norm, inner, engine):
    model, x, start, clean = case()
    labels = torch.arange(8) % CLASSES
    target = clean if inner in ("kl", "lse") else F.one_hot(labels, CLASSES).double()
    result = attack(model, x, start, target, STEPS, sizes_of(8), norm, inner=inner, engine=engine)
    rows = [slice(i, i + 1) for i in range(8)]
    plain = along(
        lambda z, i: loss_of(inner, z, labels[rows[i]], target[rows[i]]), model, x, start, STEPS, sizes_of(8), norm
    )
    assert_near(result, plain)


@pytest.mark.parametrize("inner", ["margin", "dlr"])
def test_the_largest_entry_of_a_soft_target_is_the_label(inner):
    model, x, start, _ = case()
    hard = F.one_hot(torch.arange(8) % CLASSES, CLASSES).double()
    soft = 0.9 * hard + 0.1 / CLASSES
    of_hard, of_soft = (attack(model, x, start, t, STEPS, sizes_of(8), inner=inner) for t in (hard, soft))
    assert torch.equal(of_soft, of_hard)


@pytest.mark.parametrize("width", [1, 3])
def test_a_function_ascends_from_the_target_of_any_width(width):
    torch.manual_seed(0)
    model, (x, _) = nn.Sequential(nn.Flatten(), nn.Linear(36, width), nn.Tanh()).double(), batch()
    target, start = model(x).detach(), (x + 0.01).clamp(0, 1)
    seen = []

    def away(outputs, rows):
        seen.append((len(outputs), rows.labels))
        return (outputs - rows.clean_outputs).square().sum(dim=1)

    result = attack(model, x, start, target, STEPS, sizes_of(8), inner=away)
    assert seen == [(6, None), (4, None), (3, None), (2, None), (2, None)]
    plain = along(lambda z, i: (z - target[i]).square().sum(), model, x, start, STEPS, sizes_of(8), "l_inf")
    assert_near(result, plain)


def test_a_function_is_given_targets_of_16_bits_in_32():
    model, x, start, target = case(dtype=torch.float32)
    kinds = []

    def away(outputs, rows):
        kinds.append((outputs.dtype, rows.clean_outputs.dtype))
        return (outputs - rows.clean_outputs).square().sum(dim=1)

    attack(model.bfloat16(), x.bfloat16(), start.bfloat16(), target.bfloat16(), STEPS, sizes_of(8), inner=away)
    assert set(kinds) == {(torch.float32, torch.float32)}


@pytest.mark.parametrize(
    ("inner", "columns", "error", "message"),
    [
        ("hinge", CLASSES, ValueError, "inner must be one of 'kl'.*write inner='cross_entropy'"),
        ("dlr_targeted", CLASSES, ValueError, "inner must be one of 'kl'.*got 'dlr_targeted'"),
        (None, CLASSES, TypeError, "inner must be one of 'kl'.*got None"),
        ("dlr", 2, ValueError, "the model must have K >= 3 classes, got 2"),
        *((name, 7, ValueError, r"target must have shape \[6, 5\].*got \[6, 7\]") for name in NAMES),
        (lambda z, rows: z.sum(), CLASSES, ValueError, r"inner must return shape \[6\]"),
    ],
)
def test_an_inner_loss_that_does_not_fit_is_an_error(inner, columns, error, message):
    model, x, start, _ = case()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        attack(model, x, start, torch.eye(8, columns).double(), STEPS, sizes_of(8), inner=inner)
    assert_unchanged(before, model)


# What it costs


@pytest.mark.parametrize("norm", NORMS)
def test_the_groups_advance_together_and_only_active_samples_are_computed(norm):
    model, x, start, target = case()
    sizes = []
    model.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    attack(model, x, start, target, STEPS, sizes_of(8), norm)
    assert len(sizes) == STEPS.max()
    assert sum(sizes) == STEPS.sum()


def test_no_parameter_gradient_is_computed():
    model, x, start, target = case()
    computed = []
    for p in model.parameters():
        p.register_hook(computed.append)
    attack(model, x, start, target, STEPS, sizes_of(8))
    assert not computed


@pytest.mark.parametrize("norm", NORMS)
def test_an_attack_waits_for_nothing_on_a_device(norm):
    model, x, start, target = (t.to(DEVICE) for t in case())
    steps, sizes = torch.ones(8, device=DEVICE).long(), torch.full((8,), 0.01, device=DEVICE)
    plan = Plan(steps, sizes, None, Known((8, 8, 3, 1)), 4)
    with pretended_device() as reads:
        result = generate(model, x, start, target, plan, ThreatModel(0.031, norm))
    assert result.device == DEVICE
    assert reads.started == 0


# What it leaves alone


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["conv_bn", "dropout", "tied norm", "cumulative average"])
@pytest.mark.parametrize("error", [False, True])
def test_the_model_and_the_inputs_are_left_alone(norm, name, error):
    model, x, start, target = case(model=name)
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.full_like(parameters[1], math.pi)
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    x.requires_grad_()
    inputs = [t.detach().clone() for t in (x, start, target)]
    before = snapshot(model)
    if error:
        calls = []
        hook = model.register_forward_hook(lambda *_: calls.append(1) or (1 / 0 if len(calls) == 3 else None))
        with pytest.raises(ZeroDivisionError):
            attack(model, x, start, target, STEPS, sizes_of(8), norm)
        hook.remove()
    else:
        assert not attack(model, x, start, target, STEPS, sizes_of(8), norm).requires_grad
    assert_unchanged(before, model)
    assert all(torch.equal(a, b) for a, b in zip(inputs, (x, start, target), strict=True))
    assert x.grad is None


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_the_callers_gradient_mode_does_not_matter(context):
    model, x, start, target = case()
    expected = attack(model, x, start, target, STEPS, sizes_of(8))
    with context():
        enabled = torch.is_grad_enabled()
        assert torch.equal(attack(model, x, start, target, STEPS, sizes_of(8)), expected)
        assert torch.is_grad_enabled() == enabled


def test_channels_last_images_stay_channels_last():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, CLASSES)).double()
    x = torch.rand(4, 3, 6, 6, dtype=torch.float64)
    target = model(x).detach().flip(1).softmax(dim=1)
    plan = Plan.uniform(4, 3, 0.01, x.device)
    plain = generate(model, x, x, target, plan, ThreatModel(0.031))
    last = x.to(memory_format=torch.channels_last)
    result = generate(model, last, last, target, plan, ThreatModel(0.031))
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert_near(result, plain)


# Random numbers


def dead_case():
    x, _ = batch()
    return build(Dead), x, x.clone(), torch.full((8, CLASSES), 1 / CLASSES, dtype=torch.float64)


def test_a_zero_l2_gradient_is_replaced_by_noise_and_a_zero_linf_gradient_by_nothing():
    result = attack(*dead_case(), STEPS, sizes_of(8), "l_2")
    x = dead_case()[1]
    moved = (result - x).flatten(1).norm(dim=1)
    assert torch.equal(moved > 0, STEPS > 0)
    assert (moved <= EPSILON["l_2"] + 1e-9).all()
    assert torch.equal(attack(*dead_case(), STEPS, sizes_of(8), "l_inf"), x)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("arrange", [case, dead_case])
def test_a_generator_is_the_only_source_of_random_numbers(norm, arrange):
    torch.manual_seed(0)
    inputs = arrange()
    state = torch.get_rng_state()

    def once(seed):
        generator = torch.Generator().manual_seed(seed)
        return attack(*inputs, STEPS, sizes_of(8), norm, generator=generator)

    assert torch.equal(once(1), once(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(once(1), once(2)) == (arrange is case or norm == "l_inf")


@pytest.mark.parametrize("norm", NORMS)
def test_no_number_is_drawn_where_no_gradient_is_0(norm):
    inputs = case()
    state = torch.get_rng_state()
    attack(*inputs, STEPS, sizes_of(8), norm)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "bad", "error", "message"),
    [
        ("clean", lambda t: t[:5], ValueError, r"clean must hold the plan's 8 samples.*\[5"),
        ("clean", lambda t: t.mul(255).byte(), TypeError, "clean must be floating-point.*uint8"),
        ("start", lambda t: t[:, :, :3], ValueError, r"start must have clean's shape.*\[8, 1, 3, 6\]"),
        ("start", lambda t: t.long(), TypeError, "start must be floating-point.*int64"),
        ("target", lambda t: t[:1], ValueError, r"target must have shape \[8, K\], got \[1, 5\]"),
        ("target", lambda t: t.argmax(dim=1)[:, None], TypeError, "target must be floating point, got torch.int64"),
        ("target", lambda t: t[:, 0], ValueError, r"target must have shape \[8, K\], got \[8\]"),
    ],
)
def test_inputs_that_do_not_fit_together_are_named(name, bad, error, message):
    model, x, start, target = case()
    given_inputs = {"clean": x, "start": start, "target": target}
    given_inputs[name] = bad(given_inputs[name])
    with pytest.raises(error, match=message):
        generate(model, **given_inputs, plan=Plan.from_steps(STEPS, sizes_of(8)), threat=ThreatModel(0.03))
