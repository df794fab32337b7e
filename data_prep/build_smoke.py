r"""Build what SMOKE=1 runs a recipe on: a few rows, and a tiny model that answers some of them.

    python data_prep/build_smoke.py --overrides recipe.txt --data "python data_prep/build_math.py" --out data/smoke
    python data_prep/build_smoke.py --train data/math/train.parquet --val data/math/val.parquet --out data/smoke

recipe.txt has the recipe's Hydra overrides, one per line (PRINT_OVERRIDES=1 prints them). The recipe's configuration
says where its rows are and what it trains: two roles in dialogue (the default), two roles in one turn, plans in JSON,
or one agent.

Rows, in this order: the recipe's own files; what the recipe's data command makes of the real rows in the folder
REMA_SHARED_DATA; what it makes of SYNTHETIC rows written here (sums, and answers to sums for a judge). Of these the
shortest are taken. The model (0.4 M parameters, byte-level tokenizer) is fitted for some seconds on what a recipe's
model would say about these rows, half of it wrong, so that rewards differ and two optimiser steps have something to
follow. It can do nothing else, and nothing it scores means anything. A supervised recipe gets the model unfitted.

Written to --out: model/, train.parquet, val.parquet, manifest.json, and overrides.txt, which has the settings of the
YAML files --settings and points the recipe at the rest. What is there already, made of the same, is not made again: the
manifest has a fingerprint of everything the result depends on. REMA_SMOKE_CACHE=FOLDER keeps a copy by fingerprint, for
other folders.
"""

import hashlib
import importlib
import json
import os
import random
import shlex
import shutil
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from _common import (
    Parser,
    UserError,
    positive_int,
    read_rows,
    run_main,
    sha256_file,
    source_files,
    write_outputs,
)
from build_tiny import FINISH, build_model, build_tokenizer

ROOT = Path(__file__).resolve().parents[1]
MAX_TURNS = 3  # of a multi-turn recipe
PLAN = "Add them."
Chat = list[dict[str, str]]


# --- the recipe ----------------------------------------------------------------------------------------------------


def compose_recipe(config_name: str, overrides: list[str]):
    """The recipe's whole configuration, composed as verl's entry point would."""
    from rema_verl.config.composing import compose

    return compose(config_name, overrides)


def recipe_files(config, split: str) -> list[Path]:
    """The files behind data.train_files or data.val_files."""
    value = config.data[f"{split}_files"]
    return [Path(str(path)).expanduser() for path in ([value] if isinstance(value, str) else value or [])]


# --- what is there already -----------------------------------------------------------------------------------------

# What rows and model depend on beside the options: code, settings, versions. Of the recipe's overrides these keys say
# where a run writes and how it trains.
CODE = ("data_prep/*.py", "recipes/overrides.py", "rema_verl/dialogue.py", "rema_verl/rewards/grading.py")
SETTINGS = ("rema_verl/config/**/*.py", "rema_verl/config/**/*.yaml")
VERSIONS = ("verl", "torch", "transformers", "tokenizers", "pyarrow")
ELSEWHERE = ("hydra.", "trainer.", "rema.trajectories.", "rema.roles.", "rema.switch.", "model.")
ELSEWHERE += ("actor_rollout_ref.model.", "actor_rollout_ref.actor.", "actor_rollout_ref.ref.")


def fingerprint(args, overrides: list[str]) -> str:
    """Of everything the result depends on. Files count by name and content, not by where they are."""
    lines = [line for line in overrides if not line.lstrip("+~").startswith(ELSEWHERE)]
    rows = [line for line in lines if line.lstrip("+").startswith(("data.train_files=", "data.val_files="))]
    parts = [part.strip(" '\"") for line in rows for part in line.partition("=")[2].strip("[]").split(",")]
    paths = [Path(part).expanduser() for part in parts]
    contents = [(path.name, digest(path)) for path in (*paths, args.train, args.val) if path]
    command = shlex.split(args.data.removeprefix("python "))
    if "--out" in command:
        del command[command.index("--out") : command.index("--out") + 2]
    if command and not all(path.exists() for path in paths) and (shared := os.environ.get("REMA_SHARED_DATA")):
        contents += [(name, digest(Path(shared) / name)) for name in SHARED.get(Path(command[0]).stem, ())]
    code = (file for pattern in CODE + SETTINGS for file in sorted(ROOT.glob(pattern)))
    contents += [(str(file), digest(file)) for file in args.settings]
    contents += [(str(file.relative_to(ROOT)), digest(file)) for file in code]
    options = [args.config, command, args.rows, args.steps, args.seed]
    versions = [sys.version, *(metadata.version(name) for name in VERSIONS)]
    rest = [line for line in lines if line not in rows]
    return hashlib.sha256(json.dumps([options, rest, contents, versions]).encode()).hexdigest()


def digest(path: Path) -> list[str] | None:
    """Of a file, or of those in a folder; None where there is none."""
    files = source_files(path) if path.is_dir() else [path] if path.is_file() else []
    return [sha256_file(file) for file in files] or None


def is_made(folder: Path, key: str) -> bool:
    """Whether the folder holds what that fingerprint gives, whole."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        files = {name: output["sha256"] for name, output in manifest["outputs"].items()} | manifest["model"]
        return manifest["fingerprint"] == key and all(sha256_file(folder / f) == sha for f, sha in files.items())
    except (OSError, ValueError, LookupError, TypeError):
        return False


def point_to(out: Path) -> None:
    """overrides.txt of what is in ``out``."""
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    lines = [line.replace("{out}", str(out)) for line in manifest["overrides"]]
    (out / "overrides.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def copy(source: Path, target: Path) -> None:
    """Whatever a folder's manifest describes, the manifest last."""
    shutil.rmtree(target / "model", ignore_errors=True)
    shutil.copytree(source / "model", target / "model")
    for file in (*sorted(source.glob("*.parquet")), source / "manifest.json"):
        shutil.copy(file, target / file.name)


def keep(source: Path, kept: Path) -> None:
    """A copy that appears whole, or is there from somebody else."""
    temporary = kept.with_name(f".{kept.name}.{os.getpid()}")
    copy(source, temporary)
    try:
        temporary.rename(kept)
    except OSError:
        shutil.rmtree(temporary)


# --- rows ----------------------------------------------------------------------------------------------------------


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


SHARED = {  # data script -> the real rows it can be given, in the folder REMA_SHARED_DATA
    "build_math": ("math_train_l3to5_8523.parquet", "math500.parquet"),
    "build_sft": ("dialogues_meta_thinking_804.jsonl", "dialogues_reasoning_804.jsonl"),
}


def math_source(folder: Path, shared: Path | None) -> list[str]:
    """Real questions, or sums: 20 of each MATH subject (--mini wants 19), levels 3 to 5."""
    if shared:
        train, val = (shared / name for name in SHARED["build_math"])
    else:
        from build_math import SUBJECTS

        def sums(first: int, count: int) -> list[dict]:
            return [
                {"problem": f"{n} + {n % 7}?", "answer": str(n + n % 7), "level": 3 + n % 3, "type": SUBJECTS[n % 7]}
                for n in range(first, first + count)
            ]

        train = write_lines(folder / "synthetic_train.jsonl", sums(0, 140))
        val = write_lines(folder / "synthetic_val.jsonl", sums(200, 20))
    return ["--source", str(train), "--val-source", str(val)]


def judge_source(folder: Path, shared: Path | None) -> list[str]:
    """Sums with a right and a wrong answer; no real pairs are at hand."""
    pairs = [
        {"prompt": f"{n} + 1?", "chosen": str(n + 1), "rejected": str(n + 2), "subset": "synthetic"} for n in range(16)
    ]
    source = write_lines(folder / "synthetic_pairs.jsonl", pairs)
    sizes = ["--train-size", "20", "--test-size", "12", "--allow-count", f"rewardbench={len(pairs)}"]
    return ["--source", str(source), "--no-judgebench", *sizes]


def dialogue_source(folder: Path, shared: Path | None) -> list[str]:
    """ReMA's published dialogues, or sums in their format."""
    if shared:
        files = [shared / name for name in SHARED["build_sft"]]
    else:
        from build_sft import FIRST_TURN

        plans = [
            {"instruction": f"{n} + 1?", "output": f"{PLAN} {FINISH}", "system": "plan", "history": []}
            for n in range(16)
        ]
        answers = [
            {
                "instruction": FIRST_TURN.format(plan["instruction"], plan["output"]),
                "output": f"\\boxed{{{n + 1}}}",
                "system": "solve",
                "history": [],
            }
            for n, plan in enumerate(plans)
        ]
        files = [
            write_lines(folder / f"synthetic_{name}.jsonl", rows)
            for name, rows in (("meta_thinking", plans), ("reasoning", answers))
        ]
    return ["--published", *map(str, files)]


SOURCES = {"build_math": math_source, "build_judge": judge_source, "build_sft": dialogue_source}


def run_data_command(command: str, folder: Path) -> str:
    """Run the recipe's own data command on rows that are at hand; what kind of rows they are."""
    script, *arguments = shlex.split(command.removeprefix("python "))
    name = Path(script).stem
    if name not in SOURCES:
        raise UserError(f"--data '{command}': expected one of {', '.join(SOURCES)}")
    shared = Path(os.environ["REMA_SHARED_DATA"]) if os.environ.get("REMA_SHARED_DATA") else None
    source = SOURCES[name](folder, shared)
    importlib.import_module(name).main([*arguments, *source, "--out", str(folder)])  # of an option's values the last
    return "SYNTHETIC" if any("synthetic_" in part for part in source) else "real"


def shortest_rows(files: list[Path], count: int, supervised: bool) -> list[dict]:
    """The ``count`` rows of some verl files with the shortest text, in file order; as many of each role."""
    rows = []
    for file in (file for path in files for file in source_files(path)):
        for where, row in read_rows(file):
            if supervised:
                if not row.get("messages"):
                    raise UserError(f"{where}: needs 'messages' (verl's SFT format)")
            elif not row.get("prompt") or (row.get("reward_model") or {}).get("ground_truth") in (None, ""):
                raise UserError(f"{where}: needs 'prompt' and 'reward_model.ground_truth' (verl's RL format)")
            rows.append(row)
    ranked = sorted(range(len(rows)), key=lambda i: (len(str(rows[i].get("prompt") or rows[i]["messages"])), i))
    of_role: dict[str, list[int]] = {}
    for i in ranked:
        of_role.setdefault(str(rows[i].get("role")), []).append(i)
    chosen = [i for mine in of_role.values() for i in mine[: count // len(of_role)]]
    return [rows[i] for i in sorted(chosen)]


# --- what the model says -------------------------------------------------------------------------------------------


def answer_of(row: dict, truths: list[str], rng: random.Random) -> str:
    """The final answer, wrong about every second time."""
    truth = row["reward_model"]["ground_truth"]
    if row["reward_model"].get("style") == "verdict":
        return f"[[{truth if rng.random() < 0.5 else rng.choice('AB')}]]"
    return f"\\boxed{{{truth if rng.random() < 0.5 else rng.choice([*truths, '0'])}}}"


def plan_of(rema, rng: random.Random) -> str:
    if rema.plan == "text":
        return PLAN
    from rema_verl.dialogue import JSON_ACTIONS

    action = rng.choice(JSON_ACTIONS)
    return json.dumps({"action": action, "output": "" if action == "EMPTY" else PLAN})


def chats_about(rows: list[dict], config, count: int, rng: random.Random) -> list[Chat]:
    """What the recipe's model is to say, in ``count`` conversations: one chat each, or one per role."""
    from rema_verl.config import ReMAConfig
    from rema_verl.dialogue import META_THINKING, REASONING, Dialogue, default_prompts

    rema = ReMAConfig.of(config)
    two_roles = config.actor_rollout_ref.rollout.agent.default_agent_loop == "rema"
    prompts = default_prompts(rema.max_turns, rema.task, rema.plan)
    prompts = replace(prompts, **{name: text for name, text in rema.prompts.items() if text is not None})
    truths = [row["reward_model"]["ground_truth"] for row in rows]
    chats: list[Chat] = []
    for i in range(count):
        row = rows[i % len(rows)]
        answer = answer_of(row, truths, rng)
        if not two_roles:
            chats.append([*row["prompt"], {"role": "assistant", "content": answer}])
            continue
        dialogue = Dialogue(
            row["prompt"][-1]["content"],
            max_turns=min(rema.max_turns, 2),
            finish_flag=rema.finish_flag,
            prompts=prompts,
            plan_question=(row.get("extra_info") or {}).get("meta_thinking_question"),
            plan=rema.plan,
        )
        if rema.max_turns == 1:
            messages = [plan_of(rema, rng), answer]
        else:
            messages = ["Solve it.", "I did.", f"Answer. {rema.finish_flag}", answer]
        for message in messages:
            dialogue.add(message)
        chats += [dialogue.view(META_THINKING)[:-1], dialogue.view(REASONING)]
    return chats


def fit(model, tokenizer, chats: list[Chat], steps: int, batch: int, rng: random.Random) -> float:
    """Plain supervised steps on the assistant tokens; the last loss."""
    import torch

    assistant, end = tokenizer.convert_tokens_to_ids("<|assistant|>"), tokenizer.eos_token_id
    examples = []
    for chat in chats:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        speaking, labels = False, []
        for token in ids:
            labels.append(token if speaking else -100)
            speaking = token == assistant or (speaking and token != end)
        examples.append((torch.tensor(ids), torch.tensor(labels)))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pad = torch.nn.utils.rnn.pad_sequence
    for _ in range(steps):
        ids, labels = zip(*rng.sample(examples, batch), strict=True)
        mask = pad([torch.ones_like(i) for i in ids], batch_first=True)
        ids, labels = pad(ids, batch_first=True), pad(labels, batch_first=True, padding_value=-100)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return float(loss.detach())


def smoke_overrides(config, out: Path, supervised: bool) -> list[str]:
    """What points the recipe at these inputs, as Hydra overrides."""
    overrides = [f"data.train_files={out}/train.parquet"]
    if supervised:
        return [*overrides, f"model.path={out}/model", "model.tokenizer_path=null"]
    actor = "actor_rollout_ref"
    overrides += [
        f"data.val_files={out}/val.parquet",
        f"{actor}.model.path={out}/model",
        f"{actor}.model.tokenizer_path=null",
        f"rema.max_turns={min(config.rema.max_turns, MAX_TURNS)}",
    ]
    if "tokenizer" in (config.actor_rollout_ref.rollout.engine_kwargs.get("vllm") or {}):
        overrides.append(f"{actor}.rollout.engine_kwargs.vllm.tokenizer={out}/model")
    return overrides


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="What SMOKE=1 runs a recipe on: a few rows and a tiny model.")
    parser.add_argument("--overrides", type=Path, help="the recipe's Hydra overrides, one per line")
    parser.add_argument("--config", default="rema_trainer", help="its primary config (default: %(default)s)")
    parser.add_argument("--train", type=Path, help="train rows, if not the recipe's")
    parser.add_argument("--val", type=Path, help="validation rows, if not the recipe's")
    parser.add_argument("--data", default="", metavar="COMMAND", help="the command that makes its files")
    parser.add_argument("--settings", type=Path, nargs="*", default=[], metavar="YAML", help="for overrides.txt")
    parser.add_argument("--out", type=Path, default=Path("data/smoke"))
    parser.add_argument("--rows", type=positive_int, default=8, help="rows in each split")
    parser.add_argument("--steps", type=positive_int, default=120, help="supervised steps")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    out = args.out.resolve()
    for path in (args.overrides, *args.settings):
        if path and not path.is_file():
            raise UserError(f"{path}: no such file")
    overrides = args.overrides.read_text(encoding="utf-8").splitlines() if args.overrides else []
    key = fingerprint(args, overrides)
    kept = Path(os.environ["REMA_SMOKE_CACHE"]) / key if os.environ.get("REMA_SMOKE_CACHE") else None
    if kept and not is_made(out, key) and is_made(kept, key):
        copy(kept, out)
    if is_made(out, key):
        point_to(out)
        print(f"smoke model and rows are in {args.out} already")
        return
    config = compose_recipe(args.config, overrides)
    supervised = "actor_rollout_ref" not in config
    files = {split: recipe_files(config, split) for split in (("train",) if supervised else ("train", "val"))}
    files |= {split: [path] for split in files if (path := getattr(args, split))}
    kind = "real"
    if args.data and not all(path.exists() for paths in files.values() for path in paths):
        kind = run_data_command(args.data, out / "data")
        files = {split: [out / "data" / path.name for path in paths] for split, paths in files.items()}
    splits = {split: shortest_rows(paths, args.rows, supervised) for split, paths in files.items()}
    if kind == "SYNTHETIC" and not supervised:
        for row in (row for rows in splits.values() for row in rows):
            row["data_source"] = f"synthetic_{row['data_source']}"  # no metric under a benchmark's name

    sys.path.insert(0, str(ROOT / "recipes"))
    from overrides import as_overrides

    settings = [line for file in args.settings for line in as_overrides(file)]
    rng = random.Random(args.seed)
    if supervised:
        chats = [row["messages"] for row in splits["train"]]
    else:
        chats = chats_about(splits["train"], config, count=64, rng=rng)
    tokenizer = build_tokenizer(["\n".join(m["content"] for m in chat) for chat in chats], vocabulary=1024)
    model = build_model(tokenizer, out / "model", args.seed, hidden=128, layers=2, tie=True)
    if not supervised:
        import torch

        torch.set_num_threads(1)  # a second one only waits, at full load; the weights are the same
        loss = fit(model, tokenizer, chats, args.steps, batch=8, rng=rng)
        model.save_pretrained(out / "model")
    manifest = {
        "made_for": "SMOKE=1",
        "fingerprint": key,
        "kind_of_rows": kind,
        "seed": args.seed,
        "rows": args.rows,
        "steps": args.steps,
        "sources": {
            str(path.relative_to(out) if out in path.parents else path): sha256_file(path)
            for paths in files.values()
            for path in paths
            if path.is_file()
        },
        "model": {f"model/{file.name}": sha256_file(file) for file in sorted((out / "model").iterdir())},
        "overrides": [*settings, *(f"++{line}" for line in smoke_overrides(config, Path("{out}"), supervised))],
    }
    import pyarrow as pa

    write_outputs(out, {f"{name}.parquet": pa.Table.from_pylist(rows) for name, rows in splits.items()}, manifest)
    point_to(out)
    if kept:
        keep(out, kept)
    fitted = "" if supervised else f" (supervised loss {loss:.2f})"
    print(f"smoke model and {sum(map(len, splits.values()))} {kind} rows in {args.out}{fitted}")


if __name__ == "__main__":
    run_main(main)
