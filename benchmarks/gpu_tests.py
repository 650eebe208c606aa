"""Run the tests that need a GPU, and record that they ran: with which kernels, on what, how many passed.

    python benchmarks/gpu_tests.py [--commit ID] [-- arguments of pytest, such as which files]

CI has no GPU, so `tests/test_gpu_record.py` compares the record with the kernels as they are, and says when they have
changed since. The exit status is pytest's; a run that tests nothing leaves no record.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

import common

SUITE = "gpu_tests"
KERNELS = common.ROOT / "minillm" / "kernels"
RESULTS = common.ROOT / "benchmarks" / "results"


def digest(folder: Path = KERNELS) -> str:
    """SHA-256 of all Python files below `folder`: their names and contents, in the order of the names."""
    total = hashlib.sha256()
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    for name in sorted(files):
        content = files[name].read_bytes()
        total.update(f"{name}\0{len(content)}\0".encode() + content)
    return total.hexdigest()


def counts(junit: str) -> dict[str, int]:
    """What pytest's JUnit report says: passed, failed (errors too), skipped. Raises ValueError for no report."""
    try:
        suites = list(ET.fromstring(junit).iter("testsuite"))
        total, failures, errors, skipped = (
            sum(int(suite.attrib[name]) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
        )
    except (ET.ParseError, KeyError, ValueError) as error:
        raise ValueError(f"junit: expected pytest's report, got {junit!r:.60} ({error})") from None
    failed = failures + errors
    return {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}


def outdated(records: list[dict], now: str) -> str | None:
    """Why no record speaks for kernels of this digest: nobody ran them, or tests failed; None: one does."""
    if not records:
        return "the tests that need a GPU were never recorded"
    mine = [record for record in records if record["results"]["kernels"] == now]
    if any(record["results"]["failed"] == 0 and record["results"]["passed"] > 0 for record in mine):
        return None
    latest = max(mine or records, key=lambda record: record["provenance"]["date"])
    p, where = latest["provenance"], latest["results"]
    ran = f"({p['device']}, {p['date']}, commit {p['commit']}: {where['passed']} passed, {where['failed']} failed)"
    return (
        f"tests of these kernels failed on a GPU {ran}" if mine else f"the kernels are newer than their GPU tests {ran}"
    )


def load_records(folder: Path = RESULTS) -> list[dict]:
    """The records of all devices."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"*/{SUITE}.json"))]


def main() -> int:
    """Run, record, and give pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--commit", help="of the code, where there is no .git to ask")
    parser.add_argument("pytest", nargs="*", help="more arguments for pytest, after --")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        parser.error("expected a CUDA GPU, found none")
    before = digest()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        paths = [] if any(x.startswith("tests") for x in args.pytest) else ["tests"]
        command = [sys.executable, "-m", "pytest", *paths, "-m", "gpu", f"--junitxml={report}", *args.pytest]
        status = subprocess.run(command, cwd=common.ROOT).returncode
        found = counts(report.read_text(encoding="utf-8") if report.is_file() else "")
    if not found["passed"] + found["failed"]:
        print(f"no test ran (pytest's exit status: {status}); nothing is recorded", file=sys.stderr)
        return status or 1
    if digest() != before:
        print("the kernels changed while their tests ran; nothing is recorded", file=sys.stderr)
        return 1
    path = common.record(SUITE, {"kernels": before, **found}, ("torch", "triton", "pytest", "hypothesis"))
    if args.commit:
        document = json.loads(path.read_text(encoding="utf-8"))
        document["provenance"]["commit"] = args.commit
        path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{found} -> {path}")
    return status


if __name__ == "__main__":
    sys.exit(main())
