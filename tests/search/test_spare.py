import pytest

from faiss_knn.search.spare import Spare


def test_starts_with_as_many_as_the_neighbours_and_twenty_at_least():
    assert Spare(5, 100).count == 20
    assert Spare(200, 100).count == 200


def test_goes_down_to_what_queries_need():
    spare = Spare(200, price=1000)
    spare.learn([8] * 100)
    assert spare.count == 200  # too few to tell
    spare.learn([10] * 200)
    assert 10 <= spare.count <= 12


@pytest.mark.parametrize("times", [1, 10])
def test_goes_up_where_candidates_do_not_suffice_but_not_without_end(times):
    spare = Spare(20, price=1000)
    for _ in range(times):
        before = spare.count
        spare.learn([before + 1] * 300)
        assert before < spare.count <= 80 or before == spare.count == 80


@pytest.mark.parametrize(("price", "least", "most"), [(10_000, 18, 25), (10, 5, 7)])
def test_a_few_queries_are_left_to_the_second_pass_where_that_is_cheaper(price, least, most):
    spare = Spare(20, price)
    spare.learn([5] * 295 + [18] * 5)
    assert least <= spare.count <= most
