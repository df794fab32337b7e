"""The terminal viewer and the command line around it."""

import io
import os
import subprocess
import sys

import pytest
from rich.console import Console
from synthetic import trajectory, turn, write_run, write_step

from rema_verl import cli
from rema_verl.dialogue import META_THINKING, REASONING
from rema_verl.report.run import RunError, read_run
from rema_verl.report.show import Viewer, split_flags, visible

HOSTILE = (
    "\x1b]0;owned\x07\x1b[2J\x9b31m[bold red]markup[/bold red][link=file:///etc]x[/link] \u202eback\rover\ud800\x00"
)


@pytest.fixture
def run(tmp_path):
    """Three steps: 1 has two right ones, 2 a wrong truncated one, 3 a lazy one and one that echoes."""
    folder = tmp_path / "a run"
    ask = {"question": "How many?"}
    write_step(folder / "trajectories", 1, [trajectory(1, "one", **ask), trajectory(1, "two", question="Needle?")])
    write_step(folder / "trajectories", 2, [trajectory(2, "three", acc=0.0, flags=["wrong", "truncated"], **ask)])
    turns = [turn(META_THINKING, "look for the needle"), turn(REASONING, "here")]
    write_step(
        folder / "trajectories",
        3,
        [trajectory(3, "four", turns, flags=["lazy"], **ask), trajectory(3, "five", flags=["echo"])],
    )
    return folder


def viewer(folder, width: int = 120, **more) -> Viewer:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    return Viewer(read_run(folder), console, **more)


def shown(v: Viewer) -> str:
    text = v.console.file.getvalue()
    v.console.file.seek(0)
    v.console.file.truncate()
    return text


def test_it_opens_at_the_last_step(run):
    v = viewer(run)
    v.show()
    assert "trajectory four" in shown(v) and v.step == 3


def test_next_and_previous_go_over_the_ends_of_steps(run):
    v = viewer(run)
    v.go(1)
    ids = [v.found[v.at]["id"]]
    while v.move(1):
        ids.append(v.found[v.at]["id"])
    assert ids == ["one", "two", "three", "four", "five"]
    while v.move(-1):
        ids.append(v.found[v.at]["id"])
    assert ids[5:] == ["four", "three", "two", "one"]


@pytest.mark.parametrize(
    "flags, ids",
    [("wrong", ["three"]), ("wrong,truncated", ["three"]), ("lazy", ["four"]), ("echo", ["five"]), ("leak", [])],
)
def test_filters(run, flags, ids):
    v = viewer(run, flags=split_flags(flags))
    found = [t["id"] for step in v.steps for t in v._matching(step)]
    assert found == ids
    assert v.first_match() is bool(ids)


def test_search_looks_into_every_text_of_every_step(run):
    v = viewer(run, wanted="NEEDLE")
    v.list()
    text = shown(v)
    assert "Needle?" in text and text.count("How many?") == 1  # "four" is found by its message
    v.obey("/Needle?")
    assert (v.step, v.found[v.at]["id"]) == (1, "two")


def test_both_roles_side_by_side_or_one_below_the_other(run):
    v = viewer(run)
    v.show()
    assert any("meta_thinking 1" in line and "reasoning 1" in line for line in shown(v).splitlines())
    narrow = viewer(run, width=60)
    narrow.show()
    text = shown(narrow)
    assert "meta_thinking 1" in text and not any(
        "meta_thinking 1" in x and "reasoning 1" in x for x in text.splitlines()
    )


def test_a_turn_shows_its_numbers(run):
    v = viewer(run)
    v.show()
    text = shown(v)
    assert "4 tokens · reward +0 · advantage +0.5" in text and "log-ratio 0.0001" in text and "clipped" not in text


def test_commands(run):
    v = viewer(run)
    for command, step, id in (
        ("s 1", 1, "one"),
        ("t 2", 1, "two"),
        ("n", 2, "three"),
        ("p", 1, "two"),
        ("", 2, "three"),
    ):
        assert v.obey(command)
        assert (v.step, v.found[v.at]["id"]) == (step, id)
    assert v.obey("f lazy") and v.found[v.at]["id"] == "four"
    assert v.obey("f") and v.obey("what?") and "q quit" in shown(v)
    assert not v.obey("q")
    for wrong in ("s 9", "t 9", "f nonsense"):
        with pytest.raises(RunError):
            v.obey(wrong)


def test_hostile_text_reaches_the_terminal_as_its_codes(tmp_path):
    folder = tmp_path / "run"
    turns = [turn(META_THINKING, HOSTILE), turn(REASONING, HOSTILE)]
    bad = trajectory(1, HOSTILE, turns, question=HOSTILE, truth=HOSTILE, stop_reason=HOSTILE, picked=[HOSTILE])
    write_step(folder / "trajectories", 1, [bad])
    v = viewer(folder, wanted="markup")
    v.list()
    v.show()
    text = shown(v)
    assert not set(text) & set("\x1b\x07\x9b\u202e\r\ud800\x00")
    assert "[bold red]markup" in text and r"\x1b" in text and r"\u202e" in text
    text.encode()  # no half of a surrogate pair is left


def test_what_is_harmless_stays():
    assert visible("ä 漢字 ∑\n\t√") == "ä 漢字 ∑\n\t√"


# --------------------------------------------------------------------------------------------------- command line


def main(*arguments: str) -> int:
    return cli.main([str(a) for a in arguments])


def test_show_without_a_terminal_prints_the_list(run, capsys):
    assert main("show", run) == 0
    out = capsys.readouterr().out
    assert "lazy" in out and "echo" in out
    assert main("show", run, "--step", 2, "--trajectory", 1) == 0
    assert "trajectory three" in capsys.readouterr().out
    assert main("show", run, "--filter", "wrong") == 0
    assert "truncated" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["show", "nowhere"], "nowhere: no such file or folder"),
        (["show", "empty"], "empty: no metrics"),
        (["show", "metrics only"], "metrics only: no trajectories there"),
        (["show", "run", "--step", "7"], "step 7 is not on disk; there are 2, 1 to 2"),
        (["show", "run", "--trajectory", "99"], "step 2 has 6 such trajectories, not 99"),
        (["show", "run", "--filter", "bad"], "--filter: 'bad' is not one of wrong"),
        (["show", "broken"], "step_000001.jsonl: line 1: not valid JSON"),
        (["report", "nowhere"], "nowhere: no such file or folder"),
        (["report", "broken"], "step_000001.jsonl: line 1: not valid JSON"),
        (["report", "run", "-o", "nowhere/x.html"], "nowhere/x.html: cannot write it"),
        (["report", "bad config"], "not a readable configuration"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", steps=2)
    write_run(tmp_path / "bad config", steps=2)
    (tmp_path / "bad config" / "hydra" / ".hydra" / "config.yaml").write_text("a: [")
    for step in write_run(tmp_path / "metrics only", steps=2).glob("trajectories/*"):
        step.unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken" / "trajectories").mkdir(parents=True)
    (tmp_path / "broken" / "trajectories" / "step_000001.jsonl").write_text("{\n")
    before = sorted(tmp_path.rglob("*"))
    assert main(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("rema-verl: error: ") and complaint in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written


@pytest.mark.parametrize("arguments", [[], ["report"], ["show"], ["nonsense"], ["show", "x", "--step", "y"]])
def test_a_wrong_command_line_too(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(*arguments)
    assert error.value.code == 2
    assert capsys.readouterr().err.startswith("rema-verl: error: ")


def test_doctor_is_handed_its_arguments(monkeypatch):
    """`doctor` is another module's; the command line adds its arguments, calls it and passes its exit code on."""
    from types import SimpleNamespace

    def add_arguments(parser):
        parser.add_argument("--json", action="store_true")

    fake = SimpleNamespace(add_arguments=add_arguments, main=lambda args: 3 if args.json else 0)
    monkeypatch.setattr(cli, "_doctor", lambda: fake)
    assert main("doctor", "--json") == 3 and main("doctor") == 0


def test_show_needs_neither_plotly_nor_verl(run):
    code = (
        "import sys; sys.modules.update(plotly=None, verl=None, torch=None); from rema_verl.cli import main;"
        f"sys.exit(main(['show', {str(run)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_report_without_plotly_says_what_to_install(run, tmp_path):
    code = (
        "import sys; sys.modules.update(plotly=None); from rema_verl.cli import main;"
        f"sys.exit(main(['report', {str(run)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'rema-verl[report]'" in done.stderr and done.stderr.count("\n") == 1


def test_in_a_terminal_it_takes_commands(run):
    """A real pseudo-terminal: it opens, goes back one trajectory, says what is wrong, and ends."""
    import pty

    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "rema_verl.cli", "show", run], stdin=slave, stdout=subprocess.PIPE, text=True
    )
    os.write(master, b"p\ns 99\nq\n")
    out, _ = process.communicate(timeout=60)
    os.close(master), os.close(slave)
    assert process.returncode == 0
    assert out.index("trajectory four") < out.index("trajectory three") < out.index("step 99 is not on disk")


def test_a_closed_pipe_is_no_error(run):
    done = subprocess.run(
        f"{sys.executable} -m rema_verl.cli show '{run}' | head -c 1", shell=True, capture_output=True, text=True
    )
    assert done.stderr == ""
