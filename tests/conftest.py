"""What holds for every test: one torch thread, so that workers in parallel do not fight over the processors."""

import os

import torch
from hypothesis import settings

torch.set_num_threads(1)

# Machines are shared, so an example's time says nothing. In CI the examples are the same each time.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")
