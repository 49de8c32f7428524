"""The checks of `bt-fast doctor`: every op on a device against its float64 reference on the CPU, and a whole step.

`pytest -m cuda` is the full check. Here each kind of input has one case: short and long rows, one sample, NaN, 16 bits,
channels-last. A reference in float64 on the CPU shares neither the kernel nor the op's dtype, so a check can fail on
the CPU too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bt_fast import PGD, BulletTrain, GraphRunner, StreamRunner, TRADESLoss, Update, ops
from bt_fast.attack.auto import AutoRunner
from bt_fast.attack.device import no_graphs_reason
from bt_fast.attack.graph_cache import GraphCache
from bt_fast.attack.runners import Runner, run_eager
from bt_fast.device import out_of_memory
from bt_fast.full_precision import full_precision
from bt_fast.lab.doctor_memory import (
    recall_cases,
    recalled,
    recalled_plainly,
    remember_cases,
    remembered,
    remembered_plainly,
)
from bt_fast.lab.models import build_model
from bt_fast.objectives.adversarial import Call
from bt_fast.objectives.execution import Execution
from bt_fast.ops import divergence
from bt_fast.ops.ascent_direction import ascent_direction_reference
from bt_fast.ops.assign_steps import assign_reference
from bt_fast.ops.availability import first_line as type_and_message
from bt_fast.ops.gather_start import gather_start_reference
from bt_fast.ops.pgd_l2_step import l2_reference
from bt_fast.ops.pgd_step import linf_reference
from bt_fast.ops.signed_variance import signed_variance_reference
from bt_fast.ops.update_fraction import update_fraction_reference

Outputs = Mapping[str, Tensor]
Arguments = dict[str, Any]

LOGITS = "float32, float16, bfloat16"
IMAGES = f"dense images in {LOGITS}"
SAMPLES = "up to 2^20 samples"
SVAR = f"SVar in float32 of {SAMPLES}"


FULL = "the memory is full"


def reason(error: BaseException) -> str:
    """Returns type and first line of an error's message; for a check's AssertionError only the first line."""
    if isinstance(error, AssertionError):
        return (str(error).splitlines() or ["no message"])[0]
    return f"{FULL}: {type_and_message(error)}" if out_of_memory(error) else type_and_message(error)


@dataclass(frozen=True)
class Check:
    """An op and its reference.

    Attributes:
        op: its name in `bt_fast.ops`. reference: the same in plain torch.
        results: calls its first argument with the others; returns all that the call returns or changes, by name.
        cases: arguments on the CPU, by the case's name.
        tolerance: relative and absolute, for float32 or wider results; 16 bits add two units in the last place.
        cuda_tests, tests: words in the names of its full check in tests/kernels/test_on_cuda.py, and in the name of the
            test file that needs no GPU.
        fused: the inputs its kernel takes; others run in plain torch.
    """

    op: str
    results: Callable[..., Outputs]
    reference: Callable[..., Any]
    cases: Callable[[], Mapping[str, Arguments]]
    tolerance: float
    cuda_tests: str
    tests: str
    fused: str = LOGITS


def largest_difference(check: Check, arguments: Arguments, device: torch.device) -> float:
    """Returns the largest absolute difference of the op on the device from its float64 reference on the CPU.

    Raises AssertionError like `compare`.
    """
    # looked up at every call; for a loss the op is that of its rows
    run = getattr(divergence, f"{check.op}_rows", None) or getattr(ops, check.op)
    on_device = {k: v.clone().to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    results = check.results(run, **on_device)
    expected = check.results(check.reference, **{name: _widened(value) for name, value in arguments.items()})
    return compare({name: value.cpu() for name, value in results.items()}, expected, check.tolerance)


def _widened(value: Any) -> Any:
    """Returns a copy, in float64 for floating-point tensors."""
    if not isinstance(value, Tensor):
        return value
    return value.to(torch.float64, copy=True) if value.is_floating_point() else value.clone()


def compare(results: Outputs, expected: Outputs, tolerance: float) -> float:
    """Returns the largest absolute difference of floating-point results within `tolerance` (relative and absolute).

    Raises AssertionError, which names the result, if it is larger, or if integers, signs or the places of NaN differ.
    """
    largest = 0.0
    for name, right in expected.items():
        value = results[name]
        if value.shape != right.shape:
            raise AssertionError(f"{name} has shape {list(value.shape)}, expected {list(right.shape)}")
        if not value.is_floating_point():
            if places := int((value != right).sum()):
                raise AssertionError(f"{name} differs in {places} of {value.numel()} places")
            continue
        if places := int((value.isnan() != right.isnan()).sum()):
            raise AssertionError(f"{name} is NaN in other places than it should ({places} of {value.numel()})")
        gap = torch.where(value.double() == right, 0.0, (value.double() - right).abs()).nan_to_num(0.0, torch.inf)
        most = float(gap.max()) if gap.numel() else 0.0
        bound = tolerance + (2 * torch.finfo(value.dtype).eps if value.dtype.itemsize == 2 else 0.0)
        if bool((gap > bound * (1 + right.abs().nan_to_num(0.0))).any()):
            raise AssertionError(f"{name} differs by up to {most:.2g} (allowed: {bound:.2g})")
        largest = max(largest, most)
    return largest


# Cases


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _logits(m: int, k: int, dtype: torch.dtype, faults: bool, count: int = 1) -> list[Tensor]:
    """Returns `count` batches [m, k]; with `faults` every fourth row holds NaN in all of them."""
    z = 3 * torch.randn(count, m, k, generator=_generator())
    if faults:
        z[:, ::4, 1] = torch.nan
    return list(z.to(dtype))


def _labels(z: Tensor) -> Tensor:
    """Returns labels int64 [m] that are right for two rows of three."""
    best = z.float().argmax(dim=1)
    return torch.where(torch.arange(len(z)) % 3 == 0, (best + 1) % z.shape[1], best)


ROWS = {
    "128 x 10": (128, 10, torch.float32, False),
    "one row": (1, 10, torch.float32, False),
    "NaN rows": (33, 10, torch.float32, True),
    "bfloat16, 100 classes": (33, 100, torch.bfloat16, False),
    "float16, 9000 classes": (5, 9000, torch.float16, True),
}
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
IMAGE_BATCHES = {  # shape, dtype, layout, whether with NaN
    "16 x 3 x 32 x 32": ((16, 3, 32, 32), torch.float32, CONTIGUOUS, False),
    "one sample": ((1, 1, 28, 28), torch.float32, CONTIGUOUS, False),
    "NaN, float16, channels-last": ((5, 3, 15, 37), torch.float16, CHANNELS_LAST, True),
    "bfloat16, long samples": ((4, 3, 64, 64), torch.bfloat16, CONTIGUOUS, False),
}


def _rows(of: Callable[..., Arguments], count: int = 1) -> Callable[[], dict[str, Arguments]]:
    """Returns a maker of cases of an op over rows of logits, with arguments `of(*logits)`."""
    return lambda: {name: of(*_logits(*kind, count)) for name, kind in ROWS.items()}


def _outputs(returned: Sequence[str] = (), changed: Sequence[str] = ()) -> Callable[..., Outputs]:
    """Returns a caller of an op, with names for its results, and the names of the arguments that it changes."""

    def results(run: Callable[..., Any], **arguments: Any) -> Outputs:
        out = run(**arguments) or ()
        return {**dict(zip(returned, out, strict=True)), **{name: arguments[name] for name in changed}}

    return results


def _way_case(z: Tensor) -> Arguments:
    far = torch.randn(z.shape, generator=_generator().manual_seed(1)).softmax(dim=1)
    far[::2] = torch.nn.functional.one_hot(_labels(z), z.shape[1]).float()[::2]
    return {"logits": z, "target": far}


def _directed(run: Callable[..., Any], **arguments: Any) -> Outputs:
    """Returns the direction scaled to 1, and whether its scale, a power of two that the last bit can move, is right."""
    direction = run(**arguments)
    largest = direction.double().abs().amax(dim=1, keepdim=True)
    return {"direction": (direction / largest).to(direction.dtype), "scale": (largest >= 1) & (largest <= 2)}


def _mined(run: Callable[..., Any], logits: Tensor, labels: Tensor) -> Outputs:
    svar, correct, probabilities, unfit = run(logits, labels)
    scaled = svar * logits.shape[1] ** 2  # the variance can be far below 1
    signs = svar.nan_to_num().signbit()
    return {"svar": scaled, "sign": signs, "correct": correct, "probabilities": probabilities, "unfit": unfit}


def _fraction_case(z: Tensor) -> Arguments:
    state = {"robust_fraction": torch.tensor(0.3, dtype=torch.float64), "unreported_faults": torch.tensor(2)}
    return {**state, "logits": z, "labels": _labels(z), "gamma": 0.8, "momentum": 0.9}


def _assign_cases() -> dict[str, Arguments]:
    cases = {}
    for m, kind in ((128, "plain"), (1, "one sample"), (0, "no sample"), (33, "NaN"), (300, "ties"), (10_000, "many")):
        g = _generator()
        svar = torch.randn(m, generator=g) * 0.1
        svar = svar.mul(20).round() / 20 if kind == "ties" else svar
        if kind == "NaN":
            svar[::5] = torch.nan
        cases[kind] = {
            "svar": svar,
            "correct": torch.rand(m, generator=g) < 0.7,
            "robust_fraction": torch.tensor(1 / 3, dtype=torch.float64),
            "group_steps": (0, 10, 2),
            "group_step_sizes": (0.1, 0.007, 0.017),
            "unfit": torch.arange(m).eq(3).to(torch.uint8) if kind == "NaN" else None,
            "group_counts": torch.tensor([5, 6, 7]),
        }
    return cases


def _order_cases() -> dict[str, Arguments]:
    sizes = {"128": 128, "one sample": 1, "no sample": 0, "many": 10_000}
    return {k: {"steps": torch.randint(0, 12, (m,), generator=_generator()), "most": 12} for k, m in sizes.items()}


def _order_stated(steps: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Computes the order by Python's sort."""
    counts = steps.tolist()
    order = sorted(range(len(counts)), key=lambda i: -counts[i])
    return torch.tensor(order).long(), torch.tensor([sum(n > t for n in counts) for t in range(most)])


def _step_cases(norm: str) -> dict[str, Arguments]:
    cases = {}
    for name, (shape, dtype, layout, faults) in IMAGE_BATCHES.items():
        g = _generator()
        clean, grad = torch.rand(shape, generator=g), torch.randn(shape, generator=g)
        x_adv = clean + 0.1 * torch.randn(shape, generator=g)
        grad[:, :, 0] = 0.0
        if faults:
            grad[1, 0, 3, 4] = torch.nan
        size, n = 1.0 if norm == "l_inf" else clean[0].numel() ** 0.5, len(clean)
        images = {"x_adv": x_adv, "grad": grad, "clean": clean}
        arguments: Arguments = {k: v.to(dtype, memory_format=layout) for k, v in images.items()}
        arguments |= {"step_size": torch.full((n,), 0.125 * size), "epsilon": 0.25 * size, "lower": 0.0, "upper": 1.0}
        arguments |= {"steps": torch.tensor([2, 2, 1, 3, 0] * n)[:n], "step": torch.tensor(1)}
        if norm == "l_2":
            arguments["stand_in"] = torch.tensor(5)  # a seed, for the sample with a gradient of 0
            arguments["grad"][0].mul_(float(dtype != torch.bfloat16))
        cases[name] = {**arguments, "faulty": torch.zeros(n, dtype=torch.int32)}
    return cases


def _start_cases() -> dict[str, Arguments]:
    cases = {}
    for name, (shape, dtype, layout, faults) in IMAGE_BATCHES.items():
        m, g = shape[0], _generator()
        arguments: Arguments = {"x": torch.rand(shape, generator=g).to(dtype, memory_format=layout)}
        arguments |= {"order": torch.randperm(m, generator=g), "steps": torch.tensor([2, 0, 3, 1] * m)[:m]}
        arguments |= {"state": torch.tensor([2**40 + 7, 11]), "noise": "uniform" if faults else "normal"}
        cases[name] = {**arguments, "scale": 0.25, "lower": 0.0, "upper": 1.0}
    return cases


def _start_stated(**arguments: Any) -> tuple[Tensor, Tensor]:
    start = gather_start_reference(**arguments)
    arguments["state"][1] += 1
    return start


def _losses(run: Callable[..., Any], **arguments: Any) -> Outputs:
    loss, *gradients = run(*arguments.values())
    return {"loss": loss, **{f"gradient {i}": g for i, g in enumerate(gradients)}}


def _graded(op: str) -> Callable[..., tuple[Tensor, ...]]:
    """Returns the reference's loss and its gradients by autograd instead of the reference's own derivation."""

    def reference(*arguments: Any) -> tuple[Tensor, ...]:
        logits = [a.requires_grad_() for a in arguments if isinstance(a, Tensor) and a.is_floating_point()]
        loss = getattr(divergence, f"{op}_reference")(*arguments)[0]
        return loss.detach(), *torch.autograd.grad(loss.sum(), logits)

    return reference


_mined_cases = _rows(lambda z: {"logits": z, "labels": _labels(z)})
_trades_cases = _rows(lambda a, b: {"adversarial": a, "clean": b}, 2)
_mart_cases = _rows(lambda a, b: {"clean": a, "adversarial": b, "labels": _labels(a), "beta": 6.0}, 2)
_js_cases = _rows(lambda a, b, c: {"clean": a, "first": b, "second": c}, 3)
_way_cases, _fraction_cases = _rows(_way_case), _rows(_fraction_case)
_linf_cases, _l2_cases = partial(_step_cases, "l_inf"), partial(_step_cases, "l_2")

_assigned = _outputs(("threshold", "group", "steps", "step_size", "order", "counts"), ("group_counts",))
_ordered = _outputs(("order", "active"))
_started = _outputs(("clean", "start"), ("state",))
_stepped = _outputs(changed=("x_adv", "faulty"))
_moved = _outputs(changed=("robust_fraction", "unreported_faults"))

_recall = recalled, recalled_plainly, partial(recall_cases, IMAGE_BATCHES)
_remember = remembered, remembered_plainly, partial(remember_cases, IMAGE_BATCHES)

CHECKS = (
    Check("signed_variance", _mined, signed_variance_reference, _mined_cases, 2e-6, "rows", "signed_variance"),
    Check("assign_steps", _assigned, assign_reference, _assign_cases, 1e-12, "assign", "assign_steps", SVAR),
    Check("order_by_steps", _ordered, _order_stated, _order_cases, 0.0, "order", "order_by_steps", SAMPLES),
    Check("gather_start", _started, _start_stated, _start_cases, 2e-6, "gather", "gather_start", IMAGES),
    Check("ascent_direction", _directed, ascent_direction_reference, _way_cases, 4e-6, "rows", "ascent_direction"),
    Check("linf_step_", _stepped, linf_reference, _linf_cases, 1e-6, "linf", "pgd_step", IMAGES),
    Check("l2_step_", _stepped, l2_reference, _l2_cases, 4e-6, "l2", "pgd_l2_step", IMAGES),
    Check("recall", *_recall, 4e-6, "recall", "memory_ops", IMAGES),
    Check("remember_", *_remember, 1e-6, "remember", "memory_ops", IMAGES),
    Check("update_fraction_", _moved, update_fraction_reference, _fraction_cases, 1e-15, "update", "update_fraction"),
    Check("trades_kl", _losses, _graded("trades_kl"), _trades_cases, 2e-5, "losses", "divergence"),
    Check("mart_loss", _losses, _graded("mart_loss"), _mart_cases, 1e-4, "losses", "divergence"),
    Check("js_divergence", _losses, _graded("js_divergence"), _js_cases, 2e-5, "losses", "divergence"),
)

# A whole step


def _eager() -> Runner:
    return run_eager


@dataclass(frozen=True)
class StepCheck:
    """A check of one execution of `TRADESLoss` with BulletTrain, without TF32, against eager float64 on the device.

    Attributes:
        runner: makes the runner of the attack. update: the way the update runs.
        dtype: of the network and the images.
        tolerance: relative and absolute. In float32 signs differ if a gradient is almost 0, in float64 hardly ever.
        graphs: whether it needs CUDA graphs.
    """

    name: str
    runner: Callable[[], Runner]
    dtype: torch.dtype
    tolerance: float
    graphs: bool = True
    update: Update | None = None


SHARPER = 10.0  # a factor on a new network's weights; without the attack an update's loss then differs by a third
LOOSE, TIGHT = 0.1, 1e-6  # LOOSE holds only without TF32, which gives another x'
STEPS = (
    StepCheck("eager, float32", _eager, torch.float32, LOOSE, graphs=False),
    StepCheck("graphs, float64", GraphRunner, torch.float64, TIGHT),
    StepCheck("graphs, float32", GraphRunner, torch.float32, LOOSE),
    StepCheck("streams, float64", StreamRunner, torch.float64, TIGHT),
    StepCheck("auto, float32", AutoRunner, torch.float32, LOOSE),
    StepCheck("update from graphs, float64", _eager, torch.float64, TIGHT, update=Update(graphs=True)),
)


def skip_reason(check: StepCheck, device: torch.device) -> str | None:
    """Returns why the step cannot run this way on the device, or None."""
    return no_graphs_reason(torch.empty(0, device=device)) if check.graphs else None


def step_difference(check: StepCheck, device: torch.device) -> float:
    """Returns the largest difference of losses, gradients and F_R in some updates.

    Raises AssertionError if it exceeds the tolerance, or if the step fell back to another way.
    """
    with full_precision(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        expected = _updates(device, torch.float64, run_eager, None)
        results = _updates(device, check.dtype, check.runner(), check.update)
    if fallen := [str(w.message) for w in caught if "without graphs" in str(w.message)]:
        raise AssertionError(fallen[0])
    if not all(bool(v.isfinite().all()) for v in expected.values()):
        raise AssertionError("a loss or a gradient of the eager step is not finite")
    return compare(results, expected, check.tolerance)


def _updates(
    device: torch.device, dtype: torch.dtype, runner: Runner, update: Update | None, updates: int = 3
) -> Outputs:
    """Returns loss and size of the gradient of each update, and F_R at the end, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_model("wrn-10-1", in_channels=3, image_size=16, num_classes=10).double()
        list(network.parameters())[-2].data *= SHARPER
        x = torch.rand(16, 3, 16, 16).double()
        y = _labels(network.eval()(x).detach()).to(device)
    model, x = network.train().to(device, dtype), x.to(device, dtype)
    mining, noise = BulletTrain(3, 2, 1).to(device), torch.Generator(device).manual_seed(0)
    criterion = TRADESLoss(PGD(0.1, 0.02, 3), beta=6.0, mining=mining, engine="exact")
    call = Call(Execution(None, runner, update, GraphCache()), None, noise, None, None)
    losses, sizes = [], []
    for _ in range(updates):
        model.zero_grad()
        loss = criterion.of_call(model, x, y, call)
        loss.backward()
        losses.append(loss.detach().clone())
        gradients = [p.grad.double().norm() for p in model.parameters() if p.grad is not None]
        sizes.append(torch.stack(gradients).norm())
    results = {"losses": torch.stack(losses), "gradients": torch.stack(sizes), "F_R": mining.robust_fraction}
    return {name: value.detach().cpu() for name, value in results.items()}
