"""Before any test module is imported: without a GPU, Triton's kernels run in its interpreter (it decides on import)."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
