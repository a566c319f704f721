"""What every backend takes."""

import torch

# Of x and the frozen weight; adapters and bias may be float32 besides.
BASE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_RANK = 512
