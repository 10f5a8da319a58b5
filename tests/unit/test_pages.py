"""The environment that a worker computes in."""

from app.core.pages import huge_pages


def test_the_c_library_is_asked_for_huge_pages_beside_what_else_it_is_asked_for():
    assert huge_pages({"A": "b"}) == {"A": "b", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    asked = {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}
    assert huge_pages(asked) == {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"}


def test_what_the_operator_says_of_huge_pages_stays():
    asked = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    assert huge_pages(asked) == asked
