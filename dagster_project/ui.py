"""`make ui`: Dagster's UI with its daemon (schedules, sensors, queued runs) and MLflow's server, until Ctrl-C.

Where MLFLOW_TRACKING_URI names a server rather than a database, that one is used and none is started.

python -m dagster_project.ui [--dagster-port 3000] [--mlflow-port 5000]
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from resources.paths import PROJECT, artifact_root, is_database, mlflow_ui, storage, tracking_uri


def main() -> None:
    """Command line. Ends what it started when a server ends or when it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--dagster-port", type=int, default=3000)
    parser.add_argument("--mlflow-port", type=int, default=5000)
    arguments = parser.parse_args()
    tracking = tracking_uri()
    ports = {"Dagster": arguments.dagster_port} | ({"MLflow": arguments.mlflow_port} if is_database(tracking) else {})
    for name, port in ports.items():
        if _taken(arguments.host, port):
            sys.exit(f"{name}: port {port} is in use. Remedy: stop what uses it, or pass --{name.lower()}-port.")
    dagster_url = f"http://{arguments.host}:{arguments.dagster_port}"
    mlflow_url = mlflow_ui(own=f"http://{arguments.host}:{arguments.mlflow_port}")
    environment = os.environ | {
        "DAGSTER_HOME": os.environ.get("DAGSTER_HOME", str(PROJECT / "dagster_home")),
        "DAGSTER_UI_URL": dagster_url,
        "MLFLOW_UI_URL": mlflow_url,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    root = storage()
    root.mkdir(parents=True, exist_ok=True)
    _prepare(environment)
    servers = {
        "MLflow": [
            _tool("mlflow"),
            "server",
            *("--backend-store-uri", tracking),
            *("--artifacts-destination", artifact_root()),
            *("--host", arguments.host, "--port", str(arguments.mlflow_port), "--workers", "1"),
        ],
        "Dagster": [
            _tool("dagster"),
            "dev",
            *("-w", str(PROJECT / "workspace.yaml")),
            *("--host", arguments.host, "--port", str(arguments.dagster_port)),
        ],
    }
    print(f"Dagster {dagster_url}   MLflow {mlflow_url}   (Ctrl-C ends what was started)", flush=True)
    running = {n: subprocess.Popen(servers[n], env=environment, cwd=PROJECT, start_new_session=True) for n in ports}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        while all(p.poll() is None for p in running.values()):
            time.sleep(0.5)
        ended = next(name for name, p in running.items() if p.poll() is not None)
        print(f"{ended} ended with exit code {running[ended].returncode}")
    except KeyboardInterrupt:
        print("ending what was started")
    finally:
        for sent_again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sent_again, signal.SIG_IGN)  # an end that is cut short would leave servers behind
        for process in running.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in running.values():
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _prepare(environment: dict[str, str]) -> None:
    # The server and the steps must not both create the tables of a fresh database; and no run may wait for a dead one.
    code = (
        "import dagster as dg\n"
        "from dagster_project.dead_runs import end_dead_runs\n"
        "from dagster_project.resources import resources\n"
        "resources()['tracking'].client()\n"
        "with dg.DagsterInstance.get() as instance: end_dead_runs(instance)"
    )
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=PROJECT, check=True)


def _tool(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def _taken(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


if __name__ == "__main__":
    main()
