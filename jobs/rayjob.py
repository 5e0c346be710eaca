"""`snr STAGE ...` for a RayJob, which starts a new cluster for whatever does not end with 0.

Ends with 0 too where the same command on a new cluster would end the same, and says so.
"""

import sys

from snr_ray.cli import main

FINAL = {
    2: "its input must be put right",
    3: "images that failed are in failures.parquet, doubtful ones in the manifest",
}


def once(argv: list[str]) -> int:
    """Run a stage; 0 for done and for what no retry mends, else what it ended with."""
    try:
        status = main(argv)
    except SystemExit as wrong_usage:  # of argparse
        status = int(wrong_usage.code or 0)
    if status in FINAL:
        print(f"rayjob: ended with status {status}, which no retry mends: {FINAL[status]}.")
        return 0
    return status


if __name__ == "__main__":
    sys.exit(once(sys.argv[1:]))
