"""The names that arguments take, in one place that a command line can list at once: it imports nothing."""

DISTANCES = ("euclidean", "squared_euclidean", "cosine", "manhattan", "dot")
WEIGHTINGS = ("inverse", "softmax", "uniform")
SPECS = ("flat", "ivf", "fast", "auto")  # of indexes, beside the factory strings of FAISS
