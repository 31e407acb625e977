"""One GPU for each process that trains or samples, where a machine has several.

A process that sees two GPUs would spread one batch over both (which TRL refuses), and two steps at once would both use the
first. So each takes one for itself before CUDA starts, and keeps it until it ends.
"""

import os
import re
import time
from pathlib import Path

from filelock import FileLock, Timeout

from resources.paths import storage

VISIBLE = "CUDA_VISIBLE_DEVICES"
_held: list[FileLock] = []  # until the process ends, however it ends: the system frees the locks


def take_one_gpu(folder: Path | None = None, *, wait: float = 5.0) -> str | None:
    """Make this process see one GPU alone: the first that no other process has taken; wait for one if all are.

    Nothing is done where it sees none or one already (a container, Kubernetes, CUDA_VISIBLE_DEVICES), as after the first call.

    Args:
        folder: of the locks, shared by all processes of this machine.
        wait: seconds between two looks.

    Returns:
        The GPU's name as in CUDA_VISIBLE_DEVICES, None where nothing was done.
    """
    gpus = _visible()
    if len(gpus) < 2:
        return None
    folder = folder or storage() / "locks" / "gpus"
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        for gpu in gpus:
            lock = FileLock(folder / f"{re.sub(r'[^A-Za-z0-9-]', '_', gpu)}.lock", blocking=False)
            try:
                lock.acquire()
            except Timeout:
                continue
            _held.append(lock)
            os.environ[VISIBLE] = gpu
            return gpu
        time.sleep(wait)


def _visible() -> list[str]:
    if (named := os.environ.get(VISIBLE)) is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]  # asks the driver, and starts no CUDA context
