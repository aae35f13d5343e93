from eqm.words import counted, first_of


def test_one_is_not_told_as_many():
    assert [counted(n, "move") for n in (0, 1, 2, 1797)] == [
        "0 moves",
        "1 move",
        "2 moves",
        "1,797 moves",
    ]
    assert [counted(n, "class", "classes") for n in (1, 2)] == ["1 class", "2 classes"]


def test_of_many_things_the_first_are_told_and_how_many_more():
    assert [first_of(["a", "b", "c"][:n], 2) for n in range(4)] == [
        "",
        "a",
        "a; b",
        "a; b; and 1 more",
    ]
