"""`snr bench` for `ray job submit --working-dir . -- python jobs/bench.py ...`; same arguments."""

import sys

from snr_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
