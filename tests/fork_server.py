"""A process that has imported what a run needs and forks a child for each program to run, so that none waits for the imports.

`python -m tests.fork_server` reads requests from stdin and answers each on stdout, one JSON object a line:

    {"run": arguments, "cwd": ..., "env": ..., "stdout": path, "stderr": path}  ->  {"pid": ...}
    {"poll": pid}                                                               ->  {"code": null while it runs, else its exit code}

`arguments` are those of the Python interpreter: `-m MODULE ...`, `-c CODE ...` or `FILE ...`. A child behaves as a new interpreter does,
except that modules are imported already: it has its own directory, environment and output, and no state of an earlier program.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import sys
import traceback
import types
from typing import Any


def preload() -> None:
    """Import what nearly every program of the tests imports."""
    import datasets  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import lowprec.cli.main
    import lowprec.training.accelerate
    import lowprec.training.run.pretrain  # noqa: F401


def execute(arguments: list[str]) -> None:
    """Run a program as `python *arguments` does."""
    kind, *rest = arguments
    if kind == "-m":
        sys.argv = rest
        sys.path[0] = os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path[0] = ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(os.path.abspath(kind))
        runpy.run_path(kind, run_name="__main__")


def exit_code(arguments: list[str]) -> int:
    """Run a program to its end and return its exit code, as the interpreter does."""
    try:
        execute(arguments)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def child(request: dict[str, Any]) -> None:
    """Become the program of a request; does not return."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream, target, flags in ((0, os.devnull, os.O_RDONLY), (1, request["stdout"], os.O_WRONLY), (2, request["stderr"], os.O_WRONLY)):
        opened = os.open(target, flags)
        os.dup2(opened, stream)
        os.close(opened)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    code = exit_code(request["run"])
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    # stdin and stdout carry the protocol; output of the imports goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    preload()
    gc.collect()
    gc.freeze()  # the children's garbage collections leave the imported objects shared
    codes: dict[int, int | None] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "run" in request:
            pid = os.fork()
            if pid == 0:
                try:
                    child(request)
                finally:
                    os._exit(1)
            codes[pid] = None
            answer = {"pid": pid}
        else:
            pid = request["poll"]
            if codes[pid] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                codes[pid] = os.waitstatus_to_exitcode(status) if ended else None
            answer = {"code": codes[pid]}
        print(json.dumps(answer), file=answers, flush=True)
    for pid, code in codes.items():  # the tests are over
        if code is None:
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
