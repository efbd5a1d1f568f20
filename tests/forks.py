"""Python's command lines, each in a fork of a process that has loaded torch, MONAI and ITK once.

`python("-m", "monai.bundle", "run", ...)` is `subprocess.run([sys.executable, "-m", "monai.bundle", "run", ...])`
without the eight CPU-seconds of imports: a process of its own in all that a test asks of one, as its exit code, output,
working directory, environment, path of modules. What is about the start of a process itself, as which modules it
loads, needs a real one; so does what runs another copy of `common` than this repository's. `ranks` are the processes
that torchrun starts, with the environment that it gives them.

Run as a program, this file is that process. It reads a JSON list of jobs a line and answers with their exit codes.
"""

import atexit
import functools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 400  # seconds that a job may take


def python(*words: object, cwd: Path = ROOT, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Outcome of `python WORDS`, with its output as text."""
    (done,) = _run([{"words": [str(word) for word in words], "cwd": str(cwd), "env": _environment(env)}])
    return done


def ranks(*words: object, cwd: Path = ROOT, number: int = 2) -> subprocess.CompletedProcess:
    """Outcome of `torchrun --standalone --nproc_per_node=NUMBER WORDS`, all output one after the other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    jobs = []
    for rank in range(number):
        env = {name: str(value) for name, value in (group | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        jobs.append({"words": [str(word) for word in words], "cwd": str(cwd), "env": _environment(env)})
    done = _run(jobs)
    code = next((one.returncode for one in done if one.returncode), 0)
    return subprocess.CompletedProcess(
        done[0].args, code, "".join(one.stdout for one in done), "".join(one.stderr for one in done)
    )


def _environment(more: dict[str, str] | None) -> dict[str, str]:
    return dict(os.environ) | {"OMP_NUM_THREADS": "1"} | (more or {})


def _run(jobs: list[dict]) -> list[subprocess.CompletedProcess]:
    with tempfile.TemporaryDirectory() as folder:
        for number, job in enumerate(jobs):
            job |= {name: f"{folder}/{number}.{name}" for name in ("stdout", "stderr")}
        server = _server()
        print(json.dumps(jobs), file=server.stdin, flush=True)
        codes = json.loads(server.stdout.readline())
        return [
            subprocess.CompletedProcess(
                [sys.executable, *job["words"]], code, *(_text(job[name]) for name in ("stdout", "stderr"))
            )
            for job, code in zip(jobs, codes)
        ]


def _text(path: str) -> str:
    return Path(path).read_bytes().decode(errors="replace").replace("\r\n", "\n")


@functools.cache
def _server() -> subprocess.Popen:
    """One for this process, started when it is first needed."""
    line = [sys.executable, __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(line, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(server.communicate)  # which closes its input, and so ends it
    return server


# ---- the process that forks -----------------------------------------------------------------------------------------


def _as_python(words: list[str], cwd: str, env: dict[str, str], stdout: str, stderr: str) -> int:
    """`python WORDS` in this process, as far as its exit code."""
    signal.alarm(PATIENCE)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, path in ((0, os.devnull), (1, stdout), (2, stderr)):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    module = words[0] == "-m"
    sys.argv = words[1:] if module else words
    sys.path[0] = cwd if module else os.path.dirname(os.path.abspath(words[0]))
    try:
        if module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _forked(job: dict) -> int:
    """Number of a child that does the job."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = _as_python(**job)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _serve() -> None:
    import itk
    import monai.bundle  # noqa: F401
    import torch

    import common.quality.report  # noqa: F401
    import common.run.engines  # noqa: F401

    torch.set_num_threads(1)
    for name in ("imread", "transformread", "CompositeTransform", "ImageRegistrationMethodv4"):
        getattr(itk, name)  # ITK loads its wrappers, seconds of work, where a name is first asked for
    for line in sys.stdin:
        children = [_forked(job) for job in json.loads(line)]
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)


if __name__ == "__main__":
    _serve()
