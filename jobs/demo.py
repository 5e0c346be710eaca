"""`snr demo` as a Ray job: ray job submit --working-dir . -- python jobs/demo.py ..."""

import sys

from snr_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
