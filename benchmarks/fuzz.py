"""The properties of `tests/test_properties.py` with many more examples.

    python benchmarks/fuzz.py --examples 5000

Writes `benchmarks/results/fuzz.json`: examples, seconds of the slowest one and the memory that the
process took on top of what it had after importing, or what failed.
"""

from __future__ import annotations

import argparse
import inspect
import json
import shutil
import sys
import time
import traceback
from pathlib import Path

from hypothesis import HealthCheck, settings

from bara.machine import versions

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "fuzz.json"


def main() -> None:
    """Runs every property and writes what came of it; exits with 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=5000, help="of each property")
    arguments = parser.parse_args()
    settings.register_profile(
        "fuzz",
        max_examples=arguments.examples,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    settings.load_profile("fuzz")
    sys.path.insert(0, str(HERE.parent / "tests"))
    import test_properties as properties

    failures = {}
    before = properties.peak_mebibytes()
    start = time.perf_counter()
    for name, test in inspect.getmembers(properties, inspect.isfunction):
        if not name.startswith("test_"):
            continue
        try:
            test()
        except BaseExceptionGroup as errors:
            failures[name] = [repr(error) for error in errors.exceptions]
        except Exception as error:
            traceback.print_exc()
            failures[name] = [repr(error)]
        print(f"{name}: {'FAILED' if name in failures else 'ok'}", flush=True)
    content = {
        "examples_of_each_property": arguments.examples,
        "examples": properties.examples,
        "slowest_seconds": {name: round(s, 3) for name, s in properties.slowest.items()},
        "memory_mib": round(properties.peak_mebibytes() - before, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "failures": failures,
        "versions": versions(),
    }
    RESULTS.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    shutil.rmtree(properties.FOLDER, ignore_errors=True)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
