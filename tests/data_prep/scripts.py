"""What the tests of the data scripts share."""

import json
from pathlib import Path

import _common
import pyarrow as pa
import pyarrow.parquet as pq
import pytest


def refused_by(main):
    """A fixture ``fails(*options)``: runs the script with options it must refuse, and returns its one stderr line."""

    @pytest.fixture
    def fails(tmp_path, capsys):
        def run(*options, out=tmp_path / "out") -> str:
            before = {p: p.read_bytes() for p in out.glob("*")}
            capsys.readouterr()
            with pytest.raises(SystemExit) as stop:
                _common.run_main(main, [str(a) for a in (*options, "--out", out)])
            error = capsys.readouterr().err
            assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
            after = {p: p.read_bytes() for p in out.glob("*")}
            assert after == before, "a failed run changed a file of the output folder"
            return error

        return run

    return fails


def write(path: Path, rows) -> Path:
    """Rows as parquet, json or jsonl, by the path's extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
