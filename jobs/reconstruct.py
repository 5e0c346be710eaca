"""`snr reconstruct` as a Ray job: ray job submit -- python jobs/reconstruct.py ..."""

import sys

from snr_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["reconstruct", *sys.argv[1:]]))
