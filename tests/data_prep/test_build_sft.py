"""`data_prep/build_sft.py`: tagged solutions and the published dialogues through to verl's own SFT loader."""

import doctest
import json

import _common
import build_sft
import pyarrow.parquet as pq
import pytest
from scripts import refused_by, write

from rema_verl.dialogue import META_THINKING, MULTI_TURN_PROMPTS, REASONING, ROLES

OUTPUTS = ["manifest.json", "meta_thinking.parquet", "reasoning.parquet", "shared.parquet"]
FILES = {role: f"dialogues_{role}_804.jsonl" for role in ROLES}


@pytest.fixture
def build(tmp_path, capsys):
    """build(*options) -> ({output: rows}, manifest, stdout)."""

    def run(*options, out=tmp_path / "out"):
        capsys.readouterr()
        _common.run_main(build_sft.main, [str(a) for a in (*options, "--out", out)])
        captured = capsys.readouterr()
        assert captured.err == "" and sorted(p.name for p in out.iterdir()) == OUTPUTS
        manifest = json.loads((out / "manifest.json").read_text())
        return {p.stem: pq.read_table(p).to_pylist() for p in out.glob("*.parquet")}, manifest, captured.out

    return run


fails = refused_by(build_sft.main)


def tagged(*messages, n=0):
    """A row with a tagged solution."""
    parts = (f"<{ROLES[i % 2]}>{m}</{ROLES[i % 2]}>" for i, m in enumerate(messages))
    return {"question": f"What is {n} + 1?", "solution": "\n\n".join(parts), "answer": str(n + 1)}


def published(role, question="Q?", messages=("Try it.", "I did.", "Answer. [FINISH]", r"\boxed{1}"), **fields):
    """One role's row of the published files."""
    if role == META_THINKING:
        turns = [question, *messages[:-1]]
    else:
        turns = [f"Question:\n{question}\n\nInstruction:\n{messages[0]}", *messages[1:]]
    pairs = [list(p) for p in zip(turns[::2], turns[1::2], strict=True)]
    row = {"instruction": pairs[-1][0], "input": None, "output": pairs[-1][1], "system": f"You are {role}."}
    return row | {"history": pairs[:-1]} | fields


@pytest.fixture
def real(shared_data):
    """--published with the 804 + 804 real rows."""
    return ["--published", *(shared_data / FILES[role] for role in ROLES)]


# --- tagged --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", ["jsonl", "parquet"])
def test_tagged_views(build, tmp_path, extension):
    """Both views; the planner's ends with its own last message, which gets the finish flag."""
    source = write(tmp_path / f"t.{extension}", [tagged("Add.", "$1$, I think.", "State it.", r"\boxed{1}")])
    data, manifest, _ = build("--tagged", source)
    planner, solver = (data[role][0]["messages"] for role in ROLES)
    assert planner == [
        {"role": "system", "content": MULTI_TURN_PROMPTS.meta_thinking.replace("{finish_flag}", "[FINISH]")},
        {"role": "user", "content": "What is 0 + 1?"},
        {"role": "assistant", "content": "Add."},
        {"role": "user", "content": "$1$, I think."},
        {"role": "assistant", "content": "State it. [FINISH]"},
    ]
    assert solver == [
        {"role": "system", "content": MULTI_TURN_PROMPTS.reasoning},
        {"role": "user", "content": "Question: What is 0 + 1?\n\nInstruction: Add."},
        {"role": "assistant", "content": "$1$, I think."},
        {"role": "user", "content": "State it. [FINISH]"},
        {"role": "assistant", "content": r"\boxed{1}"},
    ]
    assert [(row["role"], row["index"]) for row in data["meta_thinking"]] == [(META_THINKING, 0)]
    assert manifest["sources"] == {str(source): _common.sha256_file(source)}
    assert manifest["counts"] == {
        "dialogues": 1,
        "turns": {"mean": 2.0, "max": 2},
        "last_message_without_flag": 1,
        "finish_flag_added": 1,
        "skipped": 0,
    }


def test_finish_flag(build, tmp_path):
    """Not added twice; not added on request; another flag."""
    source = write(tmp_path / "t.jsonl", [tagged("Done. [FINISH]", "1"), tagged("Say it.", "2", n=1)])
    last = lambda data: [row["messages"][-1]["content"] for row in data["meta_thinking"]]  # noqa: E731
    data, manifest, _ = build("--tagged", source)
    assert last(data) == ["Done. [FINISH]", "Say it. [FINISH]"] and manifest["counts"]["finish_flag_added"] == 1
    data, manifest, _ = build("--tagged", source, "--no-add-finish")
    assert last(data) == ["Done. [FINISH]", "Say it."] and manifest["counts"]["finish_flag_added"] == 0
    data, _, _ = build("--tagged", source, "--finish-flag", "<done>")
    assert last(data) == ["Done. [FINISH] <done>", "Say it. <done>"]
    assert "<done>" in data["meta_thinking"][0]["messages"][0]["content"]


def test_shared_file_is_both_views_shuffled(build, tmp_path):
    source = write(tmp_path / "t.jsonl", [tagged("a", "b", n=n) for n in range(40)])
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        data, _, _ = build("--tagged", source, "--seed", seed, out=tmp_path / name)
    order = [(row["role"], row["index"]) for row in data["shared"]]
    assert len(order) == 80 and order != sorted(order) and set(order) == {(r, i) for r in ROLES for i in range(40)}
    assert [row["index"] for row in data["reasoning"]] == list(range(40))
    for output in OUTPUTS:
        a, b, c = ((tmp_path / name / output).read_bytes() for name in "abc")
        assert a == b and (a != c) == (output in ("manifest.json", "shared.parquet")), output


def test_other_field_names_and_folders(build, tmp_path):
    """Several files, a field of one's own, and text that merely looks like a tag."""
    (tmp_path / "in").mkdir()
    text = tagged("Is $a <b> c$?", "yes")["solution"]
    write(tmp_path / "in" / "1.jsonl", [{"problem": "One?", "solution": "plain", "tagged_solution": text}])
    write(tmp_path / "in" / "2.parquet", [{"problem": "Two?", "tagged_solution": text}])
    write(tmp_path / "mine.jsonl", [{"question": "Three?", "solution": "plain", "mine": text}])
    data, _, _ = build("--tagged", tmp_path / "in")
    assert [row["messages"][1]["content"] for row in data["meta_thinking"]] == ["One?", "Two?"]
    assert data["meta_thinking"][0]["messages"][2]["content"] == "Is $a <b> c$? [FINISH]"
    data, _, _ = build("--tagged", tmp_path / "mine.jsonl", "--solution-field", "mine")
    assert len(data["shared"]) == 2


BAD = {
    "outside": ("Hm. " + tagged("a", "b")["solution"], "text outside the tags: 'Hm.'"),
    "after": (tagged("a", "b")["solution"] + " so 3", "text outside the tags: 'so 3'"),
    "between": ("<meta_thinking>a</meta_thinking> x <reasoning>b</reasoning>", "text outside the tags: 'x'"),
    "no tags": ("It is 2.", "text outside the tags: 'It is 2.'"),
    "unclosed": ("<meta_thinking>a</meta_thinking><reasoning>b", "<reasoning> is not closed"),
    "nested": ("<meta_thinking>a<reasoning>b", "<reasoning> at character 16, where </meta_thinking> is due"),
    "crossed": ("<meta_thinking>a</reasoning>", "</reasoning> at character 16, where </meta_thinking> is due"),
    "closing first": ("</reasoning>", "</reasoning> at character 0, where an opening tag is due"),
    "empty": (tagged("a", " ")["solution"], "message 2 (reasoning) is empty"),
    "solver first": ("<reasoning>b</reasoning>", "message 1 is reasoning, the roles must alternate"),
    "twice": ("<meta_thinking>a</meta_thinking>" * 2, "message 2 is meta_thinking, the roles must alternate"),
    "planner last": (tagged("a", "b", "c")["solution"], "3 messages: reasoning must have the last one"),
    "no messages": (" ", "0 messages: reasoning must have the last one"),
    "early flag": (tagged("a [FINISH]", "b", "c", "d")["solution"], "message 1 carries [FINISH], but the dialogue"),
    "not text": ([1], "field 'solution' must be text, found list"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_tags(fails, build, tmp_path, case):
    """Named file and row; with --skip-bad the row is listed and the others keep their index."""
    text, message = BAD[case]
    source = write(tmp_path / "t.jsonl", [tagged("a", "b"), {"question": "q", "solution": text}, tagged("a", "b", n=2)])
    line = fails("--tagged", source)
    assert f"{source}: row 2" in line and message in line and "--skip-bad" in line
    data, manifest, printed = build("--tagged", source, "--skip-bad")
    assert [row["index"] for row in data["reasoning"]] == [0, 2] and manifest["counts"]["skipped"] == 1
    assert (
        len(manifest["skipped"]) == 1 and f"{source}: row 2" in manifest["skipped"][0] and "1 rows skipped" in printed
    )


def test_rows_without_fields(fails, tmp_path):
    source = write(tmp_path / "t.jsonl", [{"question": "q"}])
    assert "row 1: no solution (none of the fields tagged_solution, solution, output)" in fails("--tagged", source)
    assert "no row is left, 1 skipped; the first:" in fails("--tagged", source, "--skip-bad")
    source = write(tmp_path / "t.jsonl", [{"solution": "x"}])
    assert "row 1: no question (none of the fields" in fails("--tagged", source)


# --- published -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_all_published_rows_round_trip(shared_data, role):
    """To messages and back, all 804 rows of each file, to the letter."""
    rows = [json.loads(line) for line in (shared_data / FILES[role]).read_text().splitlines()]
    assert len(rows) == 804
    for n, row in enumerate(rows):
        messages = build_sft.to_messages(row, f"row {n}")
        assert [m["role"] for m in messages[1:]] == ["user", "assistant"] * (len(messages) // 2)
        assert build_sft.from_messages(messages) == {k: row[k] for k in ("instruction", "output", "system", "history")}
        for text in (json.dumps(row["history"]), repr(row["history"]), repr([tuple(p) for p in row["history"]])):
            assert build_sft.to_messages(row | {"history": text}, "as text") == messages


def test_published_prompts_are_kept(build, real, shared_data):
    """The parquet files give back the published rows."""
    data, manifest, _ = build(*real, "--prompts", "published")
    assert manifest["counts"]["dialogues"] == 804 and manifest["counts"]["turns"] == {"mean": 8.24, "max": 30}
    assert manifest["counts"]["last_message_without_flag"] == 207 and manifest["counts"]["finish_flag_added"] == 0
    assert manifest["rows_with_tags_in_a_message"] == [341, 555, 761]  # left over from the authors' own splitting
    for role in ROLES:
        for line, row in zip((shared_data / FILES[role]).open(), data[role], strict=True):
            wanted = json.loads(line)
            wanted.pop("input")
            assert build_sft.from_messages(row["messages"]) == wanted
    assert len(data["shared"]) == 1608


def test_published_dialogues_with_our_prompts(build, real, shared_data):
    """The same words, in the rollout's frame, every one with the finish flag."""
    data, manifest, _ = build(*real)
    assert manifest["counts"]["finish_flag_added"] == 207
    for role in ROLES:
        for line, row in zip((shared_data / FILES[role]).open(), data[role], strict=True):
            wanted, found = json.loads(line), build_sft.from_messages(row["messages"])
            assert found["system"] != wanted["system"]
            texts = [text for turn in [*found["history"], [found["instruction"], found["output"]]] for text in turn]
            words = [text for turn in [*wanted["history"], [wanted["instruction"], wanted["output"]]] for text in turn]
            if role == META_THINKING:
                assert "[FINISH]" in texts[-1] and row["messages"][-1]["role"] == "assistant"
                last = words[-1] if "[FINISH]" in words[-1] else f"{words[-1].rstrip()} [FINISH]"
                assert texts == [*words[:-1], last]
            else:
                frame = (
                    words[0].replace("Question:\n", "Question: ", 1).replace("\n\nInstruction:\n", "\n\nInstruction: ")
                )
                last = len(words) - 2  # the planner's last message
                assert texts[0].removesuffix(" [FINISH]") == frame.removesuffix(" [FINISH]")
                assert texts[1:last] + texts[last + 1 :] == words[1:last] + words[last + 1 :]
                assert texts[last].startswith(words[last].rstrip()) or last == 0


BAD_PUBLISHED = {
    "other dialogue": ({"instruction": "Other. [FINISH]"}, "is not the dialogue of"),
    "no output": ({"output": ""}, "field 'output' is missing or empty"),
    "no system": ({"system": None}, "field 'system' is missing or empty"),
    "input": ({"input": "more"}, "field 'input' is not empty"),
    "code": ({"history": "__import__('os').system('true')"}, "field 'history' is neither JSON nor a literal"),
    "deep": ({"history": "[" * 100_000}, "field 'history' is neither JSON nor a literal"),
    "not pairs": ({"history": '[["a"]]'}, "field 'history' must be a list of pairs of texts"),
    "not texts": ({"history": [["a", 1]]}, "field 'history' must be a list of pairs of texts"),
    "empty message": ({"history": [["a", " "]]}, "field 'history': message 2 is empty"),
    "lone surrogate": ({"history": [["a", "\ud800"]]}, "field 'history' is not valid Unicode text"),
}


@pytest.mark.parametrize("case", BAD_PUBLISHED)
def test_bad_published_row(fails, build, tmp_path, case):
    fields, message = BAD_PUBLISHED[case]
    meta = write(tmp_path / "m.jsonl", [published(META_THINKING)] * 3)
    reasoning = write(
        tmp_path / "r.jsonl", [published(REASONING), published(REASONING, **fields), published(REASONING)]
    )
    line = fails("--published", meta, reasoning)
    assert f"{reasoning}: row 2" in line and message in line
    data, manifest, _ = build("--published", meta, reasoning, "--skip-bad")
    assert [row["index"] for row in data["shared"] if row["role"] == REASONING] in ([0, 2], [2, 0])
    assert manifest["counts"]["skipped"] == 1


@pytest.mark.parametrize("shorter", [0, 1])
def test_published_files_of_different_length(fails, tmp_path, shorter):
    files = [
        write(tmp_path / f"{role}.jsonl", [published(role)] * (2 - (i == shorter))) for i, role in enumerate(ROLES)
    ]
    assert f"{files[1 - shorter]}: has more rows than {files[shorter]}" in fails("--published", *files)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "one of the arguments --tagged --published is required"),
        (["--tagged", "none.jsonl"], "none.jsonl: no such file or folder"),
        (["--tagged", "none.jsonl", "--prompts", "published"], "--prompts published needs --published"),
        (["--tagged", "none.jsonl", "--finish-flag", " "], "--finish-flag must not be empty"),
        (["--published", "none.jsonl"], "argument --published: expected 2 arguments"),
    ],
)
def test_bad_options(fails, options, message):
    assert message in fails(*options)


# --- verl ----------------------------------------------------------------------------------------------------------


def test_verl_trains_on_each_role_s_own_words(build, real, tokenizers, family, tmp_path):
    """verl's MultiTurnSFTDataset, with its check that message-wise and whole tokenisation agree."""
    sft = pytest.importorskip("verl.utils.dataset.multiturn_sft_dataset")
    from omegaconf import OmegaConf

    build(*real)
    path = tmp_path / "few.parquet"
    pq.write_table(pq.read_table(tmp_path / "out" / "shared.parquet").slice(0, 6), path)
    tokenizer = tokenizers[family]
    config = OmegaConf.create({"max_length": 60_000, "truncation": "error", "pad_mode": "no_padding"})
    dataset = sft.MultiTurnSFTDataset([str(path)], tokenizer, config)
    for n, row in enumerate(pq.read_table(path).to_pylist()):
        item = dataset[n]
        learned = tokenizer.decode(item["input_ids"][item["loss_mask"].bool()])
        own = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        heard = [m["content"] for m in row["messages"] if m["role"] == "user"]
        assert all(text.strip() in learned for text in own)
        assert not any(text in learned for text in heard if len(text) > 80)


def test_doctests():
    assert doctest.testmod(build_sft).failed == 0
