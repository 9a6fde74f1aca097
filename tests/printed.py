"""What documents show: their Python blocks, and whether what these print is what stands below them."""

import re

import numpy as np

_BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\s*^```text\n(.*?)^```)?", re.DOTALL | re.MULTILINE)
_NUMBER = re.compile(r"\d+\.\d+")


def python_blocks(text: str) -> list[tuple[str, str]]:
    """Each Python block, and the text block right below it, "" where there is none."""
    return [(match[1], match[2] or "") for match in _BLOCK.finditer(text)]


def assert_printed(shown: str, expected: str) -> None:
    """Hold what was printed to what is said: word for word, decimal numbers to 0.05, as training differs a little."""
    assert _NUMBER.sub("#", shown) == _NUMBER.sub("#", expected)
    values = [[float(x) for x in _NUMBER.findall(text)] for text in (shown, expected)]
    np.testing.assert_allclose(*values, atol=0.05)
