"""The stand-in for python behaves like python: exit codes, signals, files, folder, environment."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rema_verl.platforms import forkserver

PRELOADED = "wave"  # a module nothing else here imports
LOUD = "import logging; logging.basicConfig(level=logging.WARNING)\n"
HUSHING = "import logging; logging.root.setLevel(logging.ERROR); logging.root.handlers[0].setLevel(logging.ERROR)\n"
SCRIPT = """
import os, signal, sys
what, *rest = sys.argv[1:]
print({module!r} in sys.modules, os.getcwd(), os.environ.get("OWN"), rest, sys.stdin.read(), flush=True)
if what == "nice":
    what = os.nice(0)
if what == "groups":
    what = 0 if os.getpgid(0) == os.getpid() and os.getsid(0) == os.getsid(os.getppid()) else 7
if what == "warn":
    import logging
    logging.getLogger("verl").warning("heard")
    what = 0
if what == "raise":
    raise ValueError("as asked")
if what == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "wait":
    import time
    print(os.getpid(), flush=True)
    time.sleep(120)
sys.exit(int(what))
"""


@pytest.fixture
def server(tmp_path):
    """(stand-in's command, driver): a server that preloads one small module, for a driver that waits."""
    (tmp_path / "loud.py").write_text(LOUD)
    (tmp_path / "hushing.py").write_text(HUSHING)
    folder = tmp_path / "server"
    folder.mkdir()
    driver = subprocess.Popen(["sleep", "120"])
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        listener.listen(8)
        code = (
            f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from rema_verl.platforms import forkserver; "
            f"forkserver.PRELOAD = ['loud', 'hushing', {PRELOADED!r}]; "
            f"forkserver.serve({listener.fileno()}, {driver.pid}, {str(folder)!r})"
        )
        process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[listener.fileno()])
    (tmp_path / "script.py").write_text(SCRIPT.format(module=PRELOADED))
    yield [sys.executable, "-I", "-S", forkserver.__file__, str(folder), str(driver.pid)], driver
    driver.kill()
    driver.wait()
    assert process.wait(10) == 0 and not folder.exists()  # it ends with its driver and leaves nothing


def run(server, tmp_path: Path, *arguments: str, **environment: str):
    command, _ = server
    return subprocess.run(
        [*command, str(tmp_path / "script.py"), *arguments],
        cwd=tmp_path,
        env={**os.environ, **environment},
        input="typed",
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_fork_has_a_process_group_of_its_own_in_the_servers_session(server, tmp_path):
    assert run(server, tmp_path, "groups").returncode == 0


def test_a_fork_has_the_arguments_folder_environment_files_and_exit_code_of_its_stand_in(server, tmp_path):
    ended = run(server, tmp_path, "3", "a b", OWN="x")
    assert (ended.returncode, ended.stdout) == (3, f"True {tmp_path} x ['a b'] typed\n")
    assert run(server, tmp_path, "0").returncode == 0  # and the next, from the same server
    raised = run(server, tmp_path, "raise")
    assert raised.returncode == 1 and "ValueError: as asked" in raised.stderr
    assert run(server, tmp_path, "warn").stderr == "WARNING:verl:heard\n"  # whatever a preloaded module did to logging
    assert run(server, tmp_path, "kill").returncode == -signal.SIGKILL


def test_a_fork_is_as_nice_as_its_stand_in(server, tmp_path):
    """Ray's workers are niced, and so must be what they start: an engine that is not outranks who asks it."""
    command, _ = server
    nice = subprocess.run(["nice", "-n", "5", *command, str(tmp_path / "script.py"), "nice"], stdin=subprocess.DEVNULL)
    assert nice.returncode == min(os.nice(0) + 5, 19)


def test_where_imports_would_have_gone_another_way_an_ordinary_python_starts(server, tmp_path):
    other = run(server, tmp_path, "4", VERL_LOGGING_LEVEL="one that nobody set")
    assert (other.returncode, other.stdout) == (4, f"False {tmp_path} None [] typed\n")
    worker = run(server, tmp_path, "4", VERL_REPLICA_RANK="1")  # set for one worker, read when it is used
    assert worker.stdout.startswith("True")
    command, _ = server
    option = subprocess.run([*command, "-X", "utf8", "-c", "print('plain')"], capture_output=True, text=True)
    code = subprocess.run([*command, "-c", f"import sys; print({PRELOADED!r} in sys.modules)"], capture_output=True)
    assert (option.stdout, code.stdout) == ("plain\n", b"False\n")


def test_without_a_server_an_ordinary_python_starts(tmp_path):
    (tmp_path / "socket").touch()  # a socket that nobody listens to
    command = [sys.executable, "-I", "-S", forkserver.__file__, str(tmp_path), str(os.getpid())]
    (tmp_path / "script.py").write_text("print('plain')")
    assert subprocess.run([*command, str(tmp_path / "script.py")], capture_output=True).stdout == b"plain\n"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("how", ["terminated", "stand-in killed", "driver killed"])
def test_a_fork_ends_with_its_stand_in_and_with_the_driver(server, tmp_path, how):
    command, driver = server
    process = subprocess.Popen(
        [*command, str(tmp_path / "script.py"), "wait"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    fork = int(process.stdout.readline())
    assert fork != process.pid and alive(fork)
    if how == "driver killed":
        driver.kill()
    else:
        process.send_signal(signal.SIGTERM if how == "terminated" else signal.SIGKILL)
    assert process.wait(30) == {"terminated": -signal.SIGTERM, "stand-in killed": -signal.SIGKILL}.get(how, 1)
    for _ in range(100):
        if not alive(fork):
            return
        time.sleep(0.1)
    raise AssertionError("the fork lives on")


def test_multiprocessing_spawns_through_it(server, tmp_path):
    """As vLLM starts its engine: result, exit code and the tracker of resources."""
    command, _ = server
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    stand_in.chmod(0o700)
    (tmp_path / "child.py").write_text(
        f"import os, sys\ndef answer(queue, shared):\n"
        f"    shared.value = 7\n    queue.put(({PRELOADED!r} in sys.modules, os.getppid()))\n    sys.exit(5)\n"
    )
    (tmp_path / "parent.py").write_text(
        "import multiprocessing, os\nfrom child import answer\n"
        "if __name__ == '__main__':\n"
        f"    multiprocessing.set_executable({str(stand_in)!r})\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    queue, shared = context.Queue(), context.Value('i', 0)\n"
        "    process = context.Process(target=answer, args=(queue, shared))\n"
        "    process.start()\n    forked, parent = queue.get(timeout=60)\n    process.join(60)\n"
        "    print(forked, parent != os.getpid(), shared.value, process.exitcode)\n"
    )
    ended = subprocess.run([sys.executable, str(tmp_path / "parent.py")], capture_output=True, text=True, timeout=120)
    assert ended.stdout == "True True 7 5\n", ended.stderr
    assert ended.stderr == ""
