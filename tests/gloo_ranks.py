"""Runs functions in several real processes that form a gloo group, forked from one that has imported torch."""

import multiprocessing
import os
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
# including what an op imports at its first call
CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "pytest", "bt_fast", "small_models"])
LIMIT = 120.0  # seconds, for all ranks together
GRACE = 20.0  # for the other ranks, after one has failed


class RankError(AssertionError):
    """Raised when a rank raises, dies or does not end."""


def run_ranks(count, function, *arguments):
    """Returns what `function(*arguments)` returns on each rank of a new group, as a list.

    The function must be importable; its arguments and its result (through `torch.save`) are plain values or tensors.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            CONTEXT.Process(target=_run, args=(rank, count, folder, function, arguments), daemon=True)
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        try:
            _wait_for(processes)
        finally:
            for process in processes:
                process.kill()
        failures = [error.read_text() for error in sorted(Path(folder).glob("*.error"))]
        codes = [process.exitcode for process in processes]
        if failures or any(code != 0 for code in codes):
            raise RankError(f"exit codes {codes}\n" + "\n".join(failures))
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(count)]


def _wait_for(processes):
    """Waits until all have ended, or one has failed and the others have had GRACE seconds to report."""
    end = time.monotonic() + LIMIT
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        if any(process.exitcode for process in processes):
            end = min(end, time.monotonic() + GRACE)
        time.sleep(0.005)


def _run(rank, count, folder, function, arguments):
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
        torch.save(function(*arguments), f"{folder}/{rank}.pt")
    except BaseException:
        Path(folder, f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)
    os._exit(0)  # the group's end waits for its threads: in torch 2.6 forever, if a sum is still in progress
