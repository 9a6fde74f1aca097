"""From neighbours to class scores."""
