"""What lists of neighbours say: pure functions from distances, indices and labels to numbers."""
