"""`snr train` for `ray job submit --working-dir . -- python jobs/train.py ...`; same arguments."""

import sys

from snr_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
