"""Runs command lines of Python modules, each in a fork of this process, which has loaded torch, MONAI and ITK once.

Reads a JSON object a line: words (after `python`), cwd, log. Answers with the exit code a line.
"""

import json
import os
import runpy
import sys

import itk
import monai.bundle  # noqa: F401
import torch

import common.__main__  # noqa: F401
import common.quality.report  # noqa: F401
import common.run.engines  # noqa: F401


def run(words: list[str], cwd: str, log: str) -> int:
    """`python WORDS` in this process, as far as its exit code, with everything that it prints in `log`."""
    os.chdir(cwd)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = words[1:] if words[0] == "-m" else words
    try:
        if words[0] == "-m":
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


def main() -> None:
    torch.set_num_threads(1)
    for name in ("imread", "transformread", "CompositeTransform", "ImageRegistrationMethodv4"):
        getattr(itk, name)  # ITK loads its wrappers, seconds of work, where a name is first asked for
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = run(**json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
