"""Single values of a configuration."""

from fedknow.protocols.values import bad_values, is_finite, show, too_deep


def nested(levels):
    value = 1
    for _ in range(levels):
        value = [value]
    return value


def test_any_value_can_be_shown_and_is_short():
    for value, shown in (
        ("fast", "'fast'"),
        (2.5, "2.5"),
        (10**30, "1" + 30 * "0"),
        (10**5000, "an integer of 16610 bits"),
        ("x" * 200, "'" + "x" * 79 + "..."),
        ([10**5000], "a list that is too large to show"),
        (nested(5000), "a list that is too large to show"),
    ):
        assert show(value) == shown


def test_finite_are_texts_and_whole_numbers_and_what_holds_nothing_else():
    assert all(
        map(is_finite, [1, 0.5, "inf", True, [1, 2.5], {"a": [0.0]}, 10**400])
    )
    assert not any(
        map(
            is_finite,
            [
                float("nan"),
                float("inf"),
                [1, float("-inf")],
                {"a": {"b": float("nan")}},
            ],
        )
    )


def test_values_that_no_setting_can_have():
    tree = {
        "train": {
            "rounds": 2**63,
            "least": -(2**63),
            "most": 2**63 - 1,
            "lr": float("inf"),
        },
        "data": {
            "dir": "a\0b",
            "long": "x" * 5000,
            "bytes": "\udcff",
            "list": ["fine", 2**64],
        },
        "name": None,
    }
    assert {
        problem.partition(" = ")[0]: problem.partition(": ")[2]
        for problem in bad_values(tree)
    } == {
        "train.rounds": "must fit into 64 bits, as TOML's integers do",
        "data.dir": "must not hold a NUL character",
        "data.long": "must have at most 4096 characters",
        "data.bytes": "must be valid Unicode, so that it can be written to a file",
        "data.list.1": "must fit into 64 bits, as TOML's integers do",
        "name": "must be a number, a text, true or false; write a date in quotes",
    }


def test_depth_is_measured_without_recursion():
    assert too_deep({"a": {"b": {"c": nested(5)}}}) == ""
    assert too_deep({"a": nested(8)}).startswith(
        "a.0.0.0.0.0.0.0.0: nested more than 8 levels"
    )
    assert too_deep({"a": nested(100_000)})
