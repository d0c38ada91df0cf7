"""Commands in processes of their own, one by one or several together."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

JOB = "4242"
SLURM = {
    "SLURM_JOB_ID": JOB,
    "SLURM_JOB_NAME": "gpd",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1",
    "SLURM_NODELIST": "127.0.0.1",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
"""What SLURM tells a job of one task."""


def importable() -> str:
    """PYTHONPATH under which a process imports what this one can, the modules of tests among it."""
    return os.pathsep.join(path for path in sys.path if path)


def in_processes(
    folder: Path, command: Sequence[str], environments: Sequence[dict[str, str]] = ({},)
) -> list[subprocess.CompletedProcess[str]]:
    """Run a command once per environment, all at the same time."""
    folder.mkdir(exist_ok=True)
    common = {"OMP_NUM_THREADS": "1", "PYTHONPATH": importable()}
    started = [
        subprocess.Popen(
            list(command),
            cwd=folder,
            env=os.environ | common | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in environments
    ]
    results = []
    for process in started:
        try:
            output, errors = process.communicate(timeout=400)
        finally:
            process.kill()
        results.append(
            subprocess.CompletedProcess(process.args, process.returncode, output, errors)
        )
    return results


def free_port() -> str:
    """One that nobody listens to."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def slurm_tasks(count: int) -> list[dict[str, str]]:
    """What srun tells each task."""
    common = {"SLURM_NTASKS": str(count), "SLURM_NTASKS_PER_NODE": str(count)}
    common |= {"SLURM_STEP_NUM_TASKS": str(count), "MASTER_PORT": free_port()}
    return [
        SLURM | common | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        for rank in range(count)
    ]
