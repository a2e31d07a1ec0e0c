"""``python tests/mutation/run.py``: does the suite notice mistakes?

Without options: every named mutation must be killed, and the unchanged library must pass. With ``--sample N``: a
seeded sample of blind mutations beside it (or alone, with ``--only-sample``), its score printed and its survivors listed.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from generic import apply_site, known_survivors, sample_sites
from named import NAMED, MutationDoesNotApply
from workshop import ROOT, Verdict, copy_of_the_library, judge, judge_all


def report(verdict: Verdict) -> None:
    """One line per mutant."""
    word = "killed  " if verdict.killed else "SURVIVED"
    sys.stdout.write(f"{word} {verdict.seconds:5.1f} s  {verdict.name}\n")
    if verdict.killed:
        sys.stdout.write(f"{'':18}by {verdict.by.removeprefix('FAILED ').removeprefix('tests/scheduler/')}\n")
    sys.stdout.flush()


def run_named(num_workers: int, word: str) -> bool:
    """Every named mutation must apply and be killed."""
    chosen = [mutation for mutation in NAMED if word in mutation.name]
    if len({mutation.name for mutation in NAMED}) != len(NAMED):
        raise MutationDoesNotApply("two mutations have the same name")
    for mutation in chosen:  # all must apply before the first is tried
        with copy_of_the_library() as folder:
            mutation.apply(folder / "scheduler")
    survivors = []
    for verdict in judge_all([(m.name, m.apply) for m in chosen], num_workers=num_workers):
        report(verdict)
        if not verdict.killed:
            survivors.append(verdict.name)
    sys.stdout.write(f"{len(chosen) - len(survivors)} of {len(chosen)} named mutations were killed\n")
    return not survivors


def run_sample(num_workers: int, size: int, seed: int) -> bool:
    """Blind mutations: survivors must be explained in survivors.md."""
    sites = sample_sites(ROOT / "scheduler", size, seed)
    explained = known_survivors()
    num_killed, unexplained = 0, []
    for verdict in judge_all([(site.name, partial(apply_site, site)) for site in sites], num_workers=num_workers):
        report(verdict)
        num_killed += verdict.killed
        if not verdict.killed and verdict.name not in explained:
            unexplained.append(verdict.name)
    sys.stdout.write(
        f"score: {num_killed} of {len(sites)} sampled mutations were killed ({num_killed / len(sites):.1%})\n"
    )
    for name in unexplained:
        sys.stdout.write(f"not explained in survivors.md: {name}\n")
    return not unexplained


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="named mutations whose name contains this")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="how many blind mutations to try")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--only-sample", action="store_true", help="leave the named mutations out")
    options = parser.parse_args()
    unchanged = judge("the unchanged library", lambda _folder: None)
    if unchanged.killed:
        sys.stdout.write(f"the unchanged library fails its own tests: {unchanged.by}\n")
        return 1
    fine = True
    if not options.only_sample:
        fine = run_named(options.workers, options.only)
    if options.sample:
        fine = run_sample(options.workers, options.sample, options.seed) and fine
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
