"""``python -m fxcompress.bench``: the same as ``fxcompress bench``."""

from __future__ import annotations

import sys

from fxcompress.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
