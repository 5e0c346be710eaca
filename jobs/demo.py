"""`snr demo` for `ray job submit --working-dir . -- python jobs/demo.py ...`; same arguments."""

import sys

from snr_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
