"""`snr bench` as a Ray job: ray job submit --working-dir . -- python jobs/bench.py ..."""

import sys

from snr_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
