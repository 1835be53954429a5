"""Emulates a T4, except for its speed, on a newer GPU: no bf16, and a T4's attention kernels.

    deepspeed --num_gpus=2 tests/benchmarks/as_t4.py pipeline/train.py --gpu_memory 13.5 ...

The GPU reports no bf16, attention is what `common.attention` chooses below compute capability 8.0, and PyTorch has
neither flash nor cuDNN kernels for it. --gpu_memory limits the memory: of a T4's 14.6 GiB about 1 GiB goes to the CUDA
context and NCCL.
"""

import runpy
import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    # The launcher puts --local_rank before the script's own name.
    script = next(argument for argument in sys.argv[1:] if argument.endswith(".py"))
    sys.path[0] = str(Path(script).parents[1])  # instead of this directory, which has another module called pipeline
    from common import attention

    torch.cuda.is_bf16_supported = lambda including_emulation=True: False
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    attention.choose_attention = lambda config, device, dtype: "sdpa_no_gqa"
    sys.argv = [script, *(argument for argument in sys.argv[1:] if argument != script)]
    runpy.run_path(script, run_name="__main__")
