"""As in the tests of the core: one torch thread."""

import torch

torch.set_num_threads(1)
