"""`data_prep/build_math.py`: real MATH rows through to verl's own loader, and every way a user can get it wrong.

Real rows come from the shared data folder (`REMA_SHARED_DATA`, else `shared/data` beside the repository).
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scripts import refused_by, write

REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "data_prep" / "build_math.py"
OUTPUTS = ["manifest.json", "train.parquet", "val.parquet"]

sys.path.insert(0, str(SCRIPT.parent))  # the scripts find `_common` beside themselves
_spec = importlib.util.spec_from_file_location("build_math", SCRIPT)
build_math = sys.modules["build_math"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build_math)
import _common  # noqa: E402

LEVEL_3_TO_5, MINI, MATH500 = "math_train_l3to5_8523.parquet", "math_train_mini_133.parquet", "math500.parquet"


@pytest.fixture
def build(tmp_path, capsys):
    """Run the script in this process: build(train, val, *options) -> (train rows, val rows, manifest)."""

    def run(source, val_source, *options, out=tmp_path / "out"):
        arguments = ["--source", source, "--val-source", val_source, "--out", out, *options]
        _common.run_main(build_math.main, [str(a) for a in arguments])
        manifest = json.loads((out / "manifest.json").read_text())
        return *(pq.read_table(out / f"{s}.parquet").to_pylist() for s in ("train", "val")), manifest

    return run


fails = refused_by(build_math.main)


def raw(n, level="Level 3", subject="Algebra", **fields):
    """A row of the original MATH release."""
    solution = rf"First $\boxed{{0}}$. In fact it is $\boxed{{\frac{{{n}}}{{2}}}}$."
    return {"problem": f"What is half of {n}?", "level": level, "type": subject, "solution": solution} | fields


@pytest.fixture
def val(tmp_path):
    """A validation file of three questions that no raw(n) with n < 1000 repeats."""
    rows = [{"question": f"Validation question {n}?", "answer": n, "level": 1, "subject": "Algebra"} for n in (1, 2, 3)]
    return write(tmp_path / "val.jsonl", rows)


# --- real rows -----------------------------------------------------------------------------------------------------


def test_levels_3_to_5_real_rows(build, shared_data, capsys):
    """8,523 rows, less one exact repeat, one repeat with other spacing, and two whose answer was lost upstream."""
    train, val, manifest = build(shared_data / LEVEL_3_TO_5, shared_data / MATH500)
    assert manifest["train_source"]["rows"] == 8523
    assert {k: n for k, n in manifest["removed"].items() if n} == {
        "no_ground_truth": 2,
        "duplicate_exact": 1,
        "duplicate_normalised": 1,
    }
    assert manifest["removed_rows"] == {
        "no_ground_truth": [5054, 5158],
        "duplicate_exact": [4007],
        "duplicate_normalised": [4465],
    }
    # all four removed rows are of level 5, which has 3,361 in the source
    assert manifest["counts"]["train"]["by_level"] == {"3": 2514, "4": 2648, "5": 3361 - 4}
    assert len(train) == manifest["counts"]["train"]["rows"] == 8519
    assert len(val) == manifest["counts"]["val"]["rows"] == 500
    assert manifest["counts"]["val"]["by_level"] == {"1": 43, "2": 90, "3": 105, "4": 128, "5": 134}
    for rows, split, name in ((train, "train", "math"), (val, "val", "math500")):
        counts = manifest["counts"][split]
        assert set(counts["by_subject"]) == set(build_math.SUBJECTS)
        assert counts["by_subject"] == Counter(r["extra_info"]["subject"] for r in rows)
        assert sum(n for levels in counts["by_subject_and_level"].values() for n in levels.values()) == len(rows)
        assert {r["data_source"] for r in rows} == {name}
        assert {r["extra_info"]["split"] for r in rows} == {split}
        assert len({r["extra_info"]["index"] for r in rows}) == len(rows)
        for r in rows:
            assert r["prompt"] == [{"role": "user", "content": r["extra_info"]["question"]}]
            assert r["reward_model"]["style"] == "rule" and r["reward_model"]["ground_truth"]
            assert "step by step and output" not in r["prompt"][0]["content"]
    keys = [{_common.normalise_question(r["extra_info"]["question"]) for r in rows} for rows in (train, val)]
    assert len(keys[0]) == 8519 and not keys[0] & keys[1]
    printed = capsys.readouterr().out
    assert "8,519" in printed and "Precalculus" in printed and "1 duplicate_normalised" in printed


def test_answers_and_order_are_the_sources(build, shared_data):
    """`index` leads back to the source row, whose question and answer arrive unchanged."""
    train, _, _ = build(shared_data / LEVEL_3_TO_5, shared_data / MATH500, "--limit", "300")
    source = pq.read_table(shared_data / LEVEL_3_TO_5, columns=["question", "reward_model"]).to_pylist()
    indices = [r["extra_info"]["index"] for r in train]
    assert indices == sorted(indices)
    for row, index in zip(train, indices, strict=True):
        assert row["prompt"][0]["content"] == source[index]["question"]
        assert row["reward_model"]["ground_truth"] == source[index]["reward_model"]["ground_truth"]


def test_mini_is_19_of_each_subject(build, shared_data, tmp_path):
    arguments = (shared_data / LEVEL_3_TO_5, shared_data / MATH500, "--mini")
    train, _, manifest = build(*arguments)
    assert len(train) == 133
    assert manifest["counts"]["train"]["by_subject"] == dict.fromkeys(build_math.SUBJECTS, 19)
    other, _, _ = build(*arguments, "--seed", "1", out=tmp_path / "other")
    assert {r["extra_info"]["index"] for r in other} != {r["extra_info"]["index"] for r in train}
    # the paper's own 133 come through whole
    train, _, manifest = build(shared_data / MINI, shared_data / MATH500, "--mini", out=tmp_path / "paper")
    assert len(train) == 133 and not manifest["removed_rows"]


def test_same_input_and_seed_give_the_same_bytes(build, shared_data, tmp_path):
    arguments = (shared_data / LEVEL_3_TO_5, shared_data / MATH500, "--limit", "400", "--val-limit", "50", "--seed")
    manifests = [build(*arguments, seed, out=tmp_path / name)[2] for name, seed in (("a", 7), ("b", 7), ("c", 8))]
    for name in OUTPUTS:
        a, b, c = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert a == b and a != c, name
    for name in ("train.parquet", "val.parquet"):
        assert manifests[0]["outputs"][name]["sha256"] == _common.sha256_file(tmp_path / "a" / name)
    source = str(shared_data / MATH500)
    assert manifests[0]["val_source"]["files"] == {source: _common.sha256_file(shared_data / MATH500)}
    assert manifests[0]["seed"] == 7 and manifests[0]["arguments"]["limit"] == 400
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == OUTPUTS


def test_smaller_limit_is_part_of_the_larger(build, shared_data, tmp_path):
    arguments = (shared_data / MINI, shared_data / MATH500)
    small, val, _ = build(*arguments, "--limit", 20, "--val-limit", 10, out=tmp_path / "a")
    large, _, _ = build(*arguments, "--limit", 40, out=tmp_path / "b")
    whole, _, _ = build(*arguments, "--limit", 1000, out=tmp_path / "c")
    small, large = ({r["extra_info"]["index"] for r in rows} for rows in (small, large))
    assert (len(small), len(large), len(whole), len(val)) == (20, 40, 133, 10) and small < large


def test_planted_overlap_is_removed(build, shared_data, tmp_path):
    """Two MATH500 questions in train, one of them re-spaced and in capitals, go; val-limit does not hide them."""
    questions = [r["question"] for r in pq.read_table(shared_data / MATH500, columns=["question"]).to_pylist()]
    planted = [{"question": questions[3]}, {"question": "  " + questions[4].upper().replace(" ", " \n ")}]
    rows = [raw(1), *(dict(p, answer="1", level=5, subject="Algebra") for p in planted)]
    source = write(tmp_path / "t.jsonl", rows)
    train, val, manifest = build(source, shared_data / MATH500, "--val-limit", 1)
    assert len(train) == len(val) == 1
    assert manifest["removed"]["in_validation_exact"] == manifest["removed"]["in_validation_normalised"] == 1
    assert manifest["removed_rows"] == {"in_validation_exact": [1], "in_validation_normalised": [2]}


def test_verl_loads_the_files(build, shared_data, tmp_path, monkeypatch):
    """verl's own RLHFDataset, with its length filter, takes both files."""
    datasets = pytest.importorskip("datasets")
    rl_dataset = pytest.importorskip("verl.utils.dataset.rl_dataset")
    from omegaconf import OmegaConf
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    build(shared_data / MINI, shared_data / MATH500, "--val-limit", 60)
    core = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    config = OmegaConf.create({"max_prompt_length": 4096, "filter_overlong_prompts_workers": 1})
    for name, size, source in (("train", 133, "math"), ("val", 60, "math500")):
        file = tmp_path / "out" / f"{name}.parquet"
        dataset = rl_dataset.RLHFDataset([str(file)], tokenizer, config)
        assert len(dataset) == size
        rows = [dataset[i] for i in range(size)]
        row = rows[0]
        assert row["data_source"] == source and row["reward_model"]["ground_truth"]
        assert row["index"] == row["extra_info"]["index"]
        assert list(row["raw_prompt"]) == [{"role": "user", "content": row["extra_info"]["question"]}]
        assert len(rl_dataset.collate_fn(rows)["raw_prompt"]) == size


# --- formats -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", ["parquet", "json", "jsonl"])
def test_raw_math_in_each_format(build, val, tmp_path, extension):
    rows = [raw(1, "Level 3"), raw(2, "Level 5", "Geometry"), raw(3, "Level 2"), raw(4, "Level ?")]
    train, validation, manifest = build(write(tmp_path / f"train.{extension}", rows), val)
    assert [r["reward_model"]["ground_truth"] for r in train] == [r"\frac{1}{2}", r"\frac{2}{2}"]
    assert [r["extra_info"]["level"] for r in train] == [3, 5]
    assert [r["extra_info"]["subject"] for r in train] == ["Algebra", "Geometry"]
    assert manifest["removed"]["level"] == 2  # level 2, and MATH's "Level ?"
    assert [r["reward_model"]["ground_truth"] for r in validation] == ["1", "2", "3"]
    assert {r["data_source"] for r in validation} == {"math_val"}


def test_folder_of_files_as_math_is_released(build, val, tmp_path):
    """One pretty-printed json object per question in a folder per subject, next to files that are not data."""
    for n in range(3):
        path = tmp_path / "MATH" / "algebra" / f"{n}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(raw(n), indent=1))
    write(tmp_path / "MATH" / "more.parquet", [raw(7), raw(1)])
    (tmp_path / "MATH" / "README.md").write_text("not data")
    write(tmp_path / "MATH" / ".cache" / "x.json", {"not": "a row"})
    train, _, manifest = build(tmp_path / "MATH", val, "--val-name", "mine")
    assert [r["extra_info"]["index"] for r in train] == [0, 1, 2, 3]
    assert manifest["removed"]["duplicate_exact"] == 1 and len(manifest["train_source"]["files"]) == 4
    assert {r["data_source"] for r in pq.read_table(tmp_path / "out" / "val.parquet").to_pylist()} == {"mine"}


def test_json_lines_under_the_name_json(build, val, tmp_path):
    lines = write(tmp_path / "t.jsonl", [raw(1), raw(2)])
    assert len(build(lines.rename(tmp_path / "t.json"), val)[0]) == 2


def test_rows_in_verl_format(build, val, tmp_path):
    """The question from the prompt, without verl's MATH instruction; our own output goes through unchanged."""
    instruction = " Let's think step by step and output the final answer within \\boxed{}."
    row = {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "What is 2+2?" + instruction}],
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"index": 0},
    }
    train, _, manifest = build(write(tmp_path / "verl.parquet", [row]), val, "--levels", "all")
    assert train[0]["prompt"] == [{"role": "user", "content": "What is 2+2?"}]
    assert train[0]["extra_info"]["level"] is None and manifest["counts"]["train"]["by_level"] == {"unknown": 1}
    write(tmp_path / "raw.jsonl", [raw(n) for n in range(5)])
    first, _, _ = build(tmp_path / "raw.jsonl", val, out=tmp_path / "first")
    again, _, _ = build(tmp_path / "first" / "train.parquet", val, out=tmp_path / "first")
    assert first == again


@pytest.mark.parametrize(
    ("levels", "kept"), [("1-5", [1, 2, 3, 4, 5]), ("3-5", [3, 4, 5]), ("4", [4]), ("2-3", [2, 3])]
)
def test_levels(build, val, tmp_path, levels, kept):
    source = write(tmp_path / "t.parquet", [raw(n, level=n) for n in range(1, 6)])
    assert [r["extra_info"]["level"] for r in build(source, val, "--levels", levels)[0]] == kept


def test_drop_unanswered_counts_them(build, val, tmp_path):
    source = write(tmp_path / "t.jsonl", [raw(1), raw(2, solution="it is $2$")])
    train, _, manifest = build(source, val, "--drop-unanswered")
    assert len(train) == 1 and manifest["removed"]["no_ground_truth"] == 1


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"$\boxed{\frac{1}{\sqrt{2}}}$ done", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{1} or \boxed{2}", "2"),
        (r"\boxed{\left\{1,2\right\}}", r"\left\{1,2\right\}"),
        (r"\boxed{\{x \mid x > 0}", r"\{x \mid x > 0"),
        (r"\fbox{C}", "C"),
        (r"so $\boxed 7$ it is", "7"),
        (r"\boxed {8}", "8"),
        (r"\boxed{\text{(A)}\\ }", r"\text{(A)}\\"),
        (r"\boxed{}", None),
        (r"\boxed{1", None),
        (r"\boxedfoo{1}", None),
        ("no box", None),
        ("{" * 100_000 + r"\boxed{" + "{" * 100_000 + "}" * 100_001, "{" * 100_000 + "}" * 100_000),
    ],
)
def test_last_boxed(text, content):
    assert _common.last_boxed(text) == content


# --- the Hub -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "train_call"),
    [
        ([], ("hkust-nlp/SimpleRL-Zoo-Data", "train", "simplelr_qwen_level3to5/train.parquet")),
        (["--levels", "1-5"], ("DigitalLearningGmbH/MATH-lighteval", "train", None)),
    ],
)
def test_hub_by_id(tmp_path, monkeypatch, options, train_call):
    """Which Hub data sets are asked for; the answers are stand-ins, there is no network in the tests."""
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(name, data_files=None, split=None):
        calls.append((name, split, data_files))
        return datasets.Dataset.from_list([raw(n) for n in ([1, 2] if split == "train" else [8])])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    _common.run_main(build_math.main, ["--out", str(tmp_path / "out"), *options])
    assert calls == [("HuggingFaceH4/MATH-500", "test", None), train_call]
    rows = pq.read_table(tmp_path / "out" / "val.parquet").to_pylist()
    assert rows[0]["data_source"] == "math500"
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["train_source"]["source"].startswith(train_call[0]) and manifest["counts"]["train"]["rows"] == 2


def run_script(*options, **environment):
    """The script as a user runs it."""
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def test_hub_not_reachable(tmp_path, val):
    """In its own process: with HF's real client, offline, one line that names the way out."""
    pytest.importorskip("datasets")
    result = run_script("--val-source", val, "--out", tmp_path / "out", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "hkust-nlp/SimpleRL-Zoo-Data" in result.stderr and "--source PATH" in result.stderr
    assert not (tmp_path / "out").exists()


# --- mistakes ------------------------------------------------------------------------------------------------------


def test_command_line(tmp_path, val):
    """As a user runs it: a good run is quiet on stderr, a bad one is one line and exit code 2."""
    source = write(tmp_path / "t.jsonl", [raw(1)])
    good = run_script("--source", source, "--val-source", val, "--out", tmp_path / "out")
    assert (good.returncode, good.stderr) == (0, "") and "wrote train.parquet" in good.stdout
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == OUTPUTS
    bad = run_script("--source", tmp_path / "none.jsonl", "--val-source", val)
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr == f"error: {tmp_path}/none.jsonl: no such file or folder\n"


BAD_ROWS = {
    "no question": ({"answer": "1", "level": 3}, "row 2: no question (none of the fields question,"),
    "empty question": (raw(2, problem=" \n"), "row 2: no question (field 'problem' is empty)"),
    "null question": (raw(2, problem=None), "row 2: no question (field 'problem' is empty)"),
    "question not text": (raw(2, problem=["a"]), "row 2: field 'problem' must be text, found list"),
    "prompt without user": ({"prompt": [], "answer": "1"}, "row 2: no question (field 'prompt' is empty)"),
    "no answer field": ({"question": "q"}, "row 2: no ground truth (none of the fields reward_model.ground_truth,"),
    "empty answer": ({"question": "q", "answer": ""}, "row 2: no ground truth (field 'answer' is empty)"),
    "null answer": ({"question": "q", "answer": None}, "row 2: no ground truth (field 'answer' is empty)"),
    "nan answer": ({"question": "q", "answer": float("nan")}, "row 2: no ground truth (field 'answer' is empty)"),
    "emptied ground truth": (
        {"question": "q", "answer": "1", "reward_model": {"ground_truth": " "}},
        "row 2: no ground truth (field 'reward_model.ground_truth' is empty)",
    ),
    "no box": (raw(2, solution="It is 2."), "row 2: no ground truth (field 'solution' has no filled \\boxed{})"),
    "answer not text": ({"question": "q", "answer": [1]}, "row 2: field 'answer' must be text, found list"),
    "lone surrogate": ({"question": "q\ud800", "answer": "1"}, "row 2: field 'question' is not valid Unicode text"),
    "bad level": (raw(2, level="Level 9"), "row 2: field 'level' is 'Level 9', expected 1 to 5"),
    "not an object": ("text", "row 2: expected an object with named fields, found str"),
}


@pytest.mark.parametrize("split", ["--source", "--val-source"])
@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row(fails, build, val, tmp_path, case, split):
    """File, row and field are named; what an earlier run wrote stays."""
    row, message = BAD_ROWS[case]
    good, bad = write(tmp_path / "good.jsonl", [raw(1)]), write(tmp_path / "bad.jsonl", [raw(5), row])
    build(good, val)
    other = "--val-source" if split == "--source" else "--source"
    assert f"{bad}: {message}" in fails(split, bad, other, good)


def test_row_with_no_ground_truth_in_real_rows(fails, shared_data, tmp_path):
    """An emptied answer in the real file is not mistaken for one of the two known ones."""
    table = pq.read_table(shared_data / MINI)
    rows = table.to_pylist()
    rows[40]["reward_model"]["ground_truth"] = ""
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), tmp_path / "t.parquet")
    line = fails("--source", tmp_path / "t.parquet", "--val-source", shared_data / MATH500)
    assert "t.parquet: row 41: no ground truth (field 'reward_model.ground_truth' is empty)" in line


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", b"", "t.jsonl: the file is empty"),
        ("t.parquet", b"", "t.parquet: the file is empty"),
        ("t.jsonl", b"\n\n", "t.jsonl: the file has no rows"),
        ("t.json", b"[]", "t.json: the file has no rows"),
        ("t.json", b"[{", "t.json: not valid JSON"),
        ("t.jsonl", b'{"question": "q", "answer": "1"}\n{"quest', "t.jsonl: near line 2: not valid JSON"),
        ("t.jsonl", b"\xff\xfe\x00", "t.jsonl: near line 1: not valid JSON"),
        ("t.json", b"[" * 200_000, "t.json: not valid JSON"),
        ("t.parquet", b"PAR1 but no more", "t.parquet: not a readable parquet file"),
        ("t.csv", b"question,answer\n", "t.csv: unsupported extension '.csv'"),
        ("empty", None, "empty: no .parquet, .json, .jsonl file in this folder"),
    ],
)
def test_bad_file(fails, val, tmp_path, name, content, message):
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    assert message in fails("--source", path, "--val-source", val)
    assert message in fails("--source", val, "--val-source", path)


def test_parquet_without_rows_and_truncated_parquet(fails, val, tmp_path):
    pq.write_table(pa.table({"question": pa.array([], pa.string())}), tmp_path / "none.parquet")
    assert "none.parquet: the file has no rows" in fails("--source", tmp_path / "none.parquet", "--val-source", val)
    data = write(tmp_path / "t.parquet", [raw(n) for n in range(50)]).read_bytes()
    (tmp_path / "t.parquet").write_bytes(data[:60] + b"\0" * 60 + data[120:])
    assert "t.parquet: not a readable parquet file" in fails("--source", tmp_path / "t.parquet", "--val-source", val)


@pytest.mark.parametrize("levels", ["0-5", "5-3", "3-6", "three", "", "3-5-5", "-1"])
def test_unknown_level_range(fails, val, levels):
    assert f"--levels '{levels}': expected a range" in fails("--source", val, f"--levels={levels}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "0"], "argument --limit: '0' is not a whole number above 0"),
        (["--val-limit", "-4"], "--val-limit"),
        (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["--nope"], "unrecognized arguments: --nope"),
        (["--source", "data/none.parquet"], "data/none.parquet: no such file or folder"),
        (["--source", "/none/at/all"], "/none/at/all: no such file or folder"),
    ],
)
def test_bad_options(fails, val, options, message):
    assert message in fails("--source", val, "--val-source", val, *options)


def test_nothing_left(fails, val, tmp_path):
    source = write(tmp_path / "t.jsonl", [raw(1, level=1), raw(2, level=None)])
    line = fails("--source", source, "--val-source", val)
    assert "no train row is left with --levels 3-5 (removed: 2 level)" in line and "--levels all" in line
    assert "--mini needs 19 train questions of each subject, found 1 of Algebra" in fails(
        "--source", source, "--val-source", val, "--mini", "--levels", "1"
    )


@pytest.mark.parametrize("fail_at", [1, 2])
def test_full_disk_leaves_earlier_outputs(fails, build, val, tmp_path, monkeypatch, fail_at):
    """A write that stops half-way, in either file: earlier outputs stay, no temporary file stays."""
    source = write(tmp_path / "t.jsonl", [raw(n) for n in range(5)])
    build(source, val)
    original, calls = pq.write_table, []

    def write_table(table, path):
        calls.append(path)
        if len(calls) == fail_at:
            Path(path).write_bytes(b"PAR1 half")
            raise OSError(28, "No space left on device")
        original(table, path)

    monkeypatch.setattr(pq, "write_table", write_table)
    assert "No space left on device" in fails("--source", source, "--val-source", val, "--limit", "2")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == OUTPUTS


def test_output_folder_is_a_file(fails, val, tmp_path):
    source = write(tmp_path / "t.jsonl", [raw(1)])
    (tmp_path / "file").write_text("mine")
    assert "cannot write the outputs" in fails("--source", source, "--val-source", val, out=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "out" / "val.parquet").mkdir(parents=True)
    with pytest.raises(_common.UserError, match="a folder stands where this output goes"):
        build_math.main(["--source", str(source), "--val-source", str(val), "--out", str(tmp_path / "out")])
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["val.parquet"]
