"""Parts of benchmarks.on_gpu's iterations, run by test_on_gpu.py: prints what they recorded, as JSON."""

import json
import sys
import time
import warnings
from unittest import mock

import nvml_stub
import torch

from benchmarks.on_gpu import iteration, variants
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
    """What is left out of a case in which ours is computed by one of these."""
    bench = variants.Bench("wrn-10-1", "tf32", 4, CPU, tiny=True)
    found, tried = {}, {}
    for name, ours in {"as it is": trades_loss, "beta": wrong_beta, "warns": warns, "raises": raises}.items():
        context = Context(name, "", time.monotonic() + 1000, scratch, True, "", None, 8.0)
        with mock.patch.object(variants, "trades_loss", ours):
            try:
                iteration.check(context, "n/tf32", bench, [variants.BY_NAME["optimised"]])
            except iteration.LeftOutError as error:
                print(error)
        found[name], tried[name] = context.records("left_out"), tried_last(context, "n/tf32")
    return found | {"tried last": tried}


def without(scratch):
    """The variants that are left where each of these broke."""
    broken = ("nothing", "bullet", "bullet, graphs", "bullet, captured", "bullet, streams, captured")
    return {name: [v.name for v in variants.without({name} - {"nothing"})] for name in broken}


def joules(scratch):
    """The joules of two variants on a GPU that takes 300 W."""
    assert nvml_stub.stub().stub_script(f"device {GPU}\ninstant 300000\n".encode()) == 0
    context = Context("x", "", time.monotonic() + 10, scratch, True, "", None, 8.0)
    works = {variants.BY_NAME[name]: lambda: time.sleep(0.01) for name in ("reference", "optimised")}
    bench = mock.Mock(device=CPU)
    with mock.patch.object(iteration, "PowerMonitor", return_value=PowerMonitor(GPU)):
        iteration.energy(context, "n/tf32", bench, works)
    return context.records("joules")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"left_out": left_out, "without": without, "joules": joules}[sys.argv[1]](sys.argv[2])))
