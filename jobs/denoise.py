"""`snr denoise` as a Ray job: ray job submit --working-dir . -- python jobs/denoise.py ..."""

import sys

from snr_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["denoise", *sys.argv[1:]]))
