"""`python -m faiss_knn` is the `faiss-knn` program."""

import sys

from faiss_knn.offline.cli import main

if __name__ == "__main__":
    sys.exit(main())
