"""`snr denoise` for `ray job submit --working-dir . -- python jobs/denoise.py ...`; same arguments."""

import sys

from snr_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["denoise", *sys.argv[1:]]))
