"""`snr simulate` for `ray job submit --working-dir . -- python jobs/simulate.py ...`; same arguments."""

import sys

from snr_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["simulate", *sys.argv[1:]]))
