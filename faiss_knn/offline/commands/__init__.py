"""The commands of the `faiss-knn` program: what each takes, does and prints."""
