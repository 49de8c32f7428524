"""Trains as scripts do, on a real or emulated GPU: losses stay alive, a thread pins memory, a capture breaks off."""

import threading
from contextlib import contextmanager

import emulated_device
import small_models
import torch
from torch import nn

from bt_fast import trades_loss


def capturing(x):
    """Returns whether work on `x` is being captured."""
    return torch.cuda.is_current_stream_capturing() if x.is_cuda else emulated_device.capturing()


def iterations(device, build="conv_bn", steps=4, **options):
    """Returns losses, gradients and buffers. Each loss is alive until the next one has been computed."""
    torch.manual_seed(0)
    model = small_models.build(build).to(device)
    optimizer, result = torch.optim.SGD(model.parameters(), lr=0.1), []
    for k in range(steps):
        x, y = (t.to(device) for t in small_models.batch(6, seed=k))
        optimizer.zero_grad()
        generator = torch.Generator(device).manual_seed(k)
        loss = trades_loss(model, x, y, None, perturb_steps=2, generator=generator, **options)
        loss.backward()
        optimizer.step()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        result.append([t.detach().clone() for t in (loss, *gradients, *model.buffers())])
    return result


class BesideALoader(nn.Module):
    """A model with another thread that pins memory during its capture."""

    def __init__(self):
        super().__init__()
        self.body = small_models.conv_bn()

    def forward(self, x):
        if capturing(x):
            pin_memory_elsewhere(x)
        return self.body(x)


def pin_memory_elsewhere(x):
    """Pins memory from another thread and ignores its error."""
    if not x.is_cuda:
        emulated_device.current().call_from_another_thread()
        return
    thread = threading.Thread(target=lambda: torch.empty(2**20).pin_memory())
    thread.start()
    thread.join()


@contextmanager
def pinning(device):
    """Pins one batch after another in a thread, like a loader; on an emulated device only `BesideALoader` does so."""
    if device.type != "cuda":
        yield
        return
    done = threading.Event()

    def pin():
        while not done.is_set():
            torch.empty(64, 3, 32, 32).pin_memory()

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Waiting(nn.Module):
    """Waits for the device when it is captured."""

    def __init__(self):
        super().__init__()
        self.body = small_models.conv_bn(dropout=0.3)

    def forward(self, x):
        total = x.sum()
        if capturing(x):
            total.item()
        return self.body(x)
