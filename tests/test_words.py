from eqm.words import counted


def test_one_is_not_told_as_many():
    assert [counted(n, "move") for n in (0, 1, 2, 1797)] == [
        "0 moves",
        "1 move",
        "2 moves",
        "1,797 moves",
    ]
    assert [counted(n, "class", "classes") for n in (1, 2)] == ["1 class", "2 classes"]
