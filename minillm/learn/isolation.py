"""Run code so that it harms nobody: in a forked child process that can be killed, with the settings that checks
count on.

A child made by `fork` has everything that the notebook has, functions of its cells included, and starts in
milliseconds. What it does to its memory, its settings or itself stays in it; results come back as JSON over a pipe.
"""

import builtins
import faulthandler
import gc
import json
import os
import select
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

__all__ = ["ChildEnded", "can_fork", "in_child", "neutral_state"]

Send = Callable[[dict], None]


class ChildEnded(Exception):
    """The child process did not reach its end: `why` is "time", "exit" (with its status in `number`) or "signal"
    (with the signal's number); `trace` is where it was, as text, when it crashed.
    """

    def __init__(self, why: str, number: int = 0, trace: str = "") -> None:
        super().__init__(f"child process: {why} {number}")
        self.why, self.number, self.trace = why, number, trace


def can_fork() -> bool:
    """Whether a forked child may work: on Linux, while no GPU is in use (a CUDA context does not survive a fork).

    Apple's libraries do not survive it either: there, code runs in this process.
    """
    torch = sys.modules.get("torch")
    in_use = torch is not None and torch.cuda.is_initialized()
    return sys.platform == "linux" and not in_use


def in_child(job: Callable[[Send], None], limit: float | None) -> Iterator[dict]:
    """Run `job(send)` in a forked child and yield what it sends, dictionaries that JSON can hold.

    The child is killed with all that it started when nothing came for `limit` seconds (None: never), and when the
    caller stops listening; a message with the key "limit" sets another limit from there on. Raises ChildEnded when it
    ends before `job` does, RuntimeError with the traceback when `job` raises.
    """
    read, write = os.pipe()
    with tempfile.TemporaryFile() as trace:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads: none of them is needed here
            pid = os.fork()
        if pid == 0:
            _be_child(job, write, trace)
        os.close(write)
        status: int | None = None
        try:
            status = yield from _messages(pid, read, limit)
        finally:
            os.close(read)
            status = _end(pid) if status is None else status
        if status != 0:
            trace.seek(0)
            said = trace.read().decode(errors="replace")
            if os.WIFSIGNALED(status):
                raise ChildEnded("signal", os.WTERMSIG(status), said)
            raise ChildEnded("exit", os.WEXITSTATUS(status), said)


def _messages(pid: int, read: int, limit: float | None) -> Generator[dict, None, int]:
    """Yield messages until the last one; return the child's status, 0 for an end as it should be."""
    buffer, last = b"", time.monotonic()
    while True:
        ready, _, _ = select.select([read], [], [], 0.2)
        if ready:
            chunk = os.read(read, 1 << 16)
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if "raised" in message:
                    raise RuntimeError(message["raised"])
                if "end" in message:
                    _end(pid)
                    return 0
                limit = message.get("limit", limit)
                yield message
                last = time.monotonic()
            if not chunk:
                return _end(pid, patience=1.0) or 256  # ended without its last message: status 1
        elif (ended := os.waitpid(pid, os.WNOHANG))[0]:  # the pipe may live on in a process that it started
            _kill_group(pid)
            return ended[1] or 256
        elif limit is not None and time.monotonic() - last > limit:
            raise ChildEnded("time")


def _end(pid: int, patience: float = 0.0) -> int:
    """End the child, which may end by itself within `patience` seconds, and whatever it started; return its status."""
    status, until = 0, time.monotonic() + patience
    with suppress(ChildProcessError):
        while time.monotonic() < until:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                break
            time.sleep(0.01)
        else:
            _kill_group(pid)
            status = os.waitpid(pid, 0)[1]
    _kill_group(pid)
    return status


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _be_child(job: Callable[[Send], None], write: int, trace: Any) -> None:
    """What the child does, from its first moment to its last."""
    status = 1
    try:
        _leave_parent_alone(trace)

        def send(message: dict) -> None:
            data = json.dumps(message).encode() + b"\n"
            while data:
                data = data[os.write(write, data) :]

        try:
            job(send)
        except BaseException:
            import traceback

            send({"raised": traceback.format_exc()})
        else:
            send({"end": True})
        status = 0
    finally:
        os._exit(status)  # no destructors, no exit handlers: they belong to the parent


def _leave_parent_alone(trace: Any) -> None:
    os.setpgid(0, 0)
    _die_with_parent()
    signal.set_wakeup_fd(-1)  # it leads into the parent's event loop
    gc.freeze()  # what the parent made is not collected here: its finalizers would close the parent's sockets
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    faulthandler.enable(file=trace)
    with suppress(ImportError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)  # the threads of OpenMP's pool stayed behind; waiting for them would never end
    builtins.input = _no_input
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is not None:  # its sockets are the parent's
        shell.display_pub.publish = lambda *args, **kwargs: None


def _die_with_parent() -> None:
    import ctypes

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _no_input(*_: Any) -> str:
    raise EOFError("input() in a check: nobody is there to type")


def _exit(*_: Any) -> None:
    raise SystemExit


@contextmanager
def neutral_state() -> Iterator[None]:
    """The settings of a fresh process while the block runs, and afterwards those that were there before: default
    dtype, gradients, precision of products, NumPy's errors, warnings, recursion limit, environment, folder, seeds.
    """
    import random

    import numpy as np

    main = vars(sys.modules["__main__"])
    # IPython's end the kernel, and return.
    leave: dict[str, Any] = {name: main[name] for name in ("exit", "quit") if name in main}
    environment, folder, path, state = dict(os.environ), os.getcwd(), list(sys.path), random.getstate()
    recursion, drawn = sys.getrecursionlimit(), np.random.get_state()
    with warnings.catch_warnings(), np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"):
        warnings.simplefilter("default")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        main.update(dict.fromkeys(leave, _exit))
        try:
            sys.setrecursionlimit(3000)  # as in Jupyter
            with _neutral_torch():
                yield
        finally:
            main.update(leave)
            sys.setrecursionlimit(recursion)
            random.setstate(state)
            np.random.set_state(drawn)
            sys.path[:] = path
            with suppress(OSError):
                os.chdir(folder)
            for name in set(os.environ) - set(environment):
                del os.environ[name]
            os.environ.update(environment)


@contextmanager
def _neutral_torch() -> Iterator[None]:
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    device, threads = torch.get_default_device(), torch.get_num_threads()
    strict = torch.are_deterministic_algorithms_enabled()
    drawn, anomaly = torch.get_rng_state(), torch.is_anomaly_enabled()
    gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    try:
        torch.set_default_dtype(torch.float32)
        if device.type != "cpu":
            torch.set_default_device("cpu")
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(False)
        torch.autograd.set_detect_anomaly(False)
        torch.manual_seed(0)
        torch.set_grad_enabled(True)
        with torch.inference_mode(False) if inference else nullcontext():
            yield
    finally:
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device)
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(strict)
        torch.autograd.set_detect_anomaly(anomaly)
        torch.set_rng_state(drawn)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
