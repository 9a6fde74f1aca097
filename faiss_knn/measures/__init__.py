"""What lists of neighbours say: pure functions from distances, indices and labels to numbers.

They are called in offline/record.py (of lists) and offline/accuracy.py (of votes), in offline/relevance.py, compare.py,
verify.py and the files of an audit, and while training in online/diagnostics.py.
"""
