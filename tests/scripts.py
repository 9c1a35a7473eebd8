"""The training scripts as a user runs them: commands in processes of their own, or a `main` in this one."""

import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState


ROOT = Path(__file__).parents[1]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--cpu",
          "--mixed_precision", "no", "--dynamo_backend", "no", "--quiet"]  # fmt: skip

# accelerate launch --cpu starts one process, whatever --num_processes says, so torchrun starts the two.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]


@contextmanager
def accelerate_on_cpu():
    """accelerate in this process, on the CPU: without what was made of its global state before, or is made here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def environment(**changes):
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "HF_HUB_OFFLINE": "1",
        **changes,
    }


def run(command, cwd, **env):
    return subprocess.run(command, cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=240)


def succeed(command, cwd, **env):
    done = run(command, cwd, **env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def in_two_processes(script, words, cwd):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return succeed([*TORCHRUN, port, script, *words], cwd, ACCELERATE_USE_CPU="true")


def words_of(options):
    """A command line from a dict; a list gives several words."""
    words = []
    for name, value in options.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def run_main(main, **options):
    """The `main` of a command in this process, on the CPU."""
    with accelerate_on_cpu():
        main(words_of(options))


def log_rows(folder):
    path = Path(folder) / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
