"""python -m benchmarks.fakecuda [CASE ...] prints {case: {form: counts}}; default: all."""

import json
import sys

from benchmarks.fakecuda import library


def main() -> None:
    library.load()
    from benchmarks.fakecuda.cases import CASES, count_case

    print(json.dumps({name: count_case(name) for name in sys.argv[1:] or CASES}))


if __name__ == "__main__":
    main()
