"""The saved-features side: files in, reports out."""
