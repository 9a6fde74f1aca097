import pytest

from faiss_knn.search.engines.oversampling import Oversampling

DEAR, CHEAP = (
    {"candidate": 1.0, "second_pass": 1000.0, "query": 1000.0},
    {"candidate": 1.0, "second_pass": 1, "query": 1},
)


def test_starts_with_as_many_as_the_neighbours_and_some_at_least():
    assert Oversampling(5, **DEAR).count == 32
    assert Oversampling(200, **DEAR).count == 200


def test_goes_down_to_what_queries_need():
    spare = Oversampling(200, **DEAR)
    spare.learn([8] * 100)
    assert spare.count == 200  # too few to tell
    spare.learn([10] * 200)
    assert 10 <= spare.count <= 20


def test_copies_of_what_was_found_leave_no_fewer_candidates_than_neighbours():
    spare = Oversampling(20, **DEAR)
    spare.learn([-18] * 300)
    assert spare.count == 0


@pytest.mark.parametrize("times", [1, 10])
def test_goes_up_where_candidates_do_not_suffice_but_not_without_end(times):
    spare = Oversampling(20, **DEAR)
    for _ in range(times):
        before = spare.count
        spare.learn([before + 1] * 300)
        assert before < spare.count <= 128 or before == spare.count == 128


def test_a_few_queries_are_left_to_the_second_pass_where_that_is_cheaper():
    needed = [5] * 295 + [18] * 5
    dear, cheap = Oversampling(20, **DEAR), Oversampling(20, **CHEAP)
    dear.learn(needed)
    cheap.learn(needed)
    assert dear.count > 18
    assert cheap.count == 5


def test_queries_of_one_chunk_share_their_second_pass():
    together, apart = (Oversampling(20, candidate=1.0, second_pass=2000.0, query=0.0) for _ in range(2))
    together.learn([5] * 295 + [18] * 5)
    for _ in range(5):
        apart.learn([5] * 59 + [18])
    assert together.count == 5
    assert apart.count > 18
