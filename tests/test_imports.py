"""Files import one way: a reader who goes down never comes back to where they were."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent


def imports() -> dict[str, set[str]]:
    """What each file of the package imports from it, inside functions too; the lazy front door is left out."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in (ROOT / "faiss_knn").rglob("*.py")
        if path.name != "__init__.py"
    }
    graph = {}
    for name, path in files.items():
        wanted: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                wanted |= {node.module, *(f"{node.module}.{part.name}" for part in node.names)}
            elif isinstance(node, ast.Import):
                wanted |= {part.name for part in node.names}
        graph[name] = (wanted & files.keys()) - {name}
    return graph


def test_no_file_imports_itself_by_way_of_others() -> None:
    graph = imports()
    assert graph["faiss_knn.offline.report.report"] >= {
        "faiss_knn.offline.report.publish",
        "faiss_knn.offline.report.content",
    }
    TopologicalSorter(graph).prepare()  # names the circle, if there is one
