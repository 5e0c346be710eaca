"""`snr plan` as a Ray job: ray job submit --working-dir . -- python jobs/plan.py ..."""

import sys

from snr_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
