"""Each process takes one GPU for itself. The names alone are taken here; no GPU is needed."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from resources.gpus import VISIBLE, take_one_gpu

PROJECT = Path(__file__).resolve().parents[2]
HOLDER = """
import os, sys, time
from pathlib import Path
from resources.gpus import VISIBLE, take_one_gpu
print("looking", flush=True)
taken = take_one_gpu(Path(sys.argv[1]), wait=0.05)
assert os.environ[VISIBLE] == taken, (os.environ[VISIBLE], taken)
assert take_one_gpu(Path(sys.argv[1])) is None  # it keeps the one it has
print(taken, flush=True)
time.sleep(300)
"""


@pytest.fixture
def hold(tmp_path: Path) -> Iterator:
    """Starts a process that takes a GPU of the named ones and keeps it; returns when it begins to look for one."""
    processes = []

    def start(visible: str) -> subprocess.Popen:
        environment = os.environ | {VISIBLE: visible, "PYTHONPATH": str(PROJECT)}
        command = [sys.executable, "-c", HOLDER, str(tmp_path / "gpus")]
        # Without a buffer, so that what is not read yet is seen by `select`.
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, bufsize=0))
        assert processes[-1].stdout.readline() == b"looking\n"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def test_two_processes_take_two_gpus_and_a_third_waits_until_one_ends_however_it_ends(hold):
    first = hold("0,1")
    assert first.stdout.readline() == b"0\n"
    second = hold("0,1")
    assert second.stdout.readline() == b"1\n"
    third = hold("0,1")
    said, _, _ = select.select([third.stdout], [], [], 0.5)
    assert not said  # neither a GPU nor its end
    first.send_signal(signal.SIGKILL)
    assert third.stdout.readline() == b"0\n"


def test_gpus_may_go_by_their_identifiers(hold):
    names = "GPU-8a56a4bc-1111, MIG-GPU-b630b2f5/3/0"
    assert hold(names).stdout.readline() == b"GPU-8a56a4bc-1111\n"
    assert hold(names).stdout.readline() == b"MIG-GPU-b630b2f5/3/0\n"


@pytest.mark.parametrize("visible", ["", "0", "GPU-8a56a4bc"])
def test_nothing_is_done_where_none_or_one_is_seen(tmp_path, monkeypatch, visible):
    monkeypatch.setenv(VISIBLE, visible)
    assert take_one_gpu(tmp_path / "gpus") is None
    assert os.environ[VISIBLE] == visible
    assert not (tmp_path / "gpus").exists()


@pytest.mark.parametrize(("count", "taken"), [(0, None), (1, None), (2, "0")])
def test_without_the_variable_the_driver_is_asked(tmp_path, monkeypatch, count, taken):
    import torch

    monkeypatch.setattr("resources.gpus._held", [])
    monkeypatch.setenv(VISIBLE, "")  # so that what is set here does not outlive the test
    monkeypatch.delenv(VISIBLE)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert take_one_gpu(tmp_path) == taken
    assert os.environ.get(VISIBLE) == taken
