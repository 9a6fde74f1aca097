"""Files import one way: a reader who goes down never comes back to where they were."""

import ast
import subprocess
import sys
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


def test_commands_are_the_top_floor() -> None:
    room = "faiss_knn.offline.commands."
    users = {name for name, wanted in imports().items() if any(file.startswith(room) for file in wanted)}
    assert {name for name in users if not name.startswith(room)} == {"faiss_knn.offline.cli"}
    cli_users = {name for name, wanted in imports().items() if "faiss_knn.offline.cli" in wanted}
    assert cli_users == {"faiss_knn.__main__"}


PLAIN_LOOP = """
import sys
import torch
import faiss_knn
knn = faiss_knn.OnlineEvaluator("knn", "embedding", "label", 8, k=1, num_classes=2)
for _ in range(2):
    knn.observe(embedding=torch.eye(2), label=torch.tensor([0, 1]))
knn.start()
assert knn.score(embedding=torch.eye(2), label=torch.tensor([0, 1])).argmax(1).tolist() == [0, 1]
assert knn.finish() == {}
knn.load_state_dict(knn.state_dict())
print(*{name.split(".")[0] for name in sys.modules})
"""


def test_a_plain_loop_loads_no_lightning() -> None:
    done = subprocess.run([sys.executable, "-c", PLAIN_LOOP], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = set(done.stdout.split())
    assert "faiss_knn" in loaded
    assert not loaded & {"lightning", "pytorch_lightning", "lightning_fabric"}
