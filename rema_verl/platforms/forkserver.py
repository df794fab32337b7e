"""Imports are paid once: a run's worker processes are forked from one that has everything loaded.

A launch of verl on CPU is a dozen Python processes, each of which spends 8 to 17 CPU seconds importing the same
modules. Where ``trainer.device`` is ``cpu`` the run has a *fork server*: a process that imports what those others need
(``PRELOAD``), waits, and forks. Ray starts its workers through ``py_executable``, a field of its runtime environment,
and vLLM its engine through :func:`multiprocessing.set_executable`; both get the stand-in for ``python`` that
:func:`use_in` writes. It hands its arguments, environment, working folder and open files to the server, whose fork goes
on as that process. The first stand-in starts the server, so that the server has a worker's environment.

The stand-in becomes an ordinary ``python`` where no server answers, where it was called with an option of the
interpreter, and where a variable that modules read when they are imported is not what it is in the server
(``READ_AT_IMPORT``). ``REMA_FORKSERVER=0`` switches all of it off, and beside an accelerator it is not used.

The server ends with the driver, and its forks with it. This file is the stand-in, too (:func:`main`), which runs
without site-packages: it imports the standard library alone.
"""

import array
import contextlib
import fcntl
import gc
import importlib
import json
import logging
import os
import re
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile

SWITCH = "REMA_FORKSERVER"
STAND_IN = "REMA_FORKSERVER_PYTHON"  # its path, in the environment of a fork
# What verl's, Ray's and vLLM's processes on CPU import, in the order of their need.
PRELOAD = (
    "verl",
    "verl.trainer.ppo.v1",
    "ray._private.workers.default_worker",
    "transfer_queue",
    "verl.experimental.agent_loop",
    "verl.experimental.reward_loop",
    "verl.workers.engine_workers",
    "verl.workers.rollout.vllm_rollout.vllm_async_server",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "rema_verl.platforms.vllm_cpu_worker",
)
# Beginnings of the names of variables that modules read when they are imported ...
READ_AT_IMPORT = (
    "VERL_ VLLM_ TORCH HF_ TRANSFORMERS_ TRANSFER_QUEUE TQ_ PYTHON CUDA_ LD_ RAY_ TOKENIZERS_ NCCL_".split()
)
# ... except those that verl, Ray and vLLM set for a single worker, all of which are read when they are used. (vLLM's
# LD_PRELOAD names torch's own libgomp, which a fork has; its inductor setting says nothing where nothing is compiled.)
SET_PER_WORKER = (
    "RAY_RAYLET_PID RAY_LD_PRELOAD RAY_LOCAL_ VERL_REPLICA_RANK VERL_RAY_JOB_ID VERL_SEED VERL_ZMQ "
    "CUDA_VISIBLE_DEVICES VLLM_DP_ VLLM_CPU_OMP VLLM_WORKER_MULTIPROC_METHOD VLLM_DISABLE_SHARED_EXPERTS_STREAM "
    "TORCHINDUCTOR_CPP_DYNAMIC_THREADS PYTHONBREAKPOINT LD_PRELOAD"
).split()
# What multiprocessing runs with -c: a process, or its tracker of resources.
MULTIPROCESSING = re.compile(r"from (multiprocessing\.\w+) import (\w+); ?\2\(([\w=, ]*)\)")
WITHOUT_MEANING = ("-B", "-u")  # for a fork; multiprocessing passes on what its parent was given
MAX_REQUEST = 1 << 20  # bytes; arguments and environment of one process


# --- the stand-in for python ----------------------------------------------------------------------------------------


def open_files() -> list[int]:
    """This process's file descriptors, whatever listing them opens left out."""
    found = [int(name) for name in os.listdir("/proc/self/fd")]
    return [fd for fd in found if os.path.lexists(f"/proc/self/fd/{fd}")]


def ask(address: str, argv: list[str]) -> int | None:
    """Have the server fork a process with our arguments, environment, folder and files; its exit code.

    None where the server is not there or refuses: then nothing was started.
    """
    files = open_files()
    about = {"argv": argv, "cwd": os.getcwd(), "env": dict(os.environ), "files": files, "nice": os.nice(0)}
    request = json.dumps(about).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(address)
            connection.sendmsg(
                [len(request).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))]
            )
            connection.sendall(request)
            answer = connection.recv(8)
        except OSError:
            return None
        if not answer.startswith(b"pid"):
            return None
        # What is asked of us is meant for the process that we stand for.
        pid = int.from_bytes(answer[3:], "big")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda received, _: os.kill(pid, received))
        for fd in files:
            if fd > 2:
                os.close(fd)  # a pipe ends when its last holder is gone, and that must not be us
        code = connection.recv(4)
    return int.from_bytes(code, "big", signed=True) if code else 1  # nothing: the server is gone, and its forks too


def start_server(folder: str, driver: str) -> None:
    """Start the server, unless another stand-in has; whoever connects before it is ready waits."""
    with open(os.path.join(folder, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.exists(address := os.path.join(folder, "socket")):
            return
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(64)
            arguments = f"{listener.fileno()}, {int(driver)}, {folder!r}"
            code = f"from rema_verl.platforms import forkserver; forkserver.serve({arguments})"
            subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            )


def main(folder: str, driver: str, argv: list[str]) -> int:
    """Stand for ``python ARGV``; see the module's head.

    Args:
        folder: the run's, with the socket.
        driver: the process whose run it is.
    """
    code, given = None, list(argv)
    while argv and argv[0] in WITHOUT_MEANING:
        argv = argv[1:]
    if argv and (MULTIPROCESSING.fullmatch(argv[1]) if argv[0] == "-c" else not argv[0].startswith("-")):
        start_server(folder, driver)
        code = ask(os.path.join(folder, "socket"), argv)
    if code is None:
        os.execv(sys.executable, [sys.executable, *given])
    if code < 0:  # ended by a signal: so do we
        with contextlib.suppress(OSError):  # SIGKILL
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


# --- the server -----------------------------------------------------------------------------------------------------


def read_at_import(environment: dict[str, str]) -> dict[str, str]:
    """The part of an environment that decides what modules are when they are imported."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(tuple(READ_AT_IMPORT)) and not name.startswith(tuple(SET_PER_WORKER))
    }


def different(mine: dict[str, str], theirs: dict[str, str]) -> str:
    """The names (values may be secret) of what is not the same in two environments.

    >>> different({"A": "1", "B": "1"}, {"B": "2", "C": "2"})
    'A, B, C'
    """
    return ", ".join(sorted({name for name, _ in mine.items() ^ theirs.items()}))


def receive(connection: socket.socket) -> tuple[dict, list[int]]:
    """One request, and the files that came with it."""
    head, files, _, _ = socket.recv_fds(connection, 4, 256)
    size, text = int.from_bytes(head, "big"), b""
    if not len(head) == 4 or size > MAX_REQUEST:
        raise ValueError("not a request")
    while len(text) < size:
        piece = connection.recv(size - len(text))
        if not piece:
            raise ValueError("cut off")
        text += piece
    return json.loads(text), list(files)


def become(request: dict, files: list[int], ours: list[int]) -> None:
    """In the fork: put files, folder, environment and arguments in place and run. Does not return.

    Args:
        request: see :func:`ask`.
        files: ours, where the request names the numbers they are to have.
        ours: the server's files, which a fork must not keep open.
    """
    import atexit
    import ctypes
    import multiprocessing
    import runpy
    import threading

    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the server
        # Ray ends a worker with its whole process group. No session of its own: Linux shares the cores out by session
        # (sched_autogroup), and an engine, its worker and the agent loop, which wait for each other all the time, in
        # three of them took 1.4 to 1.8 times as long for a message.
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        for number, action in ((signal.SIGCHLD, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
            signal.signal(number, action)
        for fd in ours:
            os.close(fd)
        base = max([*files, *request["files"], 255]) + 1
        moved = [fcntl.fcntl(fd, fcntl.F_DUPFD, base) for fd in files]
        for fd in files:
            os.close(fd)
        for fd, number in zip(moved, request["files"], strict=True):
            os.dup2(fd, number, inheritable=True)
            os.close(fd)
        os.nice(request["nice"] - os.nice(0))  # Ray's workers are, and so is what they start
        os.chdir(request["cwd"])
        if request["argv"][0] == "-c":
            # vLLM titles its processes; where a title goes can be found only while the environment is still there
            with contextlib.suppress(ImportError):
                importlib.import_module("setproctitle").getproctitle()
        threads = os.environ.get("OMP_NUM_THREADS", "")
        os.environ.clear()
        os.environ.update(request["env"])
        if "torch" in sys.modules and (wanted := os.environ.get("OMP_NUM_THREADS", threads)) != threads:
            sys.modules["torch"].set_num_threads(int(wanted))
        if "numpy" in sys.modules:  # or all forks draw the same numbers, where a new process begins anywhere
            sys.modules["numpy"].random.seed()
        argv = request["argv"]
        sys.argv = argv[:1] + argv[2:] if argv[0] == "-c" else list(argv)
        try:
            if argv[0] == "-c":
                module, function, arguments = MULTIPROCESSING.findall(argv[1])[0]
                values = [argument.partition("=") for argument in arguments.replace(" ", "").split(",")]
                positional = [int(name) for name, equals, _ in values if not equals]
                named = {name: int(value) for name, equals, value in values if equals}
                if stand_in := os.environ.get(STAND_IN):
                    multiprocessing.set_executable(stand_in)  # vLLM's engine spawns its worker
                getattr(importlib.import_module(module), function)(*positional, **named)
            else:
                sys.path.insert(0, os.path.dirname(os.path.abspath(argv[0])))
                runpy.run_path(argv[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code & 0xFF)


def serve(listener_fd: int, driver: int, folder: str) -> None:
    """Import everything, then fork on request until the driver ends. Does not return.

    Args:
        listener_fd: a listening Unix socket.
        driver: process id.
        folder: of the run's socket; removed at the end.
    """
    mine = read_at_import(dict(os.environ))  # before imports that change it
    importlib.import_module(PRELOAD[0])
    level, levels = logging.root.level, {handler: handler.level for handler in logging.root.handlers}
    for module in PRELOAD[1:]:
        importlib.import_module(module)
    logging.root.setLevel(level)  # verl's server module sets all of a process to ERROR, which is for its own
    for handler in logging.root.handlers:
        handler.setLevel(levels.get(handler, handler.level))
    gc.collect()
    gc.freeze()  # what is loaded stays: its pages are shared for longer if no collection touches them

    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver
    watched = os.pidfd_open(driver)
    listener = socket.socket(fileno=listener_fd)
    selector = selectors.EpollSelector()
    for file in (listener, ended, watched):
        selector.register(file, selectors.EVENT_READ)
    own = [listener_fd, ended, wake, watched, selector.fileno()]
    waiting: dict[int, socket.socket] = {}  # process id of a fork -> who stands for it
    told: set[str] = set()

    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection, _ = listener.accept()
                files: list[int] = []
                with contextlib.suppress(ValueError, OSError):  # who asks may be gone
                    request, files = receive(connection)
                    if other := different(mine, read_at_import(request["env"])):
                        if other not in told:
                            what = " ".join(request["argv"][:2])
                            print(f"rema-verl: not forked, as {other} is another there: {what}", file=sys.stderr)
                        told.add(other)
                    elif pid := os.fork():
                        waiting[pid] = connection
                        selector.register(connection, selectors.EVENT_READ, pid)
                        connection.sendall(b"pid" + pid.to_bytes(5, "big"))
                    else:
                        become(request, files, [*own, connection.fileno(), *(c.fileno() for c in waiting.values())])
                for fd in files:
                    os.close(fd)
                if connection not in waiting.values():
                    connection.close()
            elif key.fileobj == ended:
                os.read(ended, 1024)
                while waiting:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                    if not pid:
                        break
                    connection = waiting.pop(pid)
                    with contextlib.suppress(KeyError):  # see below
                        selector.unregister(connection)
                    with contextlib.suppress(OSError):
                        connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))
                    connection.close()
            elif key.fileobj == watched:  # the driver has ended
                shutil.rmtree(folder, ignore_errors=True)
                os._exit(0)
            elif key.data in waiting:  # who stood for it was killed
                os.kill(key.data, signal.SIGKILL)
                selector.unregister(key.fileobj)


# --- the driver -----------------------------------------------------------------------------------------------------


def use_in(config) -> None:
    """Have the workers of the Ray cluster that is about to be started forked, where ``trainer.device`` is ``cpu``.

    Args:
        config: verl's whole configuration; ``ray_kwargs.ray_init.runtime_env.py_executable`` is set, unless the user
            has set it.
    """
    if config.trainer.device != "cpu" or os.environ.get(SWITCH) == "0":
        return
    import atexit

    import ray
    from omegaconf import OmegaConf, open_dict
    from ray._private.utils import read_ray_address

    init = config.ray_kwargs.get("ray_init") or {}
    runtime_env = OmegaConf.to_container(OmegaConf.create(init.get("runtime_env") or {}), resolve=True)
    theirs = ray.is_initialized() or init.get("address") or os.environ.get("RAY_ADDRESS") or read_ray_address()
    if theirs or runtime_env.get("py_executable"):
        return  # workers of a cluster that others started, perhaps on other machines
    folder = tempfile.mkdtemp(prefix="rema-verl-")  # mode 0700
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    stand_in = os.path.join(folder, "python")
    with open(stand_in, "w") as file:
        command = shlex.join([sys.executable, "-I", "-S", os.path.abspath(__file__), folder, str(os.getpid())])
        file.write(f'#!/bin/sh\nexec {command} "$@"\n')
    os.chmod(stand_in, 0o700)
    # Ray would start a worker per declared CPU in advance, none of which has verl's runtime environment.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    os.environ[STAND_IN] = stand_in
    with open_dict(config):
        OmegaConf.update(config, "ray_kwargs.ray_init.runtime_env.py_executable", stand_in, force_add=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
