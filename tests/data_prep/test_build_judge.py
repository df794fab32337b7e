"""`data_prep/build_judge.py`: what the splits may share, their balance and sizes, and both sources' layouts."""

import doctest
import json
import random
from collections import Counter

import _common
import build_judge
import build_math
import pyarrow.parquet as pq
import pytest
from scripts import refused_by, write

from rema_verl.dialogue import SINGLE_AGENT_PROMPTS

# RewardBench's filtered set: subset -> pairs (its 23 subsets, 2,985 pairs)
SUBSETS = {
    "alpacaeval-easy": 100, "alpacaeval-hard": 95, "alpacaeval-length": 95, "donotanswer": 136, "hep-cpp": 164,
    "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164, "hep-rust": 164, "llmbar-adver-GPTInst": 92,
    "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46, "llmbar-adver-neighbor": 134, "llmbar-natural": 100,
    "math-prm": 447, "mt-bench-easy": 28, "mt-bench-hard": 37, "mt-bench-med": 40, "refusals-dangerous": 100,
    "refusals-offensive": 100, "xstest-should-refuse": 154, "xstest-should-respond": 250,
}  # fmt: skip


@pytest.fixture
def build(tmp_path, capsys):
    """build(*options) -> ({split: rows}, manifest, stdout)."""

    def run(*options, out=tmp_path / "out"):
        capsys.readouterr()
        _common.run_main(build_judge.main, [str(a) for a in (*options, "--out", out)])
        captured = capsys.readouterr()
        assert captured.err == ""
        manifest = json.loads((out / "manifest.json").read_text())
        assert sorted(p.name for p in out.iterdir()) == sorted([*manifest["outputs"], "manifest.json"])
        return {p.stem: pq.read_table(p).to_pylist() for p in out.glob("*.parquet")}, manifest, captured.out

    return run


fails = refused_by(build_judge.main)


def pair(n, subset="chat", prompt=None, **fields):
    """A row of RewardBench."""
    row = {"prompt": prompt or f"Question {n}?", "chosen": f"good {n}", "rejected": f"bad {n}", "subset": subset}
    return row | {"chosen_model": "m", "rejected_model": "m", "id": n} | fields


def judgebench_row(n, model, **fields):
    row = {"pair_id": f"id{n}", "original_id": str(n), "source": "livebench-math", "question": f"JudgeBench {n}?"}
    row |= {
        "response_model": model,
        "response_A": f"a{n}",
        "response_B": f"b{n}",
        "label": "AB"[n % 2] + ">" + "BA"[n % 2],
    }
    return row | fields


@pytest.fixture(scope="module")
def rewardbench(tmp_path_factory):
    """A stand-in of the filtered set's size and subsets, whose questions recur as the real ones do: the alpacaeval and
    mt-bench subsets share questions with each other, and a few subsets repeat some of their own."""
    rng, rows = random.Random(0), []
    for subset, size in SUBSETS.items():
        family = subset.split("-")[0]
        for n in range(size):
            shared = f"{family} question {rng.randrange(200)}?" if family in ("alpacaeval", "mt") else None
            shared = shared or (f"{subset} {n // 3}?" if family == "llmbar" and n < 30 else f"{subset} {n}?")
            rows.append(pair(len(rows), subset, shared))
    return write(tmp_path_factory.mktemp("rb") / "filtered.parquet", rows)


@pytest.fixture
def small(tmp_path):
    """Options for 40 pairs in two subsets, without JudgeBench."""
    rows = [pair(n, "code" if n % 4 == 0 else "chat") for n in range(40)]
    source = write(tmp_path / "small.jsonl", rows)
    return ["--source", source, "--no-judgebench", "--allow-count", "rewardbench=40"]


def key(row):
    return _common.normalise_question(row["extra_info"]["meta_thinking_question"])


@pytest.mark.parametrize("split", ["strict", "loose"])
def test_published_sizes(build, rewardbench, split):
    """5,000 + 970 rows: all 2,985 pairs in both orders. Half A, half B; each subset in proportion."""
    data, manifest, printed = build("--source", rewardbench, "--no-judgebench", "--split", split)
    assert {name: len(rows) for name, rows in data.items()} == {"train": 5000, "test": 970}
    every = [row for rows in data.values() for row in rows]
    assert len({row["extra_info"]["id"] for row in every}) == len({r["extra_info"]["index"] for r in every}) == 5970
    for name, rows in data.items():
        assert Counter(row["reward_model"]["ground_truth"] for row in rows) == {
            "A": len(rows) // 2,
            "B": len(rows) // 2,
        }
        by_subset = Counter(row["extra_info"]["subset"] for row in rows)
        assert manifest["counts"][name]["by_subset"] == by_subset
        for subset, size in SUBSETS.items():
            assert abs(by_subset[subset] - 2 * size * len(rows) / 5970) <= 4, (subset, by_subset[subset])
            if split == "strict":
                cells = Counter(r["reward_model"]["ground_truth"] for r in rows if r["extra_info"]["subset"] == subset)
                assert cells["A"] == cells["B"]
    train, test = ({key(row) for row in data[name]} for name in ("train", "test"))
    tuples = [{row["prompt"][0]["content"] for row in data[name]} for name in ("train", "test")]
    assert not tuples[0] & tuples[1]
    assert len(train & test) == manifest["questions_shared_with_train"]["test"]
    assert not train & test if split == "strict" else len(train & test) > 300
    assert f"{split} split" in printed


def test_row_layout(build, small):
    """The judge's text has everything between delimiters; the planner's has the question alone."""
    data, _, _ = build(*small, "--train-size", 60, "--test-size", 20)
    rows = {row["extra_info"]["id"]: row for row in [*data["train"], *data["test"]]}
    assert rows["rewardbench-4-ab"] == {
        "data_source": "rewardbench",
        "prompt": [
            {
                "role": "user",
                "content": "[Question]\nQuestion 4?\n[End of Question]\n\n[Answer A]\ngood 4\n[End of Answer A]\n\n"
                "[Answer B]\nbad 4\n[End of Answer B]",
            }
        ],
        "ability": "judge",
        "reward_model": {"style": "verdict", "ground_truth": "A"},
        "extra_info": {
            "index": 8,
            "split": rows["rewardbench-4-ab"]["extra_info"]["split"],
            "id": "rewardbench-4-ab",
            "subset": "code",
            "meta_thinking_question": "Question 4?",
        },
    }
    mirror = rows["rewardbench-4-ba"]
    assert mirror["reward_model"]["ground_truth"] == "B" and mirror["extra_info"]["index"] == 9
    assert "[Answer A]\nbad 4\n" in mirror["prompt"][0]["content"]


def test_answers_arrive_unchanged(build, tmp_path):
    """Indentation is code, and a model that said nothing said nothing; braces are not templates."""
    rows = [pair(0, chosen="    return {x}\n", rejected=""), pair(1)]
    options = ["--source", write(tmp_path / "r.parquet", rows), "--no-judgebench", "--allow-count", "rewardbench=2"]
    data, _, _ = build(*options, "--train-size", 2, "--test-size", 2)
    texts = {r["extra_info"]["id"]: r["prompt"][0]["content"] for rows in data.values() for r in rows}
    assert "[Answer A]\n    return {x}\n\n[End of Answer A]\n\n[Answer B]\n\n[End of" in texts["rewardbench-0-ab"]


def test_identical_pairs_stay_together_in_the_loose_split(build, tmp_path):
    """Forty copies of ten pairs, one of them with the labels the other way round."""
    rows = [pair(n % 10) for n in range(40)]
    rows[39] = pair(9, chosen="bad 9", rejected="good 9")
    options = ["--source", write(tmp_path / "r.jsonl", rows), "--no-judgebench", "--allow-count", "rewardbench=40"]
    data, _, _ = build(*options, "--split", "loose", "--train-size", 40, "--test-size", 16)
    train, test = ({row["prompt"][0]["content"] for row in data[name]} for name in ("train", "test"))
    assert not train & test and len(data["test"]) == 16


def test_seed(build, small, tmp_path):
    sizes = ("--train-size", 60, "--test-size", 20)
    for split in ("strict", "loose"):
        for name, seed in (("a", 7), ("b", 7), ("c", 8)):
            build(*small, *sizes, "--split", split, "--seed", seed, out=tmp_path / split / name)
        for output in ("train.parquet", "test.parquet", "manifest.json"):
            a, b, c = ((tmp_path / split / name / output).read_bytes() for name in "abc")
            assert a == b and a != c, (split, output)


def test_judgebench(build, small, tmp_path):
    """620 pairs from two files, in their published order, as a test set of its own."""
    gpt = write(tmp_path / "gpt.jsonl", [judgebench_row(n, "gpt-4o-2024-05-13") for n in range(350)])
    claude = [judgebench_row(n, "claude-3-5-sonnet-20240620") for n in range(270)]
    claude[0]["question"] = "question  3?"  # also in RewardBench
    claude = write(tmp_path / "claude.jsonl", claude)
    options = ["--judgebench", gpt, claude, "--train-size", 60, "--test-size", 20]
    data, manifest, printed = build(*(o for o in small if o != "--no-judgebench"), *options)
    rows = data["judgebench"]
    assert len(rows) == 620 and len({row["extra_info"]["id"] for row in rows}) == 620
    assert rows[351]["extra_info"] == {
        "index": 351,
        "split": "test",
        "id": "judgebench-claude-351",
        "subset": "livebench-math",
        "meta_thinking_question": "JudgeBench 1?",
    }
    assert rows[351]["data_source"] == "judgebench" and rows[351]["reward_model"]["ground_truth"] == "B"
    assert "[Answer A]\na1\n[End of Answer A]" in rows[351]["prompt"][0]["content"]
    in_train = {key(row) for row in data["train"]} >= {"question3?"}
    assert manifest["questions_shared_with_train"] == {"test": 0, "judgebench": int(in_train)}
    assert "judgebench: 620 rows" in printed
    assert manifest["sources"]["judgebench"]["sources"][0]["files"] == {str(gpt): _common.sha256_file(gpt)}


@pytest.mark.parametrize("prompt", ["vrp", "mrp"])
def test_single_agent_prompts(build, small, shared_data, tmp_path, prompt):
    """Here and in build_math: the system message before the same user message as without the option."""
    sizes = ("--train-size", 60, "--test-size", 20)
    bare, prompted = build(*small, *sizes)[0], build(*small, *sizes, "--prompt", prompt, out=tmp_path / "prompted")[0]
    system = {"role": "system", "content": SINGLE_AGENT_PROMPTS[f"judge_{prompt}"]}
    assert [row["prompt"] for row in prompted["test"]] == [[system, *row["prompt"]] for row in bare["test"]]
    assert "[[A]]" in system["content"] and "[[B]]" in system["content"]
    assert ("[Start of Evaluation Plan]" in system["content"]) == (prompt == "mrp")

    source = shared_data / "math_train_mini_133.parquet"
    arguments = ["--source", source, "--val-source", shared_data / "math500.parquet", "--out", tmp_path / "math"]
    build_math.main([str(a) for a in (*arguments, "--prompt", prompt)])
    for split in ("train", "val"):
        for row in pq.read_table(tmp_path / "math" / f"{split}.parquet").to_pylist():
            assert row["prompt"] == [
                {"role": "system", "content": SINGLE_AGENT_PROMPTS[prompt]},
                {"role": "user", "content": row["extra_info"]["question"]},
            ]
    assert json.loads((tmp_path / "math" / "manifest.json").read_text())["arguments"]["prompt"] == prompt


def test_hub_by_id(build, rewardbench, monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(name, data_files=None, split=None):
        calls.append((name, split, data_files))
        if name == "allenai/reward-bench":
            return datasets.Dataset.from_list(pq.read_table(rewardbench).to_pylist())
        model, size = ("gpt-4o", 350) if "gpt" in data_files else ("claude-3", 270)
        return datasets.Dataset.from_list([judgebench_row(n, model) for n in range(size)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data, _, _ = build()
    assert {name: len(rows) for name, rows in data.items()} == {"train": 5000, "test": 970, "judgebench": 620}
    assert calls[0] == ("allenai/reward-bench", "filtered", None)
    assert [call[2] for call in calls[1:]] == [f"data/{m}-00000-of-00001.jsonl" for m in ("gpt", "claude")]


# --- mistakes ------------------------------------------------------------------------------------------------------

BAD_ROWS = {
    "no question": (pair(1, prompt=" "), "row 2: field 'prompt' is empty or no text"),
    "null answer": (pair(1, rejected=None), "row 2: field 'rejected' is missing"),
    "answer not text": (pair(1, chosen=[1]), "row 2: field 'chosen' must be text, found list"),
    "no subset": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "row 2: field 'subset' is missing"),
    "same answers": (pair(1, chosen="x", rejected="x"), "row 2: fields 'chosen' and 'rejected' are the same"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row(fails, build, tmp_path, case):
    """Stops the build, or is listed with --skip-bad; the rows after it keep their ids."""
    row, message = BAD_ROWS[case]
    source = write(tmp_path / "r.jsonl", [pair(0), row, pair(2)])
    options = ["--source", source, "--no-judgebench", "--allow-count", "rewardbench=3"]
    options += ["--train-size", 2, "--test-size", 2]
    assert f"{source}: {message}" in fails(*options)
    data, manifest, _ = build(*options, "--skip-bad")
    assert [len(manifest["sources"]["rewardbench"]["skipped"]), len(data["train"]), len(data["test"])] == [1, 2, 2]
    ids = {r["extra_info"]["id"] for rows in data.values() for r in rows}
    assert ids == {"rewardbench-0-ab", "rewardbench-0-ba", "rewardbench-2-ab", "rewardbench-2-ba"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--test-size", 21], "--test-size 21: must be even, half of the rows have verdict A"),
        (["--train-size", 62, "--test-size", 20], "need 82 rows, the source gives 80 (pairs in both orders)"),
        (["--split", "half"], "argument --split: invalid choice: 'half'"),
        (["--source", "none.parquet"], "none.parquet: no such file or folder"),
        (["--allow-count", "judge=1"], "--allow-count 'judge=1': expected NAME=VALUE with NAME one of rewardbench"),
        (["--prompt", "cot"], "argument --prompt: invalid choice: 'cot'"),
    ],
)
def test_bad_options(fails, small, options, message):
    assert message in fails(*small, "--train-size", 60, "--test-size", 20, *options)


def test_counts_and_sizes_that_cannot_be_met(fails, tmp_path):
    """A question that three pairs share cannot be cut in two."""
    source = write(tmp_path / "r.jsonl", [pair(n, prompt=f"q{n // 3}") for n in range(12)])
    options = ["--source", source, "--no-judgebench", "--train-size", 12]
    assert "rewardbench: expected 2,985 rows, found 12 rows (--allow-count" in fails(*options)
    options += ["--allow-count", "rewardbench=12"]
    assert "--test-size 8 cannot be met: whole questions come to 6 rows" in fails(*options, "--test-size", 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label": "A=B"}, "row 2: field 'label' is 'A=B', expected 'A>B' or 'B>A'"),
        ({"response_A": None}, "row 2: field 'response_A' is missing"),
        ({"question": ""}, "row 2: field 'question' is empty or no text"),
    ],
)
def test_bad_judgebench_row(fails, small, tmp_path, fields, message):
    bench = write(tmp_path / "j.jsonl", [judgebench_row(0, "gpt"), judgebench_row(1, "gpt", **fields)])
    options = [*(o for o in small if o != "--no-judgebench"), "--train-size", 60, "--test-size", 20]
    assert f"{bench}: {message}" in fails(*options, "--judgebench", bench)
    good = write(tmp_path / "j.jsonl", [judgebench_row(0, "gpt")])
    assert "judgebench: expected 620 rows, found 1 rows" in fails(*options, "--judgebench", good)


def test_doctests():
    assert doctest.testmod(build_judge).failed == 0
