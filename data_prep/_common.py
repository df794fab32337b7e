"""What every data script shares: one-line errors, reading rows, comparing questions, writing all-or-nothing.

The scripts stay short and behave alike: a user's mistake is a `UserError` (one line on stderr, exit code 2), sources
are read through `read_rows`, and outputs appear together or not at all through `write_outputs`.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rema_verl.dialogue import SINGLE_AGENT_PROMPTS
from rema_verl.errors import Parser as Parser
from rema_verl.errors import UserError, complain
from rema_verl.rewards.grading import last_boxed as last_boxed

if TYPE_CHECKING:
    import pyarrow as pa  # a mistake on the command line is found without it

EXTENSIONS = (".parquet", ".json", ".jsonl")


def run_main(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> None:
    """Run a script's `main`; turn a user's mistake into one stderr line and exit code 2, Ctrl-C into 130."""
    try:
        main(argv)
    except UserError as error:
        complain(error, prefix="error:")
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped: outputs are as they were before", file=sys.stderr)
        sys.exit(130)


def positive_int(text: str) -> int:
    """argparse type for counts: `--limit 0` is a mistake, not an empty data set."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def named_values(items: Iterable[str], option: str, known: Iterable[str]) -> dict[str, str]:
    """{name: value} from a repeatable option's NAME=VALUE items; unknown and repeated names are mistakes."""
    values: dict[str, str] = {}
    for item in items:
        name, _, value = item.partition("=")
        if name not in known or not value:
            raise UserError(f"{option} '{item}': expected NAME=VALUE with NAME one of {', '.join(known)}")
        if name in values:
            raise UserError(f"{option} '{item}': {name} was already given '{values[name]}'")
        values[name] = value
    return values


def check_count(name: str, found: int, expected: int, allowed: dict[str, str]) -> None:
    """Stop where a benchmark has other rows than the published one, unless --allow-count (`allowed`) says so."""
    if str(found) != allowed.get(name, str(expected)):
        wanted = f"--allow-count {name}={allowed[name]}" if name in allowed else f"{expected:,} rows"
        raise UserError(f"{name}: expected {wanted}, found {found:,} rows (--allow-count {name}={found} accepts them)")


# --- text ----------------------------------------------------------------------------------------------------------


def normalise_question(text: str) -> str:
    r"""A question's comparison key: no whitespace, no case. LaTeX spacing means nothing, so `$x + y$` equals `$x+y$`.

    >>> normalise_question("What  is\n$X + y$?")
    'whatis$x+y$?'
    """
    return "".join(unicodedata.normalize("NFC", text).split()).casefold()


def seeded_order(key: str, seed: int) -> str:
    """Sort key for a seeded sample: take the n smallest.

    A hash instead of a random generator: it does not depend on the order of the input or on the Python version, and
    a smaller sample is always part of a larger one.
    """
    return hashlib.sha256(f"{seed}:{key}".encode()).hexdigest()


def chat(question: str, prompt: str | None = None) -> list[dict[str, str]]:
    """The `prompt` column: the bare question, or a single agent's system message (by its name) before it."""
    system = [{"role": "system", "content": SINGLE_AGENT_PROMPTS[prompt]}] if prompt else []
    return [*system, {"role": "user", "content": question}]


# --- reading -------------------------------------------------------------------------------------------------------


def source_files(path: Path) -> list[Path]:
    """The files behind a local source: itself, or every parquet, json and jsonl file in the folder, in name order."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir():
        visible = (f for f in path.rglob("*") if not any(part[0] == "." for part in f.relative_to(path).parts))
        files = sorted(f for f in visible if f.suffix in EXTENSIONS and f.is_file())
        if not files:
            raise UserError(f"{path}: no {', '.join(EXTENSIONS)} file in this folder")
        return files
    if path.suffix not in EXTENSIONS:
        raise UserError(f"{path}: unsupported extension '{path.suffix}' (expected {', '.join(EXTENSIONS)})")
    return [path]


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, row) of one file; `where` names file and row (the first is 1; in JSON lines, the line).

    Parquet comes in batches and JSON lines one by one. A .json file may be a list of rows, one single row (the
    original MATH release has one file per question) or JSON lines under the wrong name.
    """
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: no permission to read this file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    read = {".parquet": _read_parquet, ".json": _read_json, ".jsonl": _read_jsonl}[path.suffix]
    found = False
    for number, row in read(path):
        found = True
        where = f"{path}: row {number}"
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object with named fields, found {type(row).__name__}")
        yield where, row
    if not found:
        raise UserError(f"{path}: the file has no rows")


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable parquet file ({first_line(error)})") from error


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON or bad UTF-8
        raise UserError(f"{path}: near line {max(number, 1)}: not valid JSON ({first_line(error)})") from error


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _read_jsonl(path)
            return
        raise UserError(f"{path}: not valid JSON ({error})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({first_line(error)})") from error
    yield from enumerate(value if isinstance(value, list) else [value], start=1)


def is_local(source: str) -> bool:
    """True where `source` must be a path: it exists, ends like a file, or cannot be a Hub id (`owner/name[:file]`)."""
    if Path(source).exists():
        return True
    hub_id = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(:.+)?", source)
    return hub_id is None or (hub_id[2] is None and re.fullmatch(r"\.[A-Za-z]{2,8}", Path(source).suffix) is not None)


def load_hub(source: str, split: str, option: str) -> tuple[list[str], Iterator[tuple[str, dict[str, Any]]]]:
    """Rows of a Hub data set, as `read_rows` gives them, after the addresses of the files they came from.

    Args:
        source: `owner/name` (then `split` is taken) or `owner/name:path/of/one/file.parquet`.
        option: the option that takes a local path instead, named in the error.

    `datasets` is imported here only: building from local files needs neither it nor a network.
    """
    import datasets
    import huggingface_hub

    option = option if option.endswith("=") else f"{option} "
    datasets.logging.set_verbosity_error()  # retries are logged as warnings: the one error line below says it
    huggingface_hub.logging.set_verbosity_error()
    name, _, file = source.partition(":")
    try:
        if file:
            data = datasets.load_dataset(name, data_files=file, split="train")  # datasets calls any bare file "train"
        else:
            data = datasets.load_dataset(name, split=split)
    except Exception as error:  # whatever the network, the Hub or a missing data set raises: the way out is the same
        raise UserError(
            f"cannot load '{source}' from the Hugging Face Hub, and it is no local file or folder "
            f"({type(error).__name__}: {first_line(error)}): check the name and the network, or pass {option}PATH"
        ) from error
    if not len(data):
        raise UserError(f"{source}: the Hub data set has no rows")
    rows = ((f"{source}: row {number}", row) for number, row in enumerate(data, start=1))
    return sorted(data.info.download_checksums or {}), rows


def open_source(
    source: str, split: str, option: str
) -> tuple[Iterator[tuple[str, dict[str, Any]]], dict[str, str | list[str] | dict[str, str]]]:
    """Rows of a local file or folder or of a Hub data set, and the manifest's account of where they came from."""
    if is_local(source):
        files = source_files(Path(source))
        account = {"source": source, "files": {str(file): sha256_file(file) for file in files}}
        return (item for file in files for item in read_rows(file)), account
    addresses, rows = load_hub(source, split, option)
    return rows, {"source": source, "hub_files": addresses, "datasets": version("datasets")}


def first_line(error: BaseException) -> str:
    """An exception's first line, short enough for a one-line message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# --- writing -------------------------------------------------------------------------------------------------------


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_outputs(
    out_dir: Path, tables: "dict[str, pa.Table]", manifest: dict[str, Any], reports: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write parquet files and `manifest.json` into `out_dir`, all or nothing; return the manifest as written.

    `reports` are further JSON files, by name.

    Everything goes to temporary files first, so a failure while writing leaves earlier outputs as they were. The
    manifest gains `outputs` (rows and SHA-256 of each file) and is put in place last: it describes finished files.
    """
    import pyarrow.parquet as pq

    manifest = dict(manifest, outputs={})
    temporary: dict[Path, Path] = {}  # final path -> temporary path
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            path = temporary[out_dir / name] = out_dir / f".{name}.tmp-{os.getpid()}"
            pq.write_table(table, path)
            _sync(path)
            manifest["outputs"][name] = {"rows": table.num_rows, "sha256": sha256_file(path)}
        for name, content in [*(reports or {}).items(), ("manifest.json", manifest)]:
            path = temporary[out_dir / name] = out_dir / f".{name}.tmp-{os.getpid()}"
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            _sync(path)
            if content is not manifest:
                manifest["outputs"][name] = {"sha256": sha256_file(path)}
        for final in temporary:
            if final.is_dir():
                raise UserError(f"{final}: a folder stands where this output goes")
        for final, path in temporary.items():
            os.replace(path, final)
    except OSError as error:
        raise UserError(f"{out_dir}: cannot write the outputs ({first_line(error)})") from error
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    return manifest


def _sync(path: Path) -> None:
    """Push a file to disk, so that the rename that follows cannot expose an empty file after a power cut."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
