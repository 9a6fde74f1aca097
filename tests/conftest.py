import os
from collections.abc import Iterator

import pytest
import torch
from loguru import logger
from threadpoolctl import threadpool_limits


def pytest_configure(config: pytest.Config) -> None:
    """Give each of several workers, and what they start, one thread, so that none waits for another's core."""
    if hasattr(config, "workerinput"):
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
        threadpool_limits(1)


# What takes more than two seconds altogether, by the beginning of its name; decorators do the same for one test.
SLOW = (
    "distributed",
    "measures/test_paired.py::test_a_difference_that_is_zero_is_rarely_called_one",
    "offline/test_audit.py::test_as_many_wrong_labels_are_found_as_the_documentation_says",
    "offline/test_audit.py::test_novelty_is_the_kth_distance_between_unit_vectors_and_tells_outliers",
    "offline/test_cli.py::test_each_way_to_start_it_is_one_program",
    "offline/test_cli.py::test_names_and_signs_survive_any_locale",
    "offline/test_cli.py::test_what_makes_a_number_suspect_is_said_on_stderr",
    "offline/test_cli.py::test_what_was_done_before_a_cut_is_kept_and_not_done_again",
    "offline/test_compression.py::test_a_results_folder_takes_them_up_again_and_the_report_shows_them",
    "offline/test_evaluate.py::test_a_bank_on_disk_is_searched_in_less_memory_than_it_takes",
    "offline/test_explain.py::test_what_is_given_is_tried_and_listed_whatever_the_protocols_have",
    "offline/test_extract.py::test_killed_at_each_write_nothing_is_doubled_or_lost",
    "offline/test_features.py::test_a_reader_that_is_not_installed_is_named",
    "offline/test_report.py::test_the_page_in_a_browser",
    "offline/test_results_folder.py",
    "online/test_rows_together.py::test_at_whichever_line_a_step_stops_its_rows_are_all_kept_or_none",
    "search/test_faiss_library.py",
    "search/test_bounds.py::test_no_row_scores_below_the_least_score_of_its_distance",
    "search/test_index.py::test_factory_strings_measure_what_they_find",
    "search/test_index.py::test_float64_rows_whose_squares_float64_cannot_hold",
    "search/test_index.py::test_same_bits_at_any_batch_chunk_position_and_thread_count",
    "search/test_index.py::test_several_threads_search_one_index",
    "search/test_index.py::test_the_distances_of_fast_are_good_to_1e_5_at_any_scale",
    "search/test_inner_product.py::test_no_row_scores_below_the_least_score_of_its_distance",
    "search/test_memory.py",
    "search/test_specs.py",
    "test_benchmark.py",
    "test_docs.py",
    "test_entrances.py",
    "test_examples.py",
    "test_imports.py::test_a_plain_loop_loads_no_lightning",
    "test_lazy_imports.py",
    "test_notebook.py",
    "test_readme.py",
    "test_sklearn.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow, and begin with it: of several workers none ends with a long test alone."""
    for item in items:
        if item.nodeid.startswith(tuple(f"tests/{name}" for name in SLOW)):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """PyTorch and the BLAS libraries on two threads, for what one alone could not break."""
    before = torch.get_num_threads()
    with threadpool_limits(2):
        torch.set_num_threads(2)
        yield
    torch.set_num_threads(before)


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """The messages of loguru at WARNING and above."""
    messages: list[str] = []
    sink = logger.add(lambda message: messages.append(message.record["message"]), level="WARNING")
    yield messages
    logger.remove(sink)
