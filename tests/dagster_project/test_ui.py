"""`make ui` starts the servers that are missing, says what is in its way, and ends what it started."""

import functools
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dagster_project import ui

PROJECT = Path(__file__).resolve().parents[2]

# The command with two servers that take a second to end in place of Dagster's and MLflow's.
UI = """
import sys
from dagster_project import ui
ui._prepare = lambda environment: None
ui._taken = lambda host, port: False
folder, sys.argv = sys.argv[1], ["ui", "--dagster-port", "3001", "--mlflow-port", "5001"]
ui._tool = lambda name: f"{folder}/{name}"
ui.main()
"""
SERVER = """#!/bin/sh
trap 'sleep 1; exit 0' TERM
printf '%s\\n' "$@" "$DAGSTER_UI_URL" "$MLFLOW_UI_URL" > "$0.part"
mv "$0.part" "$0.told"
while true; do sleep 0.1; done
"""
TRACKING = "http://tracking.example:8080"


@pytest.mark.parametrize(("signals", "tracking"), [(1, TRACKING), (3, None)])
def test_it_starts_the_servers_that_are_missing_and_ends_them_however_often_it_is_told_to(
    tmp_path, monkeypatch, signals, tracking
):
    storage = tmp_path / "storage"
    monkeypatch.setenv("ALIGNMENT_STORAGE", str(storage))
    if tracking:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking)
    urls = ["http://127.0.0.1:3001", tracking or "http://127.0.0.1:5001"]
    here = ["--host", "127.0.0.1", "--port"]
    expected = {"dagster": ["dev", "-w", str(PROJECT / "workspace.yaml"), *here, "3001", *urls]}
    if not tracking:
        places = ["--backend-store-uri", f"sqlite:///{storage}/mlflow.db", "--artifacts-destination", f"{storage}/mlartifacts"]
        expected["mlflow"] = ["server", *places, *here, "5001", "--workers", "1", *urls]
    for name in ("dagster", "mlflow"):
        (tmp_path / name).write_text(SERVER)
        (tmp_path / name).chmod(0o755)
    # Tests that a script starts in the background ignore Ctrl-C, Dagster then has this process ignore SIGTERM, too, and children
    # would inherit it.
    listen = functools.partial(signal.signal, signal.SIGTERM, signal.SIG_DFL)
    command = [sys.executable, "-c", UI, tmp_path]
    process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL, preexec_fn=listen)

    def told():
        return {path.stem: path.read_text().splitlines() for path in tmp_path.glob("*.told")}

    try:
        until = time.monotonic() + 60
        while len(told()) < len(expected):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        servers = psutil.Process(process.pid).children()
        for _ in range(signals):
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    finally:
        process.terminate()  # with its servers, where the test did not come to that
        process.wait(30)
    assert told() == expected
    assert len(servers) == len(expected)
    assert not any(child.is_running() for child in servers)


@pytest.mark.parametrize("server", ["Dagster", "MLflow"])
def test_a_port_that_is_in_use_is_one_clear_sentence(monkeypatch, tmp_path, server):
    monkeypatch.setenv("ALIGNMENT_STORAGE", str(tmp_path))
    monkeypatch.delattr(ui, "_prepare")  # nothing may be started
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = {"Dagster": "1", "MLflow": "1", server: str(port)}  # nobody listens on port 1
        monkeypatch.setattr(sys, "argv", ["ui", "--dagster-port", ports["Dagster"], "--mlflow-port", ports["MLflow"]])
        with pytest.raises(SystemExit) as refused:
            ui.main()
    option = f"--{server.lower()}-port"
    assert refused.value.code == f"{server}: port {port} is in use. Remedy: stop what uses it, or pass {option}."
