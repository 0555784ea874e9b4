"""The parsers under a coverage-guided fuzzer (atheris): records, options, cards, schemes."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from typing import Any


def fuzz(seed: int, runs: int) -> dict[str, Any]:
    """Counts of `runs` inputs in a process of its own, which the fuzzer ends."""
    if importlib.util.find_spec("atheris") is None:
        return {"lost": 0, "unclear": 0, "skipped": "atheris is not installed"}
    command = [
        sys.executable,
        "-m",
        "tests.faults.parsers",
        f"-runs={runs}",
        f"-seed={seed}",
        "-max_len=4096",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    covered = re.findall(r"cov: (\d+)", done.stderr)
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
    counted = re.search(r"Done (\d+) runs", done.stderr)
    return {
        "tried": int(counted[1]) if counted else 0,
        "covered_edges": int(covered[-1]) if covered else 0,
        "lost": 0,
        "unclear": int(done.returncode != 0),
    }


def main() -> None:
    import tempfile
    import warnings
    from pathlib import Path

    import atheris

    with atheris.instrument_imports(include=["colqwen_lab"]):
        from colqwen_lab import records
        from colqwen_lab.errors import BadInput
        from colqwen_lab.hardware import find_card
        from colqwen_lab.model.config import resolve_variant
        from colqwen_lab.options import SweepOptions

    warnings.simplefilter("ignore")
    path = Path(tempfile.mkdtemp(prefix="colqwen-lab-parsers-")) / "fuzzed.jsonl"
    row = records.published_cells()[0].to_line().encode()

    def one(data: bytes) -> None:
        provider = atheris.FuzzedDataProvider(data)
        kind = provider.ConsumeIntInRange(0, 4)
        try:
            if kind == 0:
                path.write_bytes(provider.ConsumeBytes(4096))
                records.read_cells(path)
            elif kind == 1:
                at = provider.ConsumeIntInRange(0, len(row))
                path.write_bytes(row + row[:at] + provider.ConsumeBytes(64) + row[at:])
                records.read_cells(path)
            elif kind == 2:
                SweepOptions.of({"batch_sizes": provider.ConsumeUnicode(64)})
            elif kind == 3:
                find_card(provider.ConsumeUnicode(64))
            else:
                resolve_variant(provider.ConsumeUnicode(64))
        except BadInput as error:
            if "\n" in str(error):
                raise RuntimeError("more than one line") from error

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
