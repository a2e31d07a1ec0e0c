"""``python tests/mutation/general.py``: blind mutations, and how many of them the tests notice.

Tries a seeded sample (``--sample N``, or ``--all``) of the small changes that ``sites.py`` finds, and prints the score
and the survivors. A survivor must be explained in ``survivors.md`` (a change that nobody could observe), else the exit
status is 1: then either a test is missing, or the code says more than it needs.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from sites import apply_site, known_survivors, sample_sites, sites
from workshop import Workshop


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="mutants at a time")
    parser.add_argument("--sample", type=int, default=100, metavar="N", help="how many mutations to try")
    parser.add_argument("--all", action="store_true", help="try every one; takes long")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--only", default="", metavar="WORDS", help="only mutations whose name contains this")
    options = parser.parse_args()
    explained = known_survivors()
    num_killed, unexplained = 0, []
    with Workshop() as workshop:
        everything = [site for site in sites(workshop.library) if options.only in site.name]
        chosen = everything if options.all else sample_sites(everything, options.sample, options.seed)
        workshop.judge_unchanged()
        mutants = [(site.name, partial(apply_site, site)) for site in chosen]
        for verdict in workshop.judge_all(mutants, num_workers=options.workers):
            verdict.report()
            num_killed += verdict.killed
            if not verdict.killed and verdict.name not in explained:
                unexplained.append(verdict.name)
    share = num_killed / max(1, len(chosen))
    sys.stdout.write(
        f"{num_killed} of {len(chosen)} mutations were killed ({share:.1%}); {len(everything)} are possible\n"
    )
    for name in unexplained:
        sys.stdout.write(f"survived, and not explained in survivors.md: {name}\n")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
