"""`data_prep/build_eval_suite.py`: each benchmark's known layouts, its row count, and overlap with training data."""

import doctest
import json

import _common
import build_eval_suite
import build_math
import pyarrow.parquet as pq
import pytest
from scripts import refused_by, write

OUTPUTS = ["decontamination.json", "eval_suite.parquet", "manifest.json"]
MATH500, LEVEL_3_TO_5 = "math500.parquet", "math_train_l3to5_8523.parquet"


@pytest.fixture
def build(tmp_path, capsys):
    """build(*options) -> (rows, manifest, decontamination report, stdout)."""

    def run(*options, out=tmp_path / "out"):
        capsys.readouterr()
        _common.run_main(build_eval_suite.main, [str(a) for a in (*options, "--out", out)])
        captured = capsys.readouterr()
        assert captured.err == "" and sorted(p.name for p in out.iterdir()) == OUTPUTS
        report, manifest = (json.loads((out / n).read_text()) for n in ("decontamination.json", "manifest.json"))
        return pq.read_table(out / "eval_suite.parquet").to_pylist(), manifest, report, captured.out

    return run


fails = refused_by(build_eval_suite.main)


# set -> rows in one of its published layouts, the answer that must come out; {n} numbers the rows
LAYOUTS = {
    "math500": [({"problem": "p{n}", "solution": r"\boxed{0}", "answer": r"\frac{1}{2}", "level": 3}, r"\frac{1}{2}")],
    "gsm8k": [
        ({"question": "p{n}", "answer": "2 + 1 = <<2+1=3>>3\n#### 1,003"}, "1003"),
        ({"question": "p{n}", "answer": "18"}, "18"),
    ],
    "aime24": [
        ({"id": 60, "problem": "p{n}", "solution": "long", "answer": "204", "url": "u", "year": "2024"}, "204"),
        ({"id": 60, "problem": "p{n}", "solution": r"\boxed{204}", "url": "u"}, "204"),
        ({"ID": "2024-I-1", "Problem": "p{n}", "Solution": "long", "Answer": 204}, "204"),
    ],
    "aime25": [({"problem": "p{n}", "answer": "70", "id": "0"}, "70"), ({"question": "p{n}", "answer": "70"}, "70")],
    "amc23": [
        ({"id": 0, "question": "p{n}", "answer": "27", "url": "u"}, "27"),
        ({"id": 0, "problem": "p{n}", "answer": 27.0, "url": "u"}, "27"),
    ],
    "gaokao2023en": [({"question": "p{n}", "answer": "$[-1,2]$", "source": "s", "id": 1}, "$[-1,2]$")],
    "minerva": [
        ({"question": "p{n}", "answer": "4.5e33"}, r"4.5 \times 10^{33}"),
        ({"problem": "p{n}", "solution": r"$\boxed{0}$, no, $\boxed{np.arcsin(10/13)}$", "type": "t", "idx": 1},
         r"\arcsin(10/13)"),
        ({"question": "p{n}", "gt_cot": r"so \boxed{1.6}", "gt": "1.6"}, "1.6"),
    ],
    "olympiadbench": [
        ({"id": 1, "question": "p{n}", "solution": ["long"], "final_answer": ["$2n-2$"], "answer_type": "e"}, "$2n-2$"),
        ({"question": "p{n}", "final_answer": ["1", "3"], "solution": ["s"]}, "1, 3"),
        ({"problem": "p{n}", "answer": "2n-2"}, "2n-2"),
    ],
}  # fmt: skip


def rows_of(name, layout, count):
    template = LAYOUTS[name][layout][0]
    return [{k: f"{name} {n}?" if v == "p{n}" else v for k, v in template.items()} for n in range(count)]


@pytest.fixture
def all_eight(tmp_path):
    """--source options for the eight sets at their published sizes."""
    options = []
    for name, known in build_eval_suite.BENCHMARKS.items():
        path = write(tmp_path / "sets" / f"{name}.jsonl", rows_of(name, 0, known.rows))
        options += ["--source", f"{name}={path}"]
    return options


def test_the_whole_suite(build, all_eight, tmp_path):
    rows, manifest, report, printed = build(*all_eight)
    assert len(rows) == 3251 and manifest["complete"] and not report["checked"]
    assert manifest["counts"]["by_set"] == {n: b.rows for n, b in build_eval_suite.BENCHMARKS.items()}
    assert "3,251 rows" in printed and "not checked (no --train)" in printed
    ids = [row["extra_info"]["id"] for row in rows]
    assert len(set(ids)) == 3251 and {"aime24-3", "gsm8k-1318", "olympiadbench-674"} <= set(ids)
    for row in rows:
        info = row["extra_info"]
        assert info["id"] == f"{row['data_source']}-{info['index']}" and info["split"] == "test"
        assert row["prompt"] == [{"role": "user", "content": info["question"]}]
        assert row["reward_model"] == {"style": "rule", "ground_truth": LAYOUTS[row["data_source"]][0][1]}
    source = tmp_path / "sets" / "aime24.jsonl"
    assert manifest["sources"]["aime24"]["files"] == {str(source): _common.sha256_file(source)}
    assert manifest["sources"]["minerva"]["rewritten_answers"] == 272


@pytest.mark.parametrize(("name", "layout"), [(n, i) for n, layouts in LAYOUTS.items() for i in range(len(layouts))])
@pytest.mark.parametrize("extension", ["jsonl", "json", "parquet"])
def test_layouts(build, tmp_path, name, layout, extension):
    source = write(tmp_path / f"{name}.{extension}", rows_of(name, layout, 2))
    rows, manifest, _, _ = build("--only", name, "--source", f"{name}={source}", "--allow-count", f"{name}=2")
    assert [row["reward_model"]["ground_truth"] for row in rows] == [LAYOUTS[name][layout][1]] * 2
    assert [row["extra_info"]["question"] for row in rows] == [f"{name} 0?", f"{name} 1?"]
    assert not manifest["complete"]


def test_folder_of_two_files(build, tmp_path):
    """AIME is published as two papers of 15 questions."""
    for paper in ("I", "II"):
        rows = [{"question": f"{paper} {n}?", "answer": str(n)} for n in range(15)]
        write(tmp_path / "aime" / f"{paper}.jsonl", rows)
    rows, _, _, _ = build("--only", "aime25", "--source", f"aime25={tmp_path / 'aime'}")
    assert len(rows) == 30 and rows[15]["extra_info"] == {
        "index": 15, "split": "test", "id": "aime25-15", "question": "II 0?"
    }  # fmt: skip


def test_real_math500_and_its_training_set(build, shared_data):
    """No shared question, as the data's own account says; near-copies show up as shared runs of words."""
    rows, _, report, printed = build(
        "--only", "math500", "--source", f"math500={shared_data / MATH500}", "--train", shared_data / LEVEL_3_TO_5
    )
    counts = report["counts"]
    assert (counts["train_questions"], counts["eval_questions"], counts["dropped"]) == (8523, 500, 0)
    assert counts["exact"] == counts["normalised"] == 0 < counts["ngram"] == len(report["overlaps"])
    assert "0 exact, 0 normalised" in printed and len(rows) == 500
    source = pq.read_table(shared_data / MATH500, columns=["reward_model"]).to_pylist()
    assert [r["reward_model"]["ground_truth"] for r in rows] == [s["reward_model"]["ground_truth"] for s in source]
    worst = report["overlaps"][0]  # every run of 13 words of this question is in one training question
    assert worst["shared_ngrams"] == worst["ngrams"] and worst["train"].endswith("row 1648")


@pytest.fixture
def planted(tmp_path):
    """Five eval questions: a copy, a re-spaced copy, 13 words in common, 12 words in common, and a fresh one."""
    run = " ".join(f"word{n}" for n in range(13))
    questions = ["What is $x + y$?", "Find  THE area.", f"Now {run.upper()}, please.", f"And {run[:-7]} x.", "Fresh?"]
    train = ["What is $x + y$?", "find the area.", f"Let {run} be."]
    eval_file = write(tmp_path / "amc.jsonl", [{"question": q, "answer": "1"} for q in questions])
    train_file = write(tmp_path / "train.jsonl", [{"problem": q, "solution": r"\boxed{1}"} for q in train])
    return ["--only", "amc23", "--source", f"amc23={eval_file}", "--allow-count", "amc23=5", "--train", train_file]


@pytest.mark.parametrize(
    ("drop", "dropped"), [("none", []), ("exact", ["amc23-0"]), ("normalised", ["amc23-0", "amc23-1"])]
)
def test_planted_overlap(build, planted, tmp_path, drop, dropped):
    rows, manifest, report, printed = build(*planted, "--drop-overlap", drop)
    assert [(o["id"], o["kind"], o["train"].rpartition(" ")[2]) for o in report["overlaps"]] == [
        ("amc23-0", "exact", "1"),
        ("amc23-1", "normalised", "2"),
        ("amc23-2", "ngram", "3"),
    ]
    assert [o["id"] for o in report["overlaps"] if o["dropped"]] == dropped
    assert report["overlaps"][2]["example"] == " ".join(f"word{n}" for n in range(13))
    kept = [f"amc23-{n}" for n in range(5) if f"amc23-{n}" not in dropped]
    assert [row["extra_info"]["id"] for row in rows] == kept
    assert f"1 exact, 1 normalised, 1 share 13 words in a row, {len(dropped)} dropped" in printed
    assert manifest["decontamination"]["counts"] == report["counts"]
    train = tmp_path / "train.jsonl"
    assert report["train"][0]["files"] == {str(train): _common.sha256_file(train)}


def test_ngram_length(build, planted):
    assert build(*planted, "--ngram", "12")[2]["counts"]["ngram"] == 2
    assert build(*planted, "--ngram", "14")[2]["counts"]["ngram"] == 0


def test_build_math_output_is_a_train_set(build, shared_data, tmp_path):
    """The training questions of build_math's file are found again, its prompts notwithstanding."""
    mini = shared_data / "math_train_mini_133.parquet"
    arguments = ["--source", mini, "--val-source", shared_data / MATH500, "--prompt", "vrp", "--out", tmp_path / "math"]
    build_math.main([str(a) for a in arguments])
    train = tmp_path / "math" / "train.parquet"
    questions = pq.read_table(mini, columns=["question"]).to_pylist()
    source = write(tmp_path / "amc.jsonl", [{"question": q["question"], "answer": "1"} for q in questions])
    options = ("--only", "amc23", "--source", f"amc23={source}", "--allow-count", "amc23=133", "--train", train)
    assert build(*options)[2]["counts"]["exact"] == 133


def test_limit_and_seed(build, all_eight, tmp_path):
    """The same seed gives the same bytes; the smaller sample is part of the larger; ids do not depend on it."""
    for name, options in {"a": [], "b": [], "c": ["--seed", 1], "d": ["--limit", 7]}.items():
        _, manifest, _, _ = build(*all_eight, "--limit", 5, *options, out=tmp_path / name)
        assert manifest["arguments"]["limit"] == (7 if name == "d" else 5) and not manifest["complete"]
    read = {n: pq.read_table(tmp_path / n / "eval_suite.parquet").to_pylist() for n in "abcd"}
    ids = {n: {row["extra_info"]["id"] for row in rows} for n, rows in read.items()}
    assert len(ids["a"]) == 40 and ids["a"] < ids["d"] and ids["a"] != ids["c"]
    for output in OUTPUTS:
        assert (tmp_path / "a" / output).read_bytes() == (tmp_path / "b" / output).read_bytes()


def test_next_to_the_validation_file_of_build_math(build, all_eight, shared_data, tmp_path):
    """verl concatenates its validation files with `datasets`, which must reconcile the two kinds of extra_info."""
    datasets = pytest.importorskip("datasets")
    build(*all_eight, "--limit", 2)
    sources = ["--source", shared_data / "math_train_mini_133.parquet", "--val-source", shared_data / MATH500]
    build_math.main([str(a) for a in (*sources, "--val-limit", 3, "--out", tmp_path / "math")])
    files = [tmp_path / "math" / "val.parquet", tmp_path / "out" / "eval_suite.parquet"]
    loaded = [datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache")) for file in files]
    data = datasets.concatenate_datasets(loaded)
    assert len(data) == 3 + 16 and data[-1]["extra_info"]["id"].startswith("olympiadbench-")


def test_hub_by_id(build, monkeypatch):
    """Which Hub data sets are asked for; the answers are stand-ins, there is no network in the tests."""
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(name, data_files=None, split=None):
        calls.append((name, split, data_files))
        known = {b.hub.split(":")[0]: n for n, b in build_eval_suite.BENCHMARKS.items()}[name]
        return datasets.Dataset.from_list(rows_of(known, 0, build_eval_suite.BENCHMARKS[known].rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(build()[0]) == 3251
    assert ("openai/gsm8k", "train", "main/test-00000-of-00001.parquet") in calls  # datasets' name for a bare file
    assert ("HuggingFaceH4/MATH-500", "test", None) in calls and len(calls) == 8


def test_hub_not_reachable(fails):
    pytest.importorskip("datasets")
    assert "cannot load 'math-ai/amc23'" in (line := fails("--only", "amc23")) and "pass --source amc23=PATH" in line


# --- mistakes ------------------------------------------------------------------------------------------------------


def test_row_count(fails, build, tmp_path):
    """One line with set, expected and found; an earlier output stays as it was."""
    source = f"aime24={write(tmp_path / 'a.jsonl', rows_of('aime24', 0, 29))}"
    options = ("--only", "aime24", "--source", source)
    build(*options, "--allow-count", "aime24=29")
    line = fails(*options)
    assert "aime24: expected 30 rows, found 29 rows (--allow-count aime24=29 accepts them)" in line
    assert "aime24: expected --allow-count aime24=28, found 29 rows" in fails(*options, "--allow-count", "aime24=28")


BAD_ROWS = {
    "no question": ({"answer": "1"}, "row 2: no question (none of the fields question, problem, extra_info.question)"),
    "empty question": ({"question": " ", "answer": "1"}, "row 2: no question (field 'question' is empty)"),
    "question not text": ({"question": [1], "answer": "1"}, "row 2: field 'question' must be text, found list"),
    "no answer": ({"question": "q"}, "row 2: no ground truth (none of the fields final_answer, reward_model"),
    "empty answer": ({"question": "q", "final_answer": []}, "row 2: no ground truth (field 'final_answer' is empty)"),
    "null answer": ({"question": "q", "answer": None}, "row 2: no ground truth (field 'answer' is empty)"),
    "empty box": ({"question": "q", "answer": r"\boxed{}"}, "row 2: no ground truth (field 'answer' is empty)"),
    "answer not text": ({"question": "q", "answer": {"a": 1}}, "row 2: field 'answer' must be text, found dict"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row(fails, tmp_path, case):
    row, message = BAD_ROWS[case]
    source = write(tmp_path / "o.jsonl", [{"question": "q", "answer": "1"}, row])
    assert f"{source}: {message}" in fails("--only", "olympiadbench", "--source", f"olympiadbench={source}")


def test_worked_solution_without_a_box(fails, tmp_path):
    source = write(tmp_path / "m.jsonl", [{"problem": "q", "solution": "it is 2"}])
    line = fails("--only", "minerva", "--source", f"minerva={source}")
    assert r"m.jsonl: row 1: no ground truth (field 'solution' has no filled \boxed{})" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "aime26"], "argument --only: invalid choice: 'aime26'"),
        (["--source", "nope"], "--source 'nope': expected NAME=VALUE with NAME one of math500, gsm8k"),
        (["--source", "aime24=none.jsonl"], "none.jsonl: no such file or folder"),
        (["--source", "aime24=a/b", "--source", "aime24=c/d"], "aime24 was already given 'a/b'"),
        (["--only", "amc23", "--allow-count", "aime24=2"], "names aime24, which --only leaves out"),
        (["--train", "none.parquet"], "none.parquet: no such file or folder"),
        (["--drop-overlap", "exact"], "--drop-overlap needs --train"),
        (["--ngram", "0"], "argument --ngram: '0' is not a whole number above 0"),
    ],
)
def test_bad_options(fails, options, message):
    assert message in fails(*options)


def test_bad_train_row(fails, planted, tmp_path):
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"text": "x"}')
    assert "train.jsonl: row 4: no question" in fails(*planted)


def test_nothing_half_written(fails, planted, tmp_path, monkeypatch):
    """The disk fills up at the last file."""
    written = []

    def sync(path):
        written.append(path.name)
        if "manifest" in path.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(_common, "_sync", sync)
    assert "No space left on device" in fails(*planted)
    assert len(written) == 3 and list((tmp_path / "out").iterdir()) == []


def test_doctests():
    assert doctest.testmod(build_eval_suite).failed == 0
