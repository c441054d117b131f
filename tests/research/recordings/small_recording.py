"""``python -m research.recordings`` with few held-out examples, on which most of its time goes otherwise."""

import sys

from research.recordings import __main__ as worker
from research.recordings import record

HELD_OUT = 128

if __name__ == "__main__":
    record._HELD_OUT = HELD_OUT
    sys.exit(worker.main())
