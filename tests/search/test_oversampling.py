import pytest

from faiss_knn.search.engines.oversampling import Oversampling

DEAR, CHEAP = (
    {"candidate": 1.0, "second_pass": 1000.0, "query": 1000.0},
    {"candidate": 1.0, "second_pass": 1, "query": 1},
)


def learn_often(spare, needed, times=50):
    for _ in range(times):
        spare.learn(needed)


def test_starts_with_as_many_as_the_neighbours_and_some_at_least():
    assert Oversampling(5, **DEAR).count == 32
    assert Oversampling(200, **DEAR).count == 200


def test_goes_down_to_what_queries_need():
    spare = Oversampling(200, **DEAR)
    spare.learn([8] * 100)
    assert spare.count == 200  # too few to tell
    spare.learn([10] * 200)
    assert 170 < spare.count < 200  # others may need more
    learn_often(spare, [10] * 300)
    assert 10 <= spare.count <= 20


def test_goes_up_at_once_and_down_by_and_by():
    spare = Oversampling(20, **DEAR)
    counts = []
    for needed in [10, 32, *[10] * 7]:
        spare.learn([needed] * 300)
        counts.append(spare.count)
    assert counts == [28, 44, 38, 33, 28, 24, 21, 18, 16]  # the need, and a quarter and four more


def test_knows_what_half_of_the_queries_need():
    spare = Oversampling(20, **DEAR)
    assert spare.usual == 0
    spare.learn([7] * 150 + [30] * 140)
    assert spare.usual == 7
    spare.learn([-5] * 300)
    assert spare.usual == 0


def test_begins_anew_with_as_many_as_at_first():
    spare = Oversampling(20, **DEAR)
    learn_often(spare, [3] * 300)
    spare.learn([3] * 200)  # which are forgotten
    spare.begin_anew()
    assert spare.count == spare.first == 32
    spare.learn([30] * 100)
    assert spare.count == 32
    learn_often(spare, [100] * 300)
    more = spare.count
    spare.begin_anew()
    assert spare.count == more > spare.first


def test_copies_of_what_was_found_leave_no_fewer_candidates_than_neighbours():
    spare = Oversampling(20, **DEAR)
    learn_often(spare, [-18] * 300)
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
    learn_often(dear, needed)
    learn_often(cheap, needed)
    assert dear.count > 18
    assert cheap.count == 5


def test_queries_of_one_chunk_share_their_second_pass():
    together, apart = (Oversampling(20, candidate=1.0, second_pass=2000.0, query=0.0) for _ in range(2))
    learn_often(together, [5] * 295 + [18] * 5)
    learn_often(apart, [5] * 59 + [18], times=250)
    assert together.count == 5
    assert apart.count > 18


def test_says_what_candidates_and_second_passes_cost_a_query():
    spare, cheap = Oversampling(20, **DEAR), Oversampling(20, **CHEAP)
    assert spare.seconds == 0
    spare.learn([10] * 300)
    assert spare.seconds == 10
    cheap.learn([5] * 295 + [18] * 5)
    assert cheap.seconds == 5 + (1 + 5) / 300
