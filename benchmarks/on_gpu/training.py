"""Stage i: TRADES and BulletTrain on real images in lockstep, in bfloat16: accuracy against time.

A run of the workbench (`bt-fast compare`) with steps under autocast; evaluations are in float32.
"""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.on_gpu.rehearsal import device_of
from benchmarks.on_gpu.stage import CUT, NOT_RUN, PASSED, Context, Verdict
from bt_fast.lab.config import PRESETS, RunConfig
from bt_fast.lab.data import ImageDataset, load_dataset
from bt_fast.lab.training import Run, median_speedup

METHODS = ("optimised-bf16", "bullet-bf16")
NAMES = dict(zip(METHODS, ("TRADES", "BulletTrain"), strict=True))
LOOKS = 6  # evaluations in the given time
MOST_EPOCHS = 1000  # more than the time permits
IMAGES = 1000  # in an evaluation
KEPT = 6.0  # seconds for the last evaluation


def run(context: Context) -> Verdict:
    """Reports the final accuracies, and the time they took."""
    if context.data is None and not context.rehearsal:
        return NOT_RUN, "no images were given (--data FILE)"
    began = time.monotonic()
    dataset = images_of(None if context.data is None else Path(context.data))
    if context.rehearsal:
        dataset = dataset.take(train=64, test=32)
    context.record("data", name=dataset.name, training_images=len(dataset.x_train), seconds=time.monotonic() - began)
    one = Run(Path(context.scratch) / "run", config(context, dataset), dataset, device_of(context))
    for contestant in one.contestants:
        contestant.step = in_bfloat16(contestant.step, one.device)  # type: ignore[method-assign]
    interval = (context.left - KEPT) / LOOKS
    looked = time.monotonic()
    for _ in one.train():
        if context.left < KEPT:
            break
        if time.monotonic() > looked + interval or context.rehearsal:
            look(context, one)
            looked = time.monotonic()
    look(context, one)
    return verdict_of(context, one)


def config(context: Context, dataset: ImageDataset) -> RunConfig:
    """Returns the workbench's options for CIFAR-10, without an end."""
    tiny = {"model": "wrn-10-1", "batch_size": 32, "epochs": 1, "steps": 2, "boundary_steps": 2, "eval_steps": 2}
    return dataclasses.replace(
        PRESETS["cifar10"],
        methods=METHODS,
        data=dataset.name,
        decay_epochs=(),
        **{"model": "preactresnet-18", "epochs": MOST_EPOCHS, **(tiny if context.rehearsal else {})},
    )


def in_bfloat16(step: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Wraps a training step in autocast."""

    def run_step(*given: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16):
            return step(*given)

    return run_step


def look(context: Context, one: Run) -> None:
    """Records the state of each method."""
    for contestant in one.contestants:
        result = one.evaluate(contestant, min(IMAGES, len(one.dataset.x_test)), restarts=1)
        context.record(
            "accuracy",
            method=NAMES[contestant.method],
            iteration=one.iteration,
            epochs=one.iteration / one.iterations_per_epoch,
            seconds=sum(contestant.seconds),
            clean=result["clean"],
            robust=result["robust"],
            images=result["images"],
        )


def verdict_of(context: Context, one: Run) -> Verdict:
    """Reports the last accuracies, and how much faster a step was."""
    last = {r["method"]: r for r in context.records("accuracy")}
    lines = [
        f"{name}: clean {r['clean']:.1%}, robust {r['robust']:.1%} of {r['images']} after {r['seconds']:.0f} s"
        for name, r in last.items()
    ]
    slower, faster = (contestant.seconds for contestant in one.contestants)
    speedup = median_speedup(slower, faster)
    context.record("speedup", steps=len(faster), speedup=speedup, methods=list(NAMES.values()))
    epochs = one.iteration / one.iterations_per_epoch
    text = f"{epochs:.1f} epochs of {one.dataset.name}, a step {speedup:.2f}x as fast; " + "; ".join(lines)
    return (PASSED if one.iteration else CUT), text


# Images


def images_of(path: Path | None) -> ImageDataset:
    """Returns the file's images, in the workbench's own layout or as JPEG files; without a file, the package's MNIST.

    Raises:
        ValueError: the file has neither layout.
    """
    if path is None:
        return load_dataset("digits")
    with np.load(path, allow_pickle=False) as archive:
        if "x_train" in archive.files:
            return load_dataset(str(path))
        arrays = {key: archive[key] for key in archive.files}
    halves = {half: decoded(arrays, half) for half in ("train", "test")}
    labels = {half: torch.from_numpy(arrays[f"{half}_label"].astype(np.int64)) for half in halves}
    classes = 1 + max(int(y.max()) for y in labels.values())
    return ImageDataset(path.stem, halves["train"], labels["train"], halves["test"], labels["test"], classes)


def decoded(arrays: dict[str, Any], half: str) -> torch.Tensor:
    """Returns the images of one sequence of JPEG files: uint8 [n, 3, H, W]."""
    from PIL import Image

    run, offsets = arrays[f"{half}_jpeg"].tobytes(), arrays[f"{half}_offset"]
    files = (run[a:b] for a, b in pairwise(offsets))
    pictures = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
