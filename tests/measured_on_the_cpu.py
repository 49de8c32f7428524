"""Runs parts of benchmarks.on_gpu's iterations for test_on_gpu.py and prints what they recorded, as JSON."""

import json
import sys
import time
import warnings
from contextlib import nullcontext
from unittest import mock

import nvml_stub
import torch

from benchmarks.engine_parts import trades_by
from benchmarks.on_gpu import bandwidth, captures, iteration, variants
from benchmarks.on_gpu.iterations import tried_last
from benchmarks.on_gpu.stage import Context
from bt_fast import PowerMonitor, trades_loss

GPU = "GPU-aaaaaaaa-0000"
CPU = torch.device("cpu")


def wrong_beta(*given, **options):
    return trades_loss(*given, **options | {"beta": 6.00001})


def warns(*given, **options):
    warnings.warn("the attack runs without graphs: so", stacklevel=1)
    return trades_loss(*given, **options)


def raises(*given, **options):
    raise RuntimeError("capture failed")


def left_out(scratch):
    """Returns what is left out of a case when each of these functions computes our loss."""
    bench = variants.Bench("wrn-10-1", "tf32", 4, CPU, tiny=True)
    result, tried, exact = {}, {}, {}
    for name, ours in {"as it is": trades_loss, "beta": wrong_beta, "warns": warns, "raises": raises}.items():
        context = Context(name, "", time.monotonic() + 1000, scratch, True, "", None, 8.0)
        with mock.patch.object(variants, "trades_by", lambda *_, ours=ours, **__: ours):
            try:
                iteration.check(context, "n/tf32", bench, [variants.BY_NAME["optimised"]])
            except iteration.LeftOutError as error:
                print(error)
        result[name], tried[name] = context.records("left_out"), tried_last(context, "n/tf32")
        exact[name] = len(context.records("exact"))
    return result | {"tried last": tried, "exact": exact}


class FakeBench:
    """Records which variants ran; variants named in `says` warn with that message."""

    def __init__(self, device=CPU, **says):
        self.device, self.workload, self.ran, self.says = device, mock.Mock(), [], says

    def ready(self):
        pass

    def groups(self):
        return [2 * len(self.ran), 0, 0]

    def iteration(self, variant):
        def run():
            self.ran.append(variant.name)
            if messages := self.says.get(variant.name):
                warnings.warn(messages, stacklevel=1)

        return run


def some(*names):
    return [variants.BY_NAME[name] for name in names]


def warmed(scratch):
    """Returns the order in which variants run before they are timed."""
    context, bench = Context("x", "", time.monotonic() + 1000, scratch, True, "", None, 8.0), FakeBench()
    iteration.warm(context, "n/tf32", bench, some("reference", "bullet", "bullet, captured"))
    return {"ran": bench.ran, "groups": context.records("groups")}


def fell_back_later(scratch):
    """Returns the records of a variant that falls back while timed, and of one that ran without kernels."""
    context = Context("x", "", time.monotonic() + 1000, scratch, True, "", None, 8.0)
    bench = FakeBench(**{"bullet, graphs": "the attack runs without graphs: so"})
    works = {variant: bench.iteration(variant) for variant in some("bullet", "bullet, graphs")}
    iteration.rounds(context, "n/tf32", bench, works, 1)
    bench = FakeBench(optimised="bt_fast runs in plain torch on cuda:0, since so")
    works = iteration.warm(context, "n/bfloat16", bench, some("reference", "optimised"))
    return {"broke": context.records("broke"), "warmed": [variant.name for variant in works]}


def peaks(scratch):
    """Returns the variants with a reported peak memory on a GPU."""
    context = Context("x", "", time.monotonic() + 1000, scratch, True, "", None, 8.0)
    bench = FakeBench(torch.device("cuda", 0))
    works = {variant: bench.iteration(variant) for variant in some("reference", "bullet, graphs", "bullet, captured")}
    reported = dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), lambda: 7)
    nothing = dict.fromkeys(("reset_peak_memory_stats", "synchronize"), lambda *_: None)
    with mock.patch.multiple(torch.cuda, **reported, **nothing):
        iteration.peaks(context, "n/tf32", bench, works)
    return [record["variant"] for record in context.records("memory")]


def captures_of(scratch):
    """Returns which network each measured variant used, as the index of its first use."""
    context = Context("captures", "", time.monotonic() + 1000, scratch, True, "", None, 8.0)
    seen = []

    def captured(bench, variant):
        seen.append(bench.workload.model)
        return {"fell_back": None, "captures": 1, "capture_seconds": 0.0, "held_bytes": 0}

    with mock.patch.object(captures, "captured", captured), mock.patch.object(captures, "stand_in", nullcontext):
        captures.run(context)
    return [next(k for k, other in enumerate(seen) if other is model) for model in seen]


def groups(scratch):
    """Returns the sizes of BulletTrain's groups in an iteration under autocast, and the expected sizes."""
    bench = variants.Bench("wrn-10-1", "bfloat16", 128, CPU, tiny=True)
    bench.iteration(variants.BY_NAME["bullet"])()
    work = bench.workload
    return {"found": bench.groups(), "expected": [work.outliers, work.boundary, work.robust]}


def checked(scratch):
    """Returns the steps of each update in the exactness check of a bench with ten steps, and the results for NaN."""
    bench, steps, robust = variants.Bench("wrn-10-1", "tf32", 4, CPU), [], []

    def noted_by(*parts, bullet=None, **more):
        loss_of = trades_by(*parts, bullet=bullet, **more)

        def noted(*given, **options):
            steps.append([options.get("perturb_steps"), None if bullet is None else bullet.boundary_steps])
            robust.append(None if bullet is None else bullet.robust_fraction.item())
            return loss_of(*given, **options)

        return noted

    exactness = variants.Exactness(bench)
    with mock.patch.object(variants, "trades_by", noted_by):
        differences = [exactness.difference(variant) for variant in some("optimised", "bullet")]
    expected = bench.workload.bullet.robust_fraction.item()
    reported = {"steps": steps, "differences": differences, "as the bench": robust[3] == expected == robust[6]}
    one, nan = torch.ones(()), torch.full((), torch.nan)
    with mock.patch.object(exactness, "_updates", side_effect=[[one, nan], [nan, one]]):
        exactness._expected = {"reference": [one, one]}
        return reported | {"of NaN": [exactness.difference(variants.BY_NAME["optimised"]) for _ in range(2)]}


def runs(scratch):
    """Returns the bytes that a timed run on a GPU moves, by the bytes of a call and the number of its sets."""
    cases, gpu = [(3 << 20, 1), (3 << 20, 64), (5 << 30, 2)], torch.device("cuda", 0)
    return [moved * len(bandwidth.often([print] * count, moved, gpu)) for moved, count in cases]


def without(scratch):
    """Returns the variants that remain when each of these has broken."""
    broken = ("nothing", "bullet", "bullet, graphs", "bullet, captured", "bullet, streams, captured")
    return {name: [v.name for v in variants.without({name} - {"nothing"})] for name in broken}


def joules(scratch):
    """Returns the joules of two variants on a GPU that draws 300 W."""
    assert nvml_stub.stub().stub_script(f"device {GPU}\ninstant 300000\n".encode()) == 0
    context = Context("x", "", time.monotonic() + 10, scratch, True, "", None, 8.0)
    works = {variants.BY_NAME[name]: lambda: time.sleep(0.01) for name in ("reference", "optimised")}
    bench = mock.Mock(device=CPU)
    with mock.patch.object(iteration, "PowerMonitor", return_value=PowerMonitor(GPU)):
        iteration.energy(context, "n/tf32", bench, works)
    return context.records("joules")


if __name__ == "__main__":
    torch.set_num_threads(1)
    parts = (left_out, warmed, fell_back_later, peaks, captures_of, groups, checked, runs, without, joules)
    print(json.dumps({part.__name__: part for part in parts}[sys.argv[1]](sys.argv[2])))
