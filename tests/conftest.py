"""One thread: the networks of the tests are so small that handing work to a second costs more than it saves."""

import torch

torch.set_num_threads(1)
