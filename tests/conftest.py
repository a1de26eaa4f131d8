"""What holds for every test: one torch thread, so that workers in parallel do not fight over the processors."""

import torch

torch.set_num_threads(1)
