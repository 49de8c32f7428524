"""Stage g: the model's predictions for this card, made during the GPU's first stages, compared with measured times."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

from benchmarks.on_gpu.figures import cases_of
from benchmarks.on_gpu.plan import batch_size, cases
from benchmarks.on_gpu.stage import NOT_RUN, PASSED, Context, Verdict

if TYPE_CHECKING:
    from benchmarks.gpu_model import Gpu

H200_BANDWIDTH = 4.8e12  # bytes/s, from NVIDIA's H200 data sheet, SXM; the rest as for an H100


def run(context: Context) -> Verdict:
    """Reports the errors of the predictions."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # this stage must not use the GPU, on which others are measured
    os.nice(10)
    from benchmarks import gpu_prediction
    from benchmarks.gpu_model import Gpu

    card = card_of(context.device)
    if context.rehearsal:
        card = Gpu("no GPU: a rehearsal", sms=4, fp32=1e12, tf32=2e12, bandwidth=1e11)
    if card is None:
        return NOT_RUN, f"the model has no data sheet of {context.device!r}"

    models = sorted({(model, precision) for model, precision, _ in cases(context.minutes, context.rehearsal)})
    for model, precision in models:
        if precision == "bfloat16":
            continue  # the model counts float32's bytes
        gpu = card if precision == "tf32" else dataclasses.replace(card, tf32=card.fp32)
        result = gpu_prediction.predict(gpu, model, batch_size(context.rehearsal))
        seconds = {name: row.seconds for name, row in result.rows.items()}
        busy = {name: row.busy for name, row in result.rows.items()}
        context.record("predicted", case=f"{model}/{precision}", seconds=seconds, busy=busy, card=gpu.name)
    context.wait_for_turn()
    return PASSED, compared(context)


def compared(context: Context) -> str:
    """Returns the errors of each case: predicted over measured, less 1."""
    rounds = context.records("round", "iterations")
    measured = cases_of([*rounds, *context.records("flops", "iterations")])
    messages = []
    for record in context.records("predicted"):
        rows = measured.get(record["case"], {})
        errors = {
            name: record["seconds"][name] / rows[name]["seconds"] - 1 for name in record["seconds"] if name in rows
        }
        context.record("error", case=record["case"], errors=errors)
        listed = ", ".join(f"{name} {error:+.0%}" for name, error in errors.items())
        messages.append(f"{record['case'].replace('/', ' ')}: {listed or 'predicted, not measured'}")
    return "; ".join(messages)


def card_of(name: str) -> Gpu | None:
    """Returns the data sheet of the GPU with this name, or None."""
    from benchmarks.gpu_model import GPUS

    if "H200" in name:
        return dataclasses.replace(GPUS["h100"], name="H200 SXM", bandwidth=H200_BANDWIDTH)
    return next((gpu for key, gpu in GPUS.items() if key.upper() in name.upper()), None)
