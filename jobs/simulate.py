"""`snr simulate` as a Ray job: ray job submit --working-dir . -- python jobs/simulate.py ..."""

import sys

from snr_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["simulate", *sys.argv[1:]]))
