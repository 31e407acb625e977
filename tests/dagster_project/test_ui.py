"""`make ui` ends what it started."""

import functools
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

PROJECT = Path(__file__).resolve().parents[2]

# The command with two servers that take a second to end in place of Dagster's and MLflow's.
UI = """
import sys
from dagster_project import ui
ui._prepare = lambda environment: None
ui._taken = lambda host, port: False
script, sys.argv = sys.argv[1], ["ui"]
ui._tool = lambda name: script
ui.main()
"""
SERVER = """#!/bin/sh
trap 'sleep 1; exit 0' TERM
touch "$0.$1"
while true; do sleep 0.1; done
"""


@pytest.mark.parametrize("signals", [1, 3])
def test_it_ends_both_servers_however_often_it_is_told_to(tmp_path, monkeypatch, signals):
    monkeypatch.setenv("ALIGNMENT_STORAGE", str(tmp_path / "storage"))
    server = tmp_path / "server"
    server.write_text(SERVER)
    server.chmod(0o755)
    # Tests that a script starts in the background ignore Ctrl-C, Dagster then has this process ignore SIGTERM, too, and children
    # would inherit it.
    listen = functools.partial(signal.signal, signal.SIGTERM, signal.SIG_DFL)
    command = [sys.executable, "-c", UI, server]
    process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL, preexec_fn=listen)
    until = time.monotonic() + 60
    while len(list(tmp_path.glob("server.*"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    servers = [child for child in psutil.Process(process.pid).children() if str(server) in child.cmdline()]
    assert len(servers) == 2
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert process.wait(30) == 143
    assert not any(child.is_running() for child in servers)
