"""How long does a run of a million rows take to start, and what does it hold in memory?

    python -m benchmarks.million [--rows 1000000] [--folder FOLDER] [--out FILE] [--json]

It makes the rows, one small picture each, as JSON lines and as Parquet. The JSON lines name the
files of one shared folder of 1,000 pictures; the Parquet holds the pictures' bytes in its rows, in
row groups as large as pyarrow writes them. Then it takes what `opd train` takes with the embedded
model, in a new process for each: from the start of Python to the first encoded batch, with the
checks before the first step and the fingerprint of the data. The peak is of the whole process, so
it contains the imported packages; `--rows 2048` shows these. A second start finds what the first
has kept: sizes of pictures, and a copy of the Parquet in small row groups.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PICTURES = 1000
SIZE = 64
PROMPTS = 8
KINDS = {"jsonl": "JSON lines", "parquet": "Parquet"}


def main() -> None:
    if sys.argv[1:2] == ["--start"]:
        print(json.dumps(start(Path(sys.argv[2]))))
        return
    from benchmarks import measuring  # it imports torch, which the started process need not

    parser = measuring.arguments(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where the files are made")
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    options = parser.parse_args()
    rows = 5000 if options.quick else options.rows
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = [result for kind in KINDS for result in starts(kind, rows, Path(folder))]
    found = measuring.report(
        options, "million", results, data_rows=rows, date=date.today().isoformat()
    )
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def starts(kind: str, rows: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Makes a file of `rows` rows, and starts a run on it twice."""
    path = folder / f"rows.{kind}"
    (make_lines if kind == "jsonl" else make_parquet)(path, rows)
    cache = {"XDG_CACHE_HOME": str(folder / "cache")}
    for number in ("first", "second"):
        began = time.monotonic()
        command = [sys.executable, "-m", "benchmarks.million", "--start", str(path)]
        done = subprocess.run(
            command, env={**os.environ, **cache}, stdout=subprocess.PIPE, text=True, check=True
        )
        yield {
            "file": KINDS[kind],
            "start": number,
            "file_bytes": path.stat().st_size,
            "seconds_of_process": round(time.monotonic() - began, 1),
            **json.loads(done.stdout.splitlines()[-1]),
        }


def start(path: Path) -> dict[str, Any]:
    """Opens the inputs of a run on `path` and encodes the first batch. Returns seconds since the
    start of the interpreter, and the largest resident size in bytes."""
    from opd.progress import Quiet
    from opd.run import preflight, session
    from opd.run import recipe as recipes
    from opd.run.batches import Batches
    from opd.types import Example
    from opd.views.usable import Skipped

    class Alone:
        """A backend of one process, which encodes and never computes."""

        rank, size = 0, 1

    progress = Quiet()
    imported = since_start()
    recipe = recipes.load("tiny", [f"data.path={path}", f"rollout.prompts={PROMPTS}"])
    opened = session.open_inputs(recipe, "cpu", progress)
    read = since_start()
    preflight.check(opened.recipe, opened.encoder, opened.examples, progress)
    opened.inputs()
    batches = Batches(
        opened.recipe,
        Alone(),
        opened.encoder,
        opened.examples,
        Skipped(progress),
    )
    batch = batches.encode(1)
    first = since_start()
    assert len(batch.pairs) == PROMPTS
    assert isinstance(opened.examples[len(opened.examples) - 1], Example)
    for step in range(2, 12):
        batches.encode(step)
    return {
        "seconds_imports": round(imported, 1),
        "seconds_read": round(read, 1),
        "seconds_to_first_batch": round(first, 1),
        "seconds_a_further_batch": round((since_start() - first) / 10, 3),
        "cpu_seconds": round(time.process_time(), 1),
        "peak_resident_bytes": peak(),
    }


def peak() -> int:
    """The largest resident size of this process, in bytes."""
    with suppress(OSError, StopIteration):
        # Linux counts in ru_maxrss what the parent held before this program began.
        status = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def since_start() -> float:
    """Seconds since the interpreter was started."""
    return time.time() - STARTED


def make_lines(path: Path, rows: int) -> None:
    """Writes JSON lines, and the pictures that they share."""
    (path.parent / "pictures").mkdir()
    for number in range(PICTURES):
        (path.parent / "pictures" / f"{number}.png").write_bytes(picture(number))
    with path.open("w") as file:
        for number in range(rows):
            row = {"image": f"pictures/{number % PICTURES}.png", **fields(number)}
            file.write(json.dumps(row) + "\n")


def make_parquet(path: Path, rows: int) -> None:
    """Writes Parquet whose rows hold their pictures."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures = [picture(number) for number in range(PICTURES)]
    sample = pa.Table.from_pylist([{"image": {"bytes": pictures[0], "path": None}, **fields(0)}])
    schema = sample.schema.set(
        0, pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    )
    # One row group, as pyarrow writes up to 1,048,576 rows.
    with pq.ParquetWriter(path, schema) as writer:
        writer.write_table(
            pa.concat_tables(
                pa.Table.from_pylist(
                    [
                        {"image": {"bytes": pictures[n % PICTURES], "path": None}, **fields(n)}
                        for n in range(begin, min(begin + 10_000, rows))
                    ],
                    schema,
                )
                for begin in range(0, rows, 10_000)
            ),
            row_group_size=1 << 20,
        )


def fields(number: int) -> dict[str, Any]:
    """The fields of a row beside its picture."""
    left, top = number % 32, number // 32 % 32
    return {
        "question": f"Which sign stands in row {number}?",
        "boxes": [[left, top, left + 24, top + 24]],
        "answer": str(number % 10),
    }


def picture(number: int) -> bytes:
    """A PNG of noise, of about 1 kB."""
    noise = np.random.default_rng(number).integers(0, 256, (SIZE // 4, SIZE // 4, 3), np.uint8)
    file = BytesIO()
    Image.fromarray(noise).resize((SIZE, SIZE), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def _started() -> float:
    """The time at which this process was started, where the system tells; else now."""
    try:
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        boot = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - (boot - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return time.time()


STARTED = _started()


if __name__ == "__main__":
    main()
