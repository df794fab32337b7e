"""Roll a model out over questions with verl's validation, so that a killed run goes on where it was.

Shared by `recipes/evaluate.py` and `data_prep/filter_difficulty.py`. A folder holds one job:

    settings.json     what was asked for; the same folder with other settings is refused
    model/            a verl checkpoint in Hugging Face format, if it had to be merged (model_reasoning/: the second)
    too_long.json     ids of the questions whose first prompt does not fit; they are never started
    pending.parquet   what the latest launch was given: questions, and how many samples each still lacks
    journal/001/      a folder per launch, one line per scored trajectory, written at once (`rema.journal`)
    log/001.txt       verl's output

What is missing is worked out from the journal every time, so nothing else has to survive a kill. A trajectory is in the
journal or not; those in flight at a kill are started again. (With a temperature this favours short answers a little:
of the samples in flight, the short ones had the better chance to be done.)
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data_prep"))
from _common import UserError, first_line, positive_int, read_rows, sha256_file, source_files

from rema_verl.checks import check_row
from rema_verl.dialogue import META_THINKING, REASONING, ROLES, SINGLE_AGENT_PROMPTS, Dialogue, neutralise
from rema_verl.errors import PREFIX

ROOT = Path(__file__).resolve().parents[1]
MODES = ("rema", "vrp", "mrp")  # the team; one agent that answers directly; one agent that plans first
POLL = 0.5  # seconds
SETTLE = 5.0  # seconds; Ray's processes outlive a killed run, and go on scoring (for 2 seconds, where it was measured)
BATCH = 8192  # trajectories that verl's validation takes at once; it keeps their tokens in memory until all are done
ON_GPU = {  # the actor only hands its weights to vLLM: bfloat16, like there, and in host memory the rest of the time
    "actor_rollout_ref.actor.fsdp_config.model_dtype": "bf16",
    "actor_rollout_ref.actor.fsdp_config.param_offload": "true",
    "actor_rollout_ref.actor.fsdp_config.optimizer_offload": "true",
}


class RunFailed(Exception):
    """verl ended with an error. The message is for the user; exit code 1."""


@dataclass(frozen=True)
class Job:
    """What to roll out, and how. Everything but ``machine`` decides what comes out, and is compared on a resume."""

    folder: Path
    model: str
    files: tuple[Path, ...]  # the questions: verl's RL format
    reasoning_model: str | None = None  # None: ``model`` plays both roles
    mode: str = "rema"
    task: str = "math"
    samples: int = 1  # per question
    temperature: float = 0.0
    top_p: float = 1.0
    max_turns: int = 30
    max_message: int = 512  # tokens of one message
    max_context: int = 4096  # tokens of the longest context to be continued
    seed: int = 0
    only: tuple[str, ...] = ()  # data sources; () is all
    overrides: tuple[str, ...] = ()  # more of verl's options, k=v
    machine: dict[str, Any] = field(default_factory=lambda: {"device": "gpu", "gpus": 8, "nodes": 1, "tensor": 1})

    def settings(self) -> dict[str, Any]:
        """What two launches into one folder must have in common."""
        options = {key: value for key, value in vars(self).items() if key not in ("folder", "files", "machine")}
        digests = {
            "questions": [sha256_file(file) for path in self.files for file in source_files(path)],
            "weights": [fingerprint(model) for model in (self.model, self.reasoning_model) if model],
        }
        return json.loads(json.dumps(options | digests))


def add_options(parser, *, max_turns: int, max_message: int, max_context: int) -> None:
    """The command-line options of :class:`Job` that both scripts have."""
    add = parser.add_argument
    add("--task", choices=("math", "judge"), default="math", help="chooses the default prompts")
    add("--max-turns", type=positive_int, default=max_turns, help="turns per dialogue (default: %(default)s)")
    add("--max-message", type=positive_int, default=max_message, help="tokens of one message (default: %(default)s)")
    add("--max-context", type=positive_int, default=max_context, help="tokens of a context (default: %(default)s)")
    add("--seed", type=int, default=0, help="of vLLM's sampling (default: 0)")
    add("--device", choices=("gpu", "cpu"), default="gpu", help="cpu: a machine without accelerator")
    add("--gpus", type=positive_int, default=8, help="GPUs per node (default: 8; on cpu 1 worker)")
    add("--nodes", type=positive_int, default=1)
    add("--tensor", type=positive_int, default=1, help="GPUs that share one copy of the model (default: 1)")


def job_options(args) -> dict[str, Any]:
    """Those options as arguments of :class:`Job`."""
    on_cpu = {"gpus": 1, "nodes": 1, "tensor": 1} if args.device == "cpu" else {}
    names = ("device", "gpus", "nodes", "tensor")
    return {name: getattr(args, name) for name in ("task", "max_turns", "max_message", "max_context", "seed")} | {
        "machine": {name: getattr(args, name) for name in names} | on_cpu
    }


def split_overrides(argv: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """(our arguments, verl's: what stands after "--")."""
    ours = argv[: argv.index("--")] if "--" in argv else argv
    theirs = tuple(argv[len(ours) + 1 :])
    if wrong := next((o for o in theirs if "=" not in o and not o.startswith("~")), None):
        raise UserError(f"'{wrong}' is not one of verl's options (KEY=VALUE)")
    return ours, theirs


# --- questions -----------------------------------------------------------------------------------------------------


def read_questions(files: Iterable[Path], only: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The rows of verl's RL files, each with its ``extra_info.id`` (a hash of the question where it has none).

    Rows without an id that ask the same question share one. Two rows with the same id but other content are a mistake.
    """
    found = [item for path in files for file in source_files(Path(path)) for item in read_rows(file)]
    for where, row in found:
        try:
            check_row(row, where, "prompt")
        except ValueError as error:
            raise UserError(str(error)) from None
        if not isinstance(row.get("data_source"), str):
            raise UserError(f"{where}: no 'data_source'")
    if unknown := set(only) - {row["data_source"] for _, row in found}:
        raise UserError(f"no question of '{sorted(unknown)[0]}' in {', '.join(map(str, files))}")
    rows, seen = [], {}
    for where, row in found:  # what has no id is named by a function that takes seconds to import
        given = (row.get("extra_info") or {}).get("id") is not None
        name = question_id(row)
        if given and name in seen:
            raise UserError(f"{where}: 'extra_info.id' is {name!r} again, as in {seen[name]}")
        seen[name] = where
        if not only or row["data_source"] in only:
            rows.append(row | {"extra_info": {**(row.get("extra_info") or {}), "id": name}})
    return rows


def question_id(row: dict[str, Any]) -> str:
    """The id under which the journal has the row."""
    if (given := (row.get("extra_info") or {}).get("id")) is not None:
        return str(given)
    from rema_verl.rewards.rema import row_id  # imports verl: seconds

    return row_id(row | {"raw_prompt": row["prompt"]})


def for_mode(row: dict[str, Any], mode: str, task: str) -> dict[str, Any]:
    """The row as the mode's agent gets it: a single agent's instructions are a system message before the question.

    The dialogue brings its own instructions and takes the question alone, so there the row stays as it is.
    """
    if mode == "rema":
        return row
    system = SINGLE_AGENT_PROMPTS[mode if task == "math" else f"{task}_{mode}"]
    rest = [message for message in row["prompt"] if message["role"] != "system"]
    return row | {"prompt": [{"role": "system", "content": system}, *rest]}


def pending(rows: Iterable[dict], done: Mapping[str, int], samples: int) -> list[dict]:
    """The questions that lack samples, with the number they lack where verl looks for it."""
    missing = {row["extra_info"]["id"]: row for row in rows if done.get(row["extra_info"]["id"], 0) < samples}
    return [row | {"__rollout_n__": samples - done.get(name, 0)} for name, row in missing.items()]


# --- the journal ---------------------------------------------------------------------------------------------------


class Journal:
    """Reads a folder's JSON lines as they come. A line without its end is still being written, or was cut by a kill."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.read: dict[Path, int] = {}  # bytes of each file
        self.broken = 0  # complete lines that are no trajectory

    def new(self) -> Iterator[dict[str, Any]]:
        """The trajectories since the last call, file by file."""
        for file in sorted(self.folder.rglob("*.jsonl")):
            with file.open("rb") as lines:
                lines.seek(self.read.get(file, 0))
                for line in lines:
                    if not line.endswith(b"\n"):
                        break
                    self.read[file] = self.read.get(file, 0) + len(line)
                    if (entry := parse(line)) is None:
                        self.broken += 1
                    else:
                        yield entry


def parse(line: bytes) -> dict[str, Any] | None:
    """What statistics need of one journal line (the messages of a whole evaluation would fill the memory).

    >>> parse(b'{"id": "a", "acc": 1.0, "stop_reason": "finished", "messages": ["plan", "4"], "ground_truth": "4"}')
    {'id': 'a', 'acc': 1.0, 'stop_reason': 'finished', 'grade_status': None, 'dialogue_turns': None, 'plan': '64879f7d'}
    """
    try:
        entry = json.loads(line)
        kept = {key: entry.get(key) for key in ("id", "acc", "stop_reason", "grade_status", "dialogue_turns")}
        first = (entry.get("messages") or [""])[0]
        kept["plan"] = hashlib.sha256(first.encode(errors="replace")).hexdigest()[:8]  # enough to tell plans apart
    except (ValueError, AttributeError, TypeError, RecursionError, LookupError):
        return None
    number = isinstance(kept["acc"], int | float) and 0 <= kept["acc"] <= 1
    return kept if isinstance(kept["id"], str) and number else None


def settle(folder: Path) -> None:
    """Wait until the journal stays as it is: what a killed run's last processes still add must not be done again."""
    before = None
    while (sizes := {file: file.stat().st_size for file in folder.rglob("*.jsonl")}) and sizes != before:
        before = sizes
        time.sleep(SETTLE)


def read_journal(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """id -> its trajectories, in the order of files and lines."""
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in Journal(folder).new():
        found.setdefault(entry["id"], []).append(entry)
    return found


def is_correct(entry: Mapping[str, Any]) -> bool:
    """Correct and, where the trajectory is a dialogue, finished (ReMA's reward; an unfinished one has no answer)."""
    return entry["acc"] >= 1 and entry.get("stop_reason") in (None, "finished")


# --- the folder ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Only one run at a time. The descriptor is handed on to verl, so that the lock lasts as long as verl's driver."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{folder}: cannot write here ({first_line(error)})") from None
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: another run is still writing here") from None
        yield lock.fileno()


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder whose trajectories came of other settings. One without any yet takes the new settings."""
    path = folder / "settings.json"
    scored = any(file.stat().st_size for file in folder.glob("journal/*/*.jsonl"))
    if scored and not path.exists():
        raise UserError(f"{folder}: has a journal but no settings.json; use another folder")
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
        differing = [key for key in sorted(found.keys() | settings.keys()) if found.get(key) != settings.get(key)]
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a settings file ({first_line(error)})") from None
    if differing and scored:
        key = differing[0]
        there, here = (json.dumps(values.get(key))[:60] for values in (found, settings))
        raise UserError(
            f"{folder}: holds results with {key}={there}, not {here}; use another folder, or those settings"
        )
    if differing:
        for name in ("model", "model_reasoning"):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / "too_long.json").unlink(missing_ok=True)
        write_text(path, json.dumps(settings, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """All or nothing."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot write ({first_line(error)})") from None
    finally:
        temporary.unlink(missing_ok=True)


# --- the model -----------------------------------------------------------------------------------------------------


def locate(model: str) -> tuple[str | None, Path | None]:
    """(Hugging Face folder or Hub name, None), or (None, the FSDP shards that have to be merged first)."""
    path = Path(model).expanduser()
    if not path.exists():
        if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model):
            return model, None  # a Hub name
        raise UserError(f"{model}: no such model folder")
    for folder in (path, path / "huggingface", path / "actor" / "huggingface"):
        if (folder / "config.json").is_file() and weights(folder):
            return str(folder.resolve()), None
    for folder in (path, path / "actor"):
        if (folder / "fsdp_config.json").is_file():
            return None, folder.resolve()
    raise UserError(
        f"{model}: neither a Hugging Face model (config.json, weights) nor a verl checkpoint (global_step_N)"
    )


def split_team(model: str) -> tuple[str, str | None]:
    """(meta_thinking's model, reasoning's): a checkpoint of trainer mode ``rema_separate`` holds both."""
    for folder in (Path(model).expanduser(), Path(model).expanduser() / "actor"):
        if all((folder / role).is_dir() for role in ROLES):
            return str(folder / META_THINKING), str(folder / REASONING)
    return model, None


def weights(folder: Path) -> list[Path]:
    """The files with a model's weights, Hugging Face's or FSDP's."""
    patterns = ("*.safetensors", "pytorch_model*.bin", "model_world_size_*.pt")
    return sorted(file for pattern in patterns for file in folder.glob(pattern))


def fingerprint(model: str) -> str | None:
    """Tells one model's weights from another's without reading all of them: sizes, and 16 pieces of each file."""
    folder, shards = locate(model)
    if shards is None and not Path(folder).exists():
        return None  # on the Hub
    digest = hashlib.sha256()
    for file in weights(shards or Path(folder)):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            for piece in range(16):
                content.seek(size * piece // 16)
                digest.update(content.read(1 << 16))
    return digest.hexdigest()


def usable_model(model: str, merged: Path) -> str:
    """What verl can load: the model as it is, or the checkpoint merged into the folder ``merged`` (once)."""
    found, shards = locate(model)
    if shards is None:
        return found
    temporary, log = merged.with_name(f"{merged.name}.tmp"), merged.parent / "log" / f"{merged.name}.txt"
    if not merged.exists():
        print(f"merging {shards} into Hugging Face format", flush=True)
        shutil.rmtree(temporary, ignore_errors=True)
        log.parent.mkdir(exist_ok=True)
        command = ["-m", "verl.model_merger", "merge", "--backend", "fsdp", "--local_dir", str(shards)]
        with log.open("wb") as output:
            result = subprocess.run(
                [sys.executable, *command, "--target_dir", str(temporary)], stdout=output, stderr=output, cwd=ROOT
            )
        if result.returncode:
            raise RunFailed(
                f"cannot merge {shards}: {log.read_text(errors='replace').strip().splitlines()[-1:]}; {log}"
            )
        temporary.replace(merged)
    return str(merged.resolve())


def find_too_long(rows: list[dict], job: Job, models: list[str]) -> list[str]:
    """Ids of the questions whose first prompt exceeds ``max_context``.

    The dialogue would skip them in silence, and verl's single-turn loop would cut them, so neither ever gets them.
    """
    from rema_verl.config import ReMAConfig

    model, config = models[0], configuration(job, models)
    rema = ReMAConfig.of(config)
    from transformers import AutoTokenizer

    from rema_verl.agent_loops.rema import control_strings, prompts_for, question_of

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:
        raise UserError(f"{model}: cannot load the tokenizer ({first_line(error)})") from None
    chat = dict(config.data.apply_chat_template_kwargs)
    tokenizer.chat_template = config.actor_rollout_ref.model.custom_chat_template or tokenizer.chat_template
    if not tokenizer.chat_template:
        raise UserError(f"{model}: the tokenizer has no chat template")
    controls = tuple(c for c in control_strings(tokenizer, chat) if c != rema.finish_flag)

    def first_prompt(row: dict) -> list[dict[str, str]]:
        if job.mode != "rema":
            return for_mode(row, job.mode, job.task)["prompt"]
        plan_question = row["extra_info"].get("meta_thinking_question")
        return Dialogue(
            neutralise(question_of(row["prompt"]), controls),
            max_turns=rema.max_turns,
            finish_flag=rema.finish_flag,
            prompts=prompts_for(rema),
            plan_question=plan_question and neutralise(plan_question, controls),
            plan=rema.plan,
        ).view(META_THINKING)

    def length(row: dict) -> int:
        text = tokenizer.apply_chat_template(first_prompt(row), tokenize=False, add_generation_prompt=True, **chat)
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return [row["extra_info"]["id"] for row in rows if length(row) > config.data.max_prompt_length]


# --- the run -------------------------------------------------------------------------------------------------------


def verl_options(job: Job, models: list[str], questions: Path, launch: int) -> list[str]:
    """The whole run as options of verl's own entry point."""
    machine, on_cpu = job.machine, job.machine["device"] == "cpu"
    workers = machine["gpus"] * machine["nodes"]
    rollout = "actor_rollout_ref.rollout"
    options = {
        "data.train_files": quoted(questions),  # verl wants some, and never looks at them
        "data.val_files": quoted(questions),
        "data.train_batch_size": workers,
        "data.val_batch_size": max(1, BATCH // job.samples),
        "data.max_prompt_length": job.max_context,
        "data.max_response_length": job.max_message,
        "rema.journal": quoted(job.folder / "journal" / f"{launch:03d}"),
        "rema.task": job.task,
        "rema.max_turns": job.max_turns if job.mode == "rema" else 1,
        "actor_rollout_ref.model.path": quoted(models[0]),
        "actor_rollout_ref.actor.ppo_mini_batch_size": workers,
        f"{rollout}.tensor_model_parallel_size": machine["tensor"],
        # another launch draws other samples: with the same seed it could repeat those that are there
        f"{rollout}.seed": job.seed + 1000 * (launch - 1),
        f"{rollout}.val_kwargs.do_sample": str(job.temperature > 0).lower(),
        f"{rollout}.val_kwargs.temperature": job.temperature,
        f"{rollout}.val_kwargs.top_p": job.top_p,
        "trainer.n_gpus_per_node": machine["gpus"],
        "trainer.nnodes": machine["nodes"],
        "trainer.project_name": "rema-verl",
        "trainer.experiment_name": "evaluate",
        "trainer.default_local_dir": quoted(job.folder / "checkpoints"),
    }
    if len(models) > 1:  # the second one is only served: no trainer for it
        options |= {"trainer.v1.trainer_mode": "rema_separate", "rema.roles.reasoning.model_path": quoted(models[1])}
        options |= {"rema.roles.reasoning.trainable": "false"}
    if not on_cpu:
        options |= ON_GPU | {f"{rollout}.gpu_memory_utilization": 0.7 / len(models)}
    if job.mode != "rema":
        options |= {"trainer.v1.trainer_mode": "sync", f"{rollout}.agent.default_agent_loop": "single_turn_agent"}
    groups = ["+setting=evaluate", *(["+device=cpu"] if on_cpu else [])]
    return [*groups, *(f"{key}={value}" for key, value in options.items()), *job.overrides]


def verl_command(job: Job, models: list[str], questions: Path, launch: int) -> list[str]:
    """The command line of one launch."""
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-name", "rema_trainer"]
    return [*command, f"hydra.run.dir={quoted(job.folder / 'hydra')}", *verl_options(job, models, questions, launch)]


def configuration(job: Job, models: list[str]):
    """The run's whole configuration.

    Raises:
        UserError: an option that verl or we do not know, or a value out of range.
    """
    from omegaconf.errors import OmegaConfBaseException

    from rema_verl.config import ReMAConfig
    from rema_verl.config.composing import compose

    try:
        config = compose("rema_trainer", verl_options(job, models, job.folder / "pending.parquet", launch=1))
        ReMAConfig.of(config)
    except (ValueError, OmegaConfBaseException) as error:
        raise UserError(f"verl's options: {first_line(error)}") from None
    return config


def check_job(job: Job) -> None:
    """What can be wrong with models and options, before the folder is touched.

    Raises:
        UserError: for the first mistake found.
    """
    models = [model for model in (job.model, job.reasoning_model) if model]
    for model in models:
        locate(model)
    if job.overrides and not (job.folder / "settings.json").exists():  # else they are compared with those there
        configuration(job, models)


def quoted(value: object) -> str:
    """A string as Hydra reads it: a path may have characters that mean something to it."""
    return "'" + str(value).replace("\\", "\\\\").replace("'", "\\'") + "'"


def environment(device: str) -> dict[str, str]:
    """What verl's processes need beside the user's own environment (recipes/lib.sh sets the same)."""
    wanted = {"TOKENIZERS_PARALLELISM": "false", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        wanted |= {"VERL_PLATFORM": "cpu", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "2", "TQ_NUM_THREADS": "2"}
    return wanted | os.environ


def roll_out(job: Job, rows: list[dict], title: str = "trajectories") -> set[str]:
    """Generate and grade what the journal lacks; return the ids of the questions that do not fit.

    Raises:
        UserError: for a folder that is in use or has other settings, or a model that cannot be used.
        RunFailed: when verl ends with an error. The same call goes on from there.
    """
    check_job(job)
    with locked(job.folder) as lock:
        check_settings(job.folder, job.settings())
        file = job.folder / "too_long.json"
        too_long = set(json.loads(file.read_text())) if file.exists() else None

        def lacking() -> list[dict]:
            done = {name: len(entries) for name, entries in read_journal(job.folder / "journal").items()}
            return pending((row for row in rows if row["extra_info"]["id"] not in (too_long or ())), done, job.samples)

        if not lacking():
            return too_long or set()
        models = [usable_model(job.model, job.folder / "model")]
        if job.reasoning_model:
            models.append(usable_model(job.reasoning_model, job.folder / "model_reasoning"))
        if too_long is None:
            too_long = set(find_too_long(rows, job, models))
            write_text(file, json.dumps(sorted(too_long)) + "\n")
        settle(job.folder / "journal")
        if missing := lacking():
            launch(job, models, missing, lock, title, {row["extra_info"]["id"] for row in rows})
    return too_long


def launch(job: Job, models: list[str], missing: list[dict], lock: int, title: str, wanted: set[str]) -> None:
    """One run of verl over the questions that lack samples."""
    number = 1 + max((int(p.name) for p in (job.folder / "journal").glob("[0-9]*")), default=0)
    (job.folder / "journal" / f"{number:03d}").mkdir(parents=True)  # also of a launch that scores nothing
    (job.folder / "log").mkdir(exist_ok=True)
    import pyarrow as pa
    import pyarrow.parquet as pq

    questions, log = job.folder / "pending.parquet", job.folder / "log" / f"{number:03d}.txt"
    temporary = questions.with_suffix(".tmp")
    pq.write_table(pa.Table.from_pylist([for_mode(row, job.mode, job.task) for row in missing]), temporary)
    temporary.replace(questions)
    command = verl_command(job, models, questions, number)
    lacking = sum(row["__rollout_n__"] for row in missing)
    print(f"{lacking:,} trajectories to generate, of {len(missing):,} questions; verl's output: {log}", flush=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment(job.machine["device"]), cwd=ROOT,
            pass_fds=(lock,),
        )  # fmt: skip
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            done = watch(process, job, title, lacking, wanted)
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if process.returncode:
        text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))
        said = [line[line.index(PREFIX) :] for line in text.splitlines() if PREFIX in line]
        tail = list(dict.fromkeys(said)) or text.splitlines()[-15:]
        raise RunFailed(
            "\n".join(tail) + f"\nverl ended with exit code {process.returncode}; its whole output: {log}\n"
            f"{done:,} trajectories of this launch are kept; the same command goes on from there"
        )


def watch(process: subprocess.Popen, job: Job, title: str, lacking: int, wanted: set[str]) -> int:
    """Show how the journal grows until the run ends; return by how much it grew."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console, journal = Console(), Journal(job.folder / "journal")
    before = sum(entry["id"] in wanted for entry in journal.new())
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
    done = right = shown = 0
    with Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[words]}"), console=console) as progress:
        task = progress.add_task(title, total=lacking, words="starting Ray and vLLM")
        running = True
        while running:
            time.sleep(POLL)
            running = process.poll() is None  # asked first: what was written before the end is read below
            for entry in journal.new():
                if entry["id"] in wanted:
                    done, right = done + 1, right + is_correct(entry)
            words = f"{right / done:.1%} correct so far" if done else "starting Ray and vLLM"
            progress.update(task, completed=done, words=words)
            if not console.is_terminal and done >= shown + max(1, lacking // 10):  # a bar does not show in a file
                shown = done
                print(f"   {title}: {done:,} of {lacking:,} ({before:,} were there), {words}", flush=True)
    return done
