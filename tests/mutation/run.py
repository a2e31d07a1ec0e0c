"""``python tests/mutation/run.py``: every named mistake must be noticed by the tests.

The unchanged library must pass, every mutation must still apply, and every mutant must be killed; else the exit status
is 1. ``--only WORDS`` tries those whose name contains the words.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from named import NAMED, MutationDoesNotApply
from workshop import Workshop


def check_that_all_apply(workshop: Workshop) -> None:
    """A list that is out of date is an error, found before the first mutant is tried.

    Raises:
        MutationDoesNotApply: a text is not there exactly once, or two mutations have one name.
    """
    if len({mutation.name for mutation in NAMED}) != len(NAMED):
        raise MutationDoesNotApply("two mutations have the same name")
    with workshop.copy() as folder:
        for mutation in NAMED:
            changed = folder / "scheduler" / mutation.path
            before = changed.read_bytes()
            mutation.apply(folder / "scheduler")
            compile(changed.read_text(encoding="utf-8"), mutation.name, "exec")
            changed.write_bytes(before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="mutants at a time")
    parser.add_argument("--only", default="", metavar="WORDS", help="only mutations whose name contains this")
    options = parser.parse_args()
    chosen = [mutation for mutation in NAMED if options.only in mutation.name]
    survivors = []
    with Workshop() as workshop:
        check_that_all_apply(workshop)
        workshop.judge_unchanged()
        for verdict in workshop.judge_all([(m.name, m.apply) for m in chosen], num_workers=options.workers):
            verdict.report()
            if not verdict.killed:
                survivors.append(verdict.name)
    sys.stdout.write(f"{len(chosen) - len(survivors)} of {len(chosen)} named mutations were killed\n")
    for name in survivors:
        sys.stdout.write(f"survived: {name}\n")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
