#!/usr/bin/env python
"""`faiss-knn eval`, without installation: python scripts/index_eval.py BANK QUERIES [options]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs without installation

from faiss_knn.offline.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
