"""Functions run by several real processes that form a gloo group: forked from one that has imported torch already."""

import multiprocessing
import os
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
# what an op imports when it runs first, too
CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "pytest", "bt_fast", "small_models"])
LIMIT = 120.0  # seconds, for all ranks together
GRACE = 20.0  # for the others, once one has failed


class RankError(AssertionError):
    """A rank raised, died or did not end."""


def run_ranks(count, function, *arguments):
    """What `function(*arguments)` returns on each rank of a group of its own, in a list.

    The function, its arguments and what it returns (through `torch.save`) are importable, plain, or tensors.
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
    """Until all have ended, or one badly and the others have had time to tell what they see."""
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
    os._exit(0)  # the group's end waits for its threads: in torch 2.6 for ever, where a sum is still on its way
