"""`snr sweep` for `ray job submit --working-dir . -- python jobs/sweep.py ...`; same arguments."""

import sys

from snr_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
