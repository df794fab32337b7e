"""`recipes/evaluate.py` and `recipes/rollouts.py`: figures, tables, and no work done twice after a kill."""

import doctest
import fcntl
import itertools
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPO, make_tokenizer

sys.path.insert(0, str(REPO / "recipes"))
import evaluate
import rollouts
from _common import UserError, run_main

from rema_verl.dialogue import ROLES, SINGLE_AGENT_PROMPTS

SETS = {"math500": 3, "aime24": 2, "aime25": 2}  # questions of a small suite


def row(source: str, number: int, truth: str = "4", **extra) -> dict:
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": f"{source} question {number}?"}],
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"index": number, "id": f"{source}-{number}", **extra},
    }


def entry(name: str, acc: float = 1.0, stop: str | None = "finished", status: str = "graded", **more) -> dict:
    return {"id": name, "acc": acc, "stop_reason": stop, "grade_status": status, "dialogue_turns": 2, **more}


def write_questions(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_journal(folder: Path, entries: list[dict], end: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "host-1.jsonl"
    path.write_text("".join(json.dumps({"messages": ["plan", "4"], **e}) + "\n" for e in entries) + end)
    return path


@pytest.fixture
def suite(tmp_path) -> Path:
    rows = [row(source, i) for source, count in SETS.items() for i in range(count)]
    return write_questions(tmp_path / "suite.parquet", rows)


@pytest.fixture
def model(tmp_path) -> Path:
    """A folder that looks like a Hugging Face model."""
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 1000)
    return folder


# --- statistics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_draws_with_a_right_sample(n):
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
        assert evaluate.pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_stays_exact_for_many_samples():
    # the closed formula as a product, 1 - prod (1 - k / i)
    product = 1 - np.prod(1 - 16 / np.arange(256 - 3 + 1, 256 + 1))
    assert evaluate.pass_at_k(256, 3, 16) == pytest.approx(product, rel=1e-12)
    assert evaluate.pass_at_k(256, 0, 256) == 0.0 and evaluate.pass_at_k(256, 1, 256) == 1.0


def test_bootstrap_has_the_distribution_of_drawing_questions():
    values = np.repeat([0.0, 0.25, 1.0], [30, 10, 20])
    fast = evaluate.resample(values, np.random.default_rng(1), 20_000)
    rng = np.random.default_rng(2)
    slow = values[rng.integers(0, len(values), (20_000, len(values)))].mean(1)
    assert fast.mean() == pytest.approx(values.mean(), abs=2e-3)
    assert fast.std() == pytest.approx(slow.std(), rel=0.03)
    assert evaluate.interval(fast) == pytest.approx(evaluate.interval(slow), abs=0.01)


def scores(**correct: list[int]) -> list[evaluate.Score]:
    return [evaluate.Score(name, correct=list(counts), samples=len(counts)) for name, counts in correct.items()]


def test_intervals_are_seeded_and_do_not_depend_on_the_other_sets():
    both = evaluate.measure(scores(math500=[1, 0, 1, 0], aime24=[0, 1, 1]), 1, [], ["math500"], seed=3)
    again = evaluate.measure(scores(aime24=[0, 1, 1], math500=[1, 0, 1, 0]), 1, [], ["math500"], seed=3)
    other = evaluate.measure(scores(math500=[1, 0, 1, 0] * 20), 1, [], ["math500"], seed=4)
    assert both["benchmarks"]["math500"] == again["benchmarks"]["math500"]
    low, high = other["benchmarks"]["math500"]["figures"]["avg@1"]["interval"]
    assert 0.35 < low < 0.45 and 0.55 < high < 0.65  # 80 questions at one half: 0.5 +- 1.96 * 0.056


def test_average_is_the_plain_mean_over_the_papers_sets():
    result = evaluate.measure(scores(math500=[1, 1, 0, 0], aime24=[1], aime25=[0, 0]), 1, [], ["math500", "aime24"], 0)
    assert result["average"]["of"] == ["math500", "aime24"]
    assert result["average"]["figures"]["avg@1"]["mean"] == pytest.approx((0.5 + 1.0) / 2)
    mine = evaluate.measure(scores(mine=[1, 0], yours=[1, 1]), 1, [], ["math500"], 0)
    assert mine["average"]["of"] == ["mine", "yours"]  # none of the paper's: all that there are


# --- the paper's numbers -------------------------------------------------------------------------------------------


def test_paper_numbers_are_whole_questions_and_agree_with_the_published_averages():
    tables = json.loads(evaluate.PAPER.read_text())["tables"]
    for table in tables.values():
        for methods in table["results"].values():
            assert list(methods) == ["vrp", "vrp_rl", "mrp_rl", "rema"]
            for values in methods.values():
                for name, count in table["questions"].items():
                    right = values[name] * count / 100
                    assert abs(right - round(right)) < 0.005 * count / 100 + 1e-9, (name, values)
                mean = np.mean([values[name] for name in table["questions"]])
                assert values["average"] == pytest.approx(mean, abs=0.0101)


def test_paper_column_is_chosen_by_name():
    assert evaluate.paper_column("qwen25_7b/rema", "math")["values"]["aime24"] == 20.00
    assert evaluate.paper_column("qwen25_7b/rema", "judge")["label"] == "paper, Table 1b qwen25_7b/rema"
    assert evaluate.paper_column("judge_loose/qwen25_7b/rema", "judge")["values"]["rewardbench"] == 90.72
    assert evaluate.paper_column(None, "math")["values"] == {}
    for wrong in ("qwen25_7b", "qwen25_7b/rema2", "math/x/rema", "a/b/c/d"):
        with pytest.raises(UserError, match="math/llama3_8b/vrp"):
            evaluate.paper_column(wrong, "math")


def test_paper_average_over_what_was_measured():
    paper = evaluate.paper_column("qwen25_7b/rema", "math")
    assert evaluate.paper_average(paper, paper["sets"]) == 53.09
    assert evaluate.paper_average(paper, ["math500", "aime24"]) == pytest.approx((74.40 + 20.00) / 2)
    assert evaluate.paper_average(paper, ["mine"]) is None


# --- the journal ---------------------------------------------------------------------------------------------------


def test_a_torn_line_is_ignored_until_it_is_complete(tmp_path):
    path = write_journal(tmp_path, [entry("a"), entry("b", acc=0.0)], end='{"id": "c", "acc": 1.')
    journal = rollouts.Journal(tmp_path)
    assert [e["id"] for e in journal.new()] == ["a", "b"] and journal.broken == 0
    assert list(journal.new()) == []
    with path.open("a") as file:
        file.write('0}\n{"id": "d", "acc": 0.5}\n')
    assert [e["id"] for e in journal.new()] == ["c", "d"]


@pytest.mark.parametrize(
    "line", ["", "nonsense", "[1]", '{"acc": 1.0}', '{"id": "a"}', '{"id": "a", "acc": 7}', '{"id": 3, "acc": 1}', "["]
)
def test_a_broken_line_is_no_trajectory(tmp_path, line):
    write_journal(tmp_path, [entry("a")], end=f"{line}\n" + json.dumps(entry("b")) + "\n")
    journal = rollouts.Journal(tmp_path)
    assert [e["id"] for e in journal.new()] == ["a", "b"] and journal.broken == 1


def test_a_journal_that_still_grows_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(rollouts, "SETTLE", 0.2)
    rollouts.settle(tmp_path / "none")
    path, writes = write_journal(tmp_path, [entry("a")]), iter(range(3))

    def sleep(seconds):
        assert seconds == 0.2
        for number in itertools.islice(writes, 1):
            path.write_text(path.read_text() + f"{number}\n")

    monkeypatch.setattr(rollouts.time, "sleep", sleep)
    rollouts.settle(tmp_path)
    assert next(writes, None) is None and path.read_text().endswith("2\n")


def test_pending_is_the_suite_minus_the_journal():
    rows = [row("math500", i) for i in range(4)]
    done = {"math500-0": 4, "math500-1": 3, "math500-2": 7, "elsewhere": 4}
    found = {r["extra_info"]["id"]: r["__rollout_n__"] for r in rollouts.pending(rows, done, samples=4)}
    assert found == {"math500-1": 1, "math500-3": 4}
    assert rollouts.pending(rows, {r["extra_info"]["id"]: 4 for r in rows}, samples=4) == []
    assert len(rollouts.pending([rows[0], rows[0]], {}, samples=1)) == 1  # the same question twice is generated once


def test_only_finished_dialogues_count_as_correct():
    assert rollouts.is_correct(entry("a")) and rollouts.is_correct(entry("a", stop=None))
    for wrong in (entry("a", acc=0.0), entry("a", stop="max_turns"), entry("a", acc=0.5)):
        assert not rollouts.is_correct(wrong)


def test_missing_and_unfinished_count_as_wrong_and_are_counted():
    rows = [row("math500", i) for i in range(4)]
    journal = {
        "math500-0": [entry("math500-0"), entry("math500-0", stop="max_turns"), entry("math500-0")],  # one too many
        "math500-1": [entry("math500-1", acc=0.0, status="timeout")],
    }
    (score,) = evaluate.tally(rows, journal, samples=2, too_long={"math500-2"})
    assert score.correct == [1, 0, 0, 0] and score.samples == 8
    assert (score.unfinished, score.too_long, score.failed) == (1, 2, 3)
    assert score.stops == {"finished": 2, "max_turns": 1} and score.grades["timeout"] == 1


# --- questions and modes -------------------------------------------------------------------------------------------


def test_a_single_agent_is_told_what_to_do_before_the_question():
    question = row("math500", 0)
    assert rollouts.for_mode(question, "rema", "math") is question
    for mode, task in itertools.product(("vrp", "mrp"), ("math", "judge")):
        system, user = rollouts.for_mode(question, mode, task)["prompt"]
        assert system == {
            "role": "system",
            "content": SINGLE_AGENT_PROMPTS[mode if task == "math" else f"judge_{mode}"],
        }
        assert user == question["prompt"][0]
    told = question | {"prompt": [{"role": "system", "content": "other"}, *question["prompt"]]}
    assert rollouts.for_mode(told, "vrp", "math") == rollouts.for_mode(question, "vrp", "math")


def test_questions_have_ids(tmp_path):
    path = write_questions(tmp_path / "a.parquet", [row("math500", 0), row("aime24", 0)])
    assert [r["extra_info"]["id"] for r in rollouts.read_questions([path])] == ["math500-0", "aime24-0"]
    assert [r["data_source"] for r in rollouts.read_questions([path], ("aime24",))] == ["aime24"]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda r: r.update(prompt=[]), "row 2: 'prompt' has no question"),
        (lambda r: r.update(reward_model={"style": "rule", "ground_truth": ""}), "row 2: 'reward_model' has no ground"),
        (lambda r: r.update(data_source=None), "row 2: no 'data_source'"),
        (lambda r: r["extra_info"].update(id="math500-0"), "row 2: 'extra_info.id' is 'math500-0' again"),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, error):
    rows = [row("math500", 0), row("math500", 1)]
    change(rows[1])
    path = write_questions(tmp_path / "bad.parquet", rows)
    with pytest.raises(UserError, match=error) as caught:
        rollouts.read_questions([path])
    assert str(path) in str(caught.value)


def test_an_unknown_set_is_named(suite):
    with pytest.raises(UserError, match="no question of 'math5000'"):
        rollouts.read_questions([suite], ("math500", "math5000"))


# --- the model -----------------------------------------------------------------------------------------------------


def test_models_are_found(tmp_path, model):
    step = tmp_path / "run" / "checkpoints" / "global_step_5"
    (step / "actor" / "huggingface").mkdir(parents=True)
    (step / "actor" / "huggingface" / "config.json").write_text("{}")  # verl saves no weights here unless asked
    (step / "actor" / "fsdp_config.json").write_text("{}")
    assert rollouts.locate(str(model)) == (str(model), None)
    assert rollouts.locate("meta-llama/Llama-3.1-8B-Instruct") == ("meta-llama/Llama-3.1-8B-Instruct", None)
    assert rollouts.locate(str(step)) == rollouts.locate(str(step / "actor")) == (None, step / "actor")
    (step / "actor" / "huggingface" / "model.safetensors").write_bytes(b"w")
    assert rollouts.locate(str(step)) == (str(step / "actor" / "huggingface"), None)
    for wrong, error in ((tmp_path, "neither a Hugging Face model"), (tmp_path / "no", "no such model folder")):
        with pytest.raises(UserError, match=error):
            rollouts.locate(str(wrong))


def test_other_weights_have_another_fingerprint(model):
    before, file = rollouts.fingerprint(str(model)), model / "model.safetensors"
    assert rollouts.fingerprint(str(model)) == before
    weights = bytearray(file.read_bytes())
    weights[len(weights) // 2] ^= 1
    file.write_bytes(weights)
    assert rollouts.fingerprint(str(model)) != before
    assert rollouts.fingerprint("owner/name") is None


# --- whole runs, with a stand-in for verl --------------------------------------------------------------------------

STAND_IN = """
import json, os, sys
import pyarrow.parquet as pq
questions, journal, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
with open(os.path.join(journal, "host-%d.jsonl" % os.getpid()), "a") as file:
    for row in pq.read_table(questions).to_pylist():
        for _ in range(row["__rollout_n__"]):
            if limit == 0:
                file.write('{"id": "torn')
                print("rema-verl: error: the engine died")
                sys.exit(1)
            limit -= 1
            right = float(row["extra_info"]["index"] == 0)
            entry = {"id": row["extra_info"]["id"], "acc": right, "stop_reason": "finished", "grade_status": "graded",
                     "dialogue_turns": 1, "messages": ["plan", "4"]}
            file.write(json.dumps(entry) + "\\n")
"""


@pytest.fixture
def verl(monkeypatch):
    """A stand-in that scores as many trajectories as ``verl["limit"]`` says; ``verl["launches"]`` has their inputs."""
    state = {"limit": 10**6, "launches": [], "too_long": []}

    def command(job, models, questions, launch):
        state["launches"].append(
            {r["extra_info"]["id"]: r["__rollout_n__"] for r in pq.read_table(questions).to_pylist()}
        )
        return [sys.executable, "-c", STAND_IN, str(questions), str(job.folder / "journal" / f"{launch:03d}"),
                str(state["limit"])]  # fmt: skip

    monkeypatch.setattr(rollouts, "verl_command", command)
    monkeypatch.setattr(rollouts, "find_too_long", lambda rows, job, models: state["too_long"])
    monkeypatch.setattr(rollouts, "POLL", 0.01)
    monkeypatch.setattr(rollouts, "SETTLE", 0.0)
    return state


@pytest.fixture
def run(suite, model, tmp_path, capsys):
    """run(*options) -> (exit code, stdout, stderr)."""

    def run(*options, out=tmp_path / "out"):
        arguments = [model, "--questions", suite, "--out", out, "--device", "cpu", *options]
        try:
            run_main(evaluate.main, [str(a) for a in arguments])
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            code = 1 if isinstance(stop.code, str) else stop.code
        else:
            code = 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_run_goes_on_where_it_was(run, verl, tmp_path):
    total = sum(SETS.values()) * 4
    verl["limit"] = 9
    sampled = ("--samples", "4", "--temperature", "0.7")
    code, _, error = run(*sampled)
    assert code == 1 and "rema-verl: error: the engine died" in error and "9 trajectories of this launch" in error
    assert not (tmp_path / "out" / "results.json").exists()
    verl["limit"] = 10**6
    code, out, error = run(*sampled)
    assert code == 0 and error == "" and f"{total - 9} trajectories to generate" in out
    assert verl["launches"][1] == {"math500-2": 3, "aime24-0": 4, "aime24-1": 4, "aime25-0": 4, "aime25-1": 4}
    lines = [line for p in (tmp_path / "out" / "journal").rglob("*.jsonl") for line in p.read_text().splitlines()]
    counts = Counter(json.loads(line)["id"] for line in lines if line.endswith("}"))
    assert set(counts.values()) == {4} and len(counts) == sum(SETS.values())  # nothing twice, nothing missing
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["benchmarks"]["aime24"]["figures"]["avg@4"]["mean"] == 0.5
    assert list(result["benchmarks"]["aime24"]["figures"]) == ["avg@4", "pass@4"]
    before = (tmp_path / "out" / "results.json").read_bytes()
    assert run(*sampled)[0] == 0 and len(verl["launches"]) == 2  # nothing is missing: only the table
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_other_settings_are_refused(run, verl, suite, model, tmp_path):
    assert run()[0] == 0
    changes = {
        "mode": ("--mode", "vrp"), "temperature": ("--temperature", "0.5"), "max_turns": ("--max-turns", "2"),
        "overrides": ("--", "rema.finish_flag=[DONE]"), "only": ("--only", "math500"), "seed": ("--seed", "1"),
    }  # fmt: skip
    for key, options in changes.items():
        code, _, error = run(*options)
        assert code == 2 and error.count("\n") == 1 and f"holds results with {key}=" in error, error
    assert run("--paper", "qwen25_7b/rema")[0] == 0  # what only the table needs may change
    (model / "model.safetensors").write_bytes(b"trained further")
    assert "holds results with weights=" in run()[2]
    write_questions(suite, [row(source, i, truth="5") for source, count in SETS.items() for i in range(count)])
    assert "holds results with questions=" in run()[2]
    assert len(verl["launches"]) == 1


def test_a_mistyped_option_does_not_spoil_the_folder(run, verl, monkeypatch, tmp_path):
    def refuse(rows, job, models):
        raise UserError("verl's options: no such key")

    fine = rollouts.find_too_long
    monkeypatch.setattr(rollouts, "find_too_long", refuse)
    code, _, error = run("--", "a.typo=1")  # seen before there is a folder
    assert code == 2 and "Could not override 'a.typo'" in error and not (tmp_path / "out").exists()
    code, _, error = run("--", "rema.seed=1")  # refused later
    assert code == 2 and error == "error: verl's options: no such key\n"
    (tmp_path / "out" / "model").mkdir()  # merged from another checkpoint
    monkeypatch.setattr(rollouts, "find_too_long", fine)
    assert run()[0] == 0 and not (tmp_path / "out" / "model").exists()
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["overrides"] == []


def test_a_folder_that_cannot_be_made_is_named(run, verl, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, error = run(out=tmp_path / "file" / "out")
    assert code == 2 and error.count("\n") == 1 and "cannot write here" in error


def test_questions_that_do_not_fit_are_wrong_and_not_started(run, verl, tmp_path):
    verl["too_long"] = ["aime24-0"]
    code, out, _ = run()
    assert code == 0 and "aime24-0" not in verl["launches"][0]
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["benchmarks"]["aime24"]["figures"]["avg@1"]["mean"] == 0.0
    assert result["benchmarks"]["aime24"]["missing"] == {"too_long": 1, "failed": 0}
    assert "1 trajectories are missing and count as wrong" in out
    assert run()[0] == 0 and len(verl["launches"]) == 1


def test_failed_trajectories_are_shown_and_tried_again(run, verl, monkeypatch, tmp_path):
    whole = rollouts.verl_command
    monkeypatch.setattr(rollouts, "verl_command", lambda *a: [*whole(*a)[:2], "pass"])  # scores nothing, ends well
    code, _, error = run()
    assert code == 1 and "7 trajectories failed" in error
    assert (
        json.loads((tmp_path / "out" / "results.json").read_text())["benchmarks"]["math500"]["missing"]["failed"] == 3
    )
    monkeypatch.setattr(rollouts, "verl_command", whole)
    assert run()[0] == 0
    assert "missing" not in (tmp_path / "out" / "results.md").read_text()


def test_two_runs_do_not_share_a_folder(run, verl, tmp_path):
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, error = run()
    assert code == 2 and error.count("\n") == 1 and "another run is still writing here" in error


def test_a_damaged_folder_is_named(run, verl, tmp_path):
    write_journal(tmp_path / "out" / "journal" / "001", [entry("math500-0")])
    assert "has a journal but no settings.json" in run()[2]
    (tmp_path / "out" / "settings.json").write_text("{")
    assert "settings.json: not a settings file" in run()[2]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--samples", "4"), "--samples 4 needs a --temperature above 0"),
        (("--samples", "4", "--temperature", "1", "--k", "8"), "--k 8 is more than --samples 4"),
        (("--temperature", "-1"), "--temperature -1.0 is not 0 or above"),
        (("--top-p", "0"), "--top-p 0.0 is not above 0"),
        (("--mode", "both"), "invalid choice: 'both'"),
        (("--task", "judge"), "use --max-turns 1"),
        (("--paper", "gpt/rema"), "--paper 'gpt/rema'"),
        (("--only", "nothing"), "no question of 'nothing'"),
        (("--", "verbose"), "'verbose' is not one of verl's options"),
    ],
)
def test_a_mistake_is_one_line(run, verl, options, error, tmp_path):
    code, out, said = run(*options)
    assert code == 2 and out == "" and said.count("\n") == 1 and error in said
    assert not (tmp_path / "out").exists()


def test_tables(run, verl, tmp_path):
    code, out, _ = run("--paper", "qwen25_7b/rema")
    assert code == 0
    text = (tmp_path / "out" / "results.md").read_text()
    lines = {cells[1].strip(): [c.strip() for c in cells[2:-1]] for line in text.split("\n\n")[2].splitlines()
             for cells in [line.split("|")]}  # fmt: skip
    assert lines["benchmark"] == ["questions", "paper, Table 1a qwen25_7b/rema", "avg@1", "95 %"]
    assert lines["math500"][:3] == ["3", "74.40", "33.33"] and lines["math500"][3] == "0.0 to 100.0"
    assert lines["aime25"][:3] == ["2", "", "50.00"]  # not in the paper's tables
    assert lines["average of 2 sets"][:3] == ["", "47.20", "41.67"]  # (33.33 + 50) / 2, beside (74.40 + 20.00) / 2
    assert "Not the published number of questions: math500 (3 of 500), aime24 (2 of 30)." in text
    assert "The paper's numbers are one greedy answer per question" in text and "--max-turns 30" in text
    assert "| benchmark | samples | turns | finished | right, unfinished | no answer | grading time-out |" in text
    for word in ("math500", "74.40", "33.33"):
        assert word in out
    assert "| a\\|b | 1 |" in evaluate.markdown("t", "a", [(["benchmark", "avg@1"], [["a|b", "1"]])], [])
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["paper"]["values"]["average"] == 53.09
    assert result["benchmarks"]["math500"]["stop_reasons"] == {"finished": 3}
    assert result["settings"]["mode"] == "rema" and result["settings"]["questions"]


# --- what verl is told ---------------------------------------------------------------------------------------------


def job_of(tmp_path: Path, **options) -> rollouts.Job:
    cpu = {"device": "cpu", "gpus": 1, "nodes": 1, "tensor": 1}
    return rollouts.Job(
        **{"folder": tmp_path / "a b'=,c", "model": "m", "files": (), "machine": cpu, "max_context": 1024} | options
    )


@pytest.fixture
def configured(tmp_path):
    """configured(job) -> the whole verl configuration of a launch, as verl would have it, checked."""
    from hydra import compose, initialize_config_module

    from rema_verl import checks

    make_tokenizer("llama3").save_pretrained(tmp_path / "model")

    def make(job: rollouts.Job, models: tuple = ()):
        job.folder.mkdir(exist_ok=True)
        questions = write_questions(job.folder / "pending.parquet", [row("math500", 0)])
        options = rollouts.verl_options(job, models or [str(tmp_path / "model")], questions, launch=3)
        with initialize_config_module("rema_verl.config", version_base=None):
            config = compose("rema_trainer", ["hydra.searchpath=[pkg://verl.trainer.config]", *options])
        checks.check(config)
        return config

    return make


def test_options_of_the_team(configured, tmp_path):
    config = configured(job_of(tmp_path, samples=4, temperature=0.6, top_p=0.9, max_turns=5, seed=7))
    assert config.trainer.val_only and config.trainer.val_before_train and config.trainer.v1.trainer_mode == "rema"
    assert config.rema.max_turns == 5 and config.rema.journal == str(tmp_path / "a b'=,c" / "journal" / "003")
    sampling = config.actor_rollout_ref.rollout.val_kwargs
    assert (sampling.temperature, sampling.top_p, sampling.do_sample) == (0.6, 0.9, True)
    assert config.actor_rollout_ref.rollout.seed == 2007  # each launch has its own
    assert config.actor_rollout_ref.actor.fsdp_config.model_dtype == "fp32"  # +device=cpu


def test_options_of_a_single_agent(configured, tmp_path):
    config = configured(job_of(tmp_path, mode="mrp"))
    assert config.actor_rollout_ref.rollout.agent.default_agent_loop == "single_turn_agent"
    assert config.trainer.v1.trainer_mode == "sync" and config.reward.reward_manager.name == "rema"
    sampling = config.actor_rollout_ref.rollout.val_kwargs
    assert (sampling.temperature, sampling.do_sample) == (0, False) and config.rema.max_turns == 1


def test_options_of_a_team_of_two_models(configured, tmp_path):
    make_tokenizer("qwen2").save_pretrained(tmp_path / "second")
    machine = {"device": "gpu", "gpus": 8, "nodes": 1, "tensor": 1}
    config = configured(job_of(tmp_path, machine=machine), [str(tmp_path / "model"), str(tmp_path / "second")])
    assert config.trainer.v1.trainer_mode == "rema_separate" and not config.rema.roles.reasoning.trainable
    assert config.rema.roles.reasoning.model_path == str(tmp_path / "second")
    assert config.actor_rollout_ref.rollout.gpu_memory_utilization == 0.35  # both on the same accelerators


def test_a_checkpoint_of_two_models_is_a_team(run, verl, model, tmp_path):
    step = tmp_path / "global_step_3"
    for role in ROLES:
        shutil.copytree(model, step / "actor" / role)
    assert rollouts.split_team(str(step)) == tuple(str(step / "actor" / role) for role in ROLES)
    assert rollouts.split_team(str(model)) == (str(model), None)
    assert run("--reasoning-model", model)[0] == 0
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["reasoning_model"] == str(model) and len(settings["weights"]) == 2
    assert "--mode vrp is one agent" in run("--reasoning-model", model, "--mode", "vrp")[2]


@pytest.mark.parametrize("mode", rollouts.MODES)
def test_options_on_gpus(configured, tmp_path, mode):
    machine = {"device": "gpu", "gpus": 8, "nodes": 2, "tensor": 2}
    config = configured(job_of(tmp_path, mode=mode, machine=machine))
    assert config.trainer.n_gpus_per_node == 8 and config.actor_rollout_ref.rollout.tensor_model_parallel_size == 2
    assert config.actor_rollout_ref.actor.fsdp_config.param_offload


@pytest.mark.parametrize("mode", rollouts.MODES)
def test_questions_that_do_not_fit_are_found(tmp_path, mode):
    make_tokenizer("qwen2").save_pretrained(tmp_path / "model")
    short, long = row("math500", 0), row("math500", 1)
    long["prompt"][0]["content"] = "word " * 800
    job = job_of(tmp_path, mode=mode, max_context=900)
    assert rollouts.find_too_long([short, long], job, [str(tmp_path / "model")]) == ["math500-1"]
    wrong = job_of(tmp_path, mode=mode, overrides=("rema.max_turn=3",))
    with pytest.raises(UserError, match="verl's options"):
        rollouts.find_too_long([short], wrong, str(tmp_path / "model"))


# --- the shell scripts ---------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path):
    """recipe(script, *arguments, **environment) -> (exit code, what evaluate.py was called with, stderr)."""
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)

    def run(script, *arguments, **environment):
        result = subprocess.run(
            ["bash", f"recipes/{script}", *arguments],
            cwd=REPO, env={"PATH": f"{stub.parent}:/usr/bin:/bin", "RUNS": str(tmp_path / "runs")} | environment,
            capture_output=True, text=True,
        )  # fmt: skip
        return result.returncode, result.stdout.splitlines(), result.stderr

    return run


def value(arguments: list[str], option: str) -> str:
    return arguments[arguments.index(option) + 1]


def test_math_recipe(recipe, suite, tmp_path):
    step = "/x/mine/checkpoints/global_step_20/actor"
    code, said, _ = recipe("eval_math.sh", step, "a.b=1", SUITE=str(suite))
    assert code == 0 and said[:3] == ["recipes/evaluate.py", step, "--questions"] and said[-2:] == ["--", "a.b=1"]
    assert value(said, "--out") == str(tmp_path / "runs/eval_math/mine_global_step_20_rema_n1")
    assert (value(said, "--max-turns"), value(said, "--max-message"), value(said, "--temperature")) == (
        "30",
        "512",
        "0",
    )
    assert "--paper" not in said and "--only" not in said
    _, said, _ = recipe("eval_math.sh", "org/m", SUITE=str(suite), MODE="mrp", N="16", K="4 16", ONLY="aime24 amc23",
                        PAPER="qwen25_7b/mrp_rl")  # fmt: skip
    assert value(said, "--out").endswith("org_m_mrp_n16") and value(said, "--max-message") == "2048"
    assert (value(said, "--temperature"), value(said, "--paper")) == ("1.0", "qwen25_7b/mrp_rl")
    assert said[said.index("--k") :][:3] == ["--k", "4", "16"]
    assert said[said.index("--only") :][:3] == ["--only", "aime24", "amc23"]


def test_judge_recipe(recipe, suite):
    code, said, _ = recipe("eval_judge.sh", "org/m", SUITE=f"{suite} {suite}")
    assert code == 0 and value(said, "--task") == "judge" and value(said, "--max-turns") == "1"
    assert said[said.index("--questions") :][:3] == ["--questions", str(suite), str(suite)]


@pytest.mark.parametrize(
    ("script", "build"), [("eval_math.sh", "build_eval_suite.py"), ("eval_judge.sh", "build_judge.py")]
)
def test_recipes_without_data_or_model_say_so(recipe, suite, script, build):
    code, _, error = recipe(script, "org/m", SUITE="/nowhere.parquet")
    assert code == 2 and error.count("\n") == 1 and "/nowhere.parquet" in error and build in error
    code, _, error = recipe(script, SUITE=str(suite))
    assert code == 2 and error.count("\n") == 1 and "no model" in error


def test_doctests():
    for module in (evaluate, rollouts):
        assert doctest.testmod(module).failed == 0
