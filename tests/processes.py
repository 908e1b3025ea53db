"""Programs run in processes of their own, each forked from a server that has imported torch and transformers: commands, scripts, ranks."""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TIMEOUT = 240.0
"""Number of seconds that a program may take."""


class _Server:
    """The process of `fork_server.py`, started when it is first asked for."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="lowprec-tests-")
        self.log = Path(self.folder.name) / "log"
        command = [sys.executable, "-m", "tests.fork_server"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        self.started = 0
        atexit.register(self.stop)

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the server of the tests' programs has ended:\n{self.log.read_text()[-4000:]}"
        return json.loads(answer)

    def stop(self) -> None:
        self.process.communicate()
        self.folder.cleanup()


_servers: list[_Server] = []


def _server() -> _Server:
    if not _servers:
        _servers.append(_Server())
    return _servers[0]


class Program:
    """A running program: `python *arguments`."""

    def __init__(self, arguments: tuple[str, ...], cwd: Path, environment: Mapping[str, str]) -> None:
        self.arguments = arguments
        self.server = _server()
        self.server.started += 1
        self.output = [Path(self.server.folder.name) / f"{self.server.started}.{name}" for name in ("stdout", "stderr")]
        for path in self.output:
            path.touch()
        stdout, stderr = map(str, self.output)
        self.pid = self.server.ask(run=arguments, cwd=str(cwd), env={**os.environ, **environment}, stdout=stdout, stderr=stderr)["pid"]

    def poll(self) -> int | None:
        """Return the exit code; None while the program runs."""
        return self.server.ask(poll=self.pid)["code"]

    def kill(self) -> None:
        """End the program by SIGKILL, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def wait(self, timeout: float = TIMEOUT) -> subprocess.CompletedProcess[str]:
        """Return the exit code and the output; raise TimeoutExpired, and end the program, after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise subprocess.TimeoutExpired(self.arguments, timeout, *(path.read_bytes() for path in self.output))
            time.sleep(0.01)
        return subprocess.CompletedProcess(self.arguments, code, *(path.read_text() for path in self.output))


def start(*arguments: str, cwd: Path = ROOT, **environment: str) -> Program:
    """Start `python *arguments`; keywords are added to the environment."""
    return Program(arguments, cwd, environment)


def run(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python *arguments` to its end."""
    return start(*arguments, cwd=cwd, **environment).wait()


def lowprec(*arguments: str, cwd: Path = ROOT, check: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    result = run("-m", "lowprec", *arguments, cwd=cwd, WANDB_MODE="offline")
    assert not check or result.returncode == 0, result.stderr[-4000:]
    return result


def run_ranks(script: str, folder: Path, *arguments: str, processes: int = 2) -> None:
    """Run a Python program, written to `folder`, in processes that find each other as torchrun's do; each on one core."""
    file = folder / "script.py"
    file.write_text(script)
    run_in_ranks(str(file), *arguments, processes=processes, PYTHONPATH=str(ROOT))


def run_in_ranks(*arguments: str, processes: int = 2, **environment: str) -> None:
    """Run `python *arguments` in processes that find each other as torchrun's do; each on one core."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    ranks = [start(*arguments, **environment, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(processes)]
    deadline = time.monotonic() + TIMEOUT
    while None in (codes := [rank.poll() for rank in ranks]) and not any(codes) and time.monotonic() < deadline:
        time.sleep(0.01)
    for rank in ranks:  # where one has failed, the others wait for it
        rank.kill()
    results = [rank.wait() for rank in ranks]
    assert codes == [0] * processes, "\n".join(result.stderr[-4000:] for result in results)
