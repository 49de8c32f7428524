"""Checks in a separate process that `full_precision` restores all float32 settings of a caller, and can record them.

torch reports the effective setting, not what was set, so the check compares the effective settings under other values
of the settings above. Some settings cannot be reset: each way to set something runs in a fresh process.
"""

import os

import torch

from bt_fast.full_precision import full_precision, tf32_convolutions
from bt_fast.lab import provenance

CUDNN, MATMUL, GENERIC = torch.backends.cudnn, torch.backends.cuda.matmul, torch.backends
NEW = hasattr(torch._C, "_get_fp32_precision_getter")
BELOW = [(backend, op) for backend in ("cuda", "mkldnn") for op in ("conv", "rnn", "matmul")]
ABOVE = [("generic", "all"), ("cuda", "all"), ("mkldnn", "all")]


def old_api():
    CUDNN.allow_tf32 = False
    torch.set_float32_matmul_precision("medium")


def old_api_back():
    CUDNN.allow_tf32 = True
    MATMUL.allow_tf32 = False


def new_api():
    CUDNN.conv.fp32_precision = "tf32"
    CUDNN.rnn.fp32_precision = "ieee"
    MATMUL.fp32_precision = "tf32"


def backend_of_the_new_api():
    CUDNN.fp32_precision = "ieee"


def everything():
    GENERIC.fp32_precision = "tf32"


def the_cpu():
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    torch.backends.mkldnn.matmul.fp32_precision = "tf32"


def both():
    new_api()
    old_api()
    MATMUL.fp32_precision = "ieee"
    CUDNN.conv.fp32_precision = "tf32"


WAYS = {"nothing": lambda: None, "old": old_api, "old, back": old_api_back}
if NEW:
    WAYS |= {"new": new_api, "backend": backend_of_the_new_api, "all": everything, "cpu": the_cpu, "both": both}
ALLOWED = {"nothing": True, "old": False, "old, back": True}  # TF32 in convolutions, as the old API reports it


def holds():
    """Returns the precision of every operation, and what the old API reports or refuses to report."""
    result = {names: torch._C._get_fp32_precision_getter(*names) for names in (ABOVE + BELOW if NEW else ())}
    for name, read in {
        "cudnn": lambda: CUDNN.allow_tf32,
        "cublas": lambda: MATMUL.allow_tf32,
        "matmul": torch.get_float32_matmul_precision,
    }.items():
        try:
            result[name] = read()
        except RuntimeError:
            result[name] = "refused"
    return result


def told():
    """Returns the settings now and under each value of the settings above, which are restored."""
    result = [holds()]
    if not NEW:
        return result
    own = {}
    for names in ABOVE:  # no setting above these overrides them
        own[names] = torch._C._get_fp32_precision_getter(*names)
        torch._C._set_fp32_precision_setter(*names, "none")
    result.append(own)
    for value in ("none", "ieee", "tf32"):
        for names in ABOVE:
            torch._C._set_fp32_precision_setter(*names, value)
        result.append(holds())
    for names, value in own.items():
        torch._C._set_fp32_precision_setter(*names, value)
    assert holds() == result[0]
    return result


def check(way):
    WAYS[way]()
    before = told()
    recorded = provenance.this_start(0, torch.device("cpu"), 1)["settings"]
    assert recorded["cudnn_allow_tf32"] == ALLOWED.get(way, tf32_convolutions())
    with full_precision():
        inside = holds()
        assert not tf32_convolutions()
    assert told() == before, (before, told())
    try:
        with full_precision():
            raise KeyError
    except KeyError:
        assert told() == before
    with full_precision(), full_precision():
        assert holds() == inside
    assert told() == before
    reduced = {names: value for names, value in inside.items() if isinstance(names, tuple) and value != "ieee"}
    assert not reduced, reduced
    assert (inside["cublas"], inside["matmul"]) == (False, "highest")
    assert inside["cudnn"] in ((False, "refused") if NEW else (False,))
    print(f"{way} is as it was", flush=True)


def main():
    for way in WAYS:
        child = os.fork()
        if not child:
            check(way)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            raise SystemExit(f"after {way} it is not")


if __name__ == "__main__":
    main()
