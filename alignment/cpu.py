"""Two settings that make training on a CPU about twice as fast; both leave every number as it was.

Measured on 2 cores with the 135M model (LoRA SFT, batch 8 x 240 tokens): 6.3 s a step without, 2.9 s with both.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache


@cache
def speed_up() -> None:
    """Apply both settings in this process, once. Does nothing where they do not apply (GPU, other C libraries)."""
    import torch

    if not torch.cuda.is_available():
        _keep_freed_memory()
        _score_labelled_positions_only()


def _keep_freed_memory() -> None:
    # glibc hands every large tensor back to the kernel when it is freed and faults it in again at the next step: a third
    # of the time went into page faults. M_MMAP_MAX = 0 and a high M_TRIM_THRESHOLD let it keep what it has.
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            m_trim_threshold, m_mmap_max = -1, -4
            libc.mallopt(m_mmap_max, 0)
            libc.mallopt(m_trim_threshold, 2**31 - 1)


def _score_labelled_positions_only() -> None:
    # TRL's fused LM head projects only positions with a label onto the vocabulary, but on a CPU it projects all of them
    # (it spares accelerators that recompile per shape). On a CPU nothing recompiles; with prompts, padding and system
    # turns two thirds of the positions have no label. tests/alignment/test_cpu.py holds both ways to the same loss.
    from trl.trainer import utils

    if hasattr(utils, "_use_triton"):
        utils._use_triton = lambda device: True
