"""Judge features by their nearest neighbours, while a model trains and after.

The public names are imported when first used: `import faiss_knn` loads neither torch, lightning nor FAISS.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from faiss_knn.classify.bank import FeatureBank
    from faiss_knn.classify.vote import vote
    from faiss_knn.measures.retrieval import retrieval_metrics
    from faiss_knn.offline.audit import AuditReport, audit
    from faiss_knn.offline.compare import Comparison, compare
    from faiss_knn.offline.evaluate import EvalReport, evaluate
    from faiss_knn.offline.explain import explain
    from faiss_knn.offline.extract import extract
    from faiss_knn.offline.features import read_features
    from faiss_knn.offline.neighbors import exact_neighbors
    from faiss_knn.offline.verify import verify_neighbors
    from faiss_knn.online.callback import OnlineKNN
    from faiss_knn.online.evaluator import OnlineEvaluator
    from faiss_knn.online.queue import OnlineQueue, find_or_create_queue
    from faiss_knn.protocol import protocols
    from faiss_knn.search.index import KNNIndex, Neighbors

_HOMES = {
    "AuditReport": "faiss_knn.offline.audit",
    "Comparison": "faiss_knn.offline.compare",
    "EvalReport": "faiss_knn.offline.evaluate",
    "FeatureBank": "faiss_knn.classify.bank",
    "KNNIndex": "faiss_knn.search.index",
    "Neighbors": "faiss_knn.search.index",
    "OnlineEvaluator": "faiss_knn.online.evaluator",
    "OnlineKNN": "faiss_knn.online.callback",
    "OnlineQueue": "faiss_knn.online.queue",
    "audit": "faiss_knn.offline.audit",
    "compare": "faiss_knn.offline.compare",
    "evaluate": "faiss_knn.offline.evaluate",
    "exact_neighbors": "faiss_knn.offline.neighbors",
    "explain": "faiss_knn.offline.explain",
    "extract": "faiss_knn.offline.extract",
    "find_or_create_queue": "faiss_knn.online.queue",
    "protocols": "faiss_knn.protocol",
    "read_features": "faiss_knn.offline.features",
    "retrieval_metrics": "faiss_knn.measures.retrieval",
    "verify_neighbors": "faiss_knn.offline.verify",
    "vote": "faiss_knn.classify.vote",
}

__version__ = "0.1.0"
__all__ = [
    "AuditReport",
    "Comparison",
    "EvalReport",
    "FeatureBank",
    "KNNIndex",
    "Neighbors",
    "OnlineEvaluator",
    "OnlineKNN",
    "OnlineQueue",
    "audit",
    "compare",
    "evaluate",
    "exact_neighbors",
    "explain",
    "extract",
    "find_or_create_queue",
    "protocols",
    "read_features",
    "retrieval_metrics",
    "verify_neighbors",
    "vote",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'faiss_knn' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
