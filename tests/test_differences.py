"""Of two configurations, only what differs is shown, in its smallest part."""

from jaxii.report.differences import MAX_VALUE, differences, shorten


def stages(*terms):
    return {"stages": [{"name": f"s{i}", "terms": t} for i, t in enumerate(terms)]}


def test_equal_configurations_do_not_differ():
    assert differences([stages({"bce": 1.0}), stages({"bce": 1})]) == {}


def test_a_tiny_difference_is_a_difference():
    found = differences([{"lr": 0.1}, {"lr": 0.1000000001}])
    assert found == {"lr": ["0.1", "0.1000000001"]}


def test_of_a_stage_only_the_differing_leaf_is_named():
    ramp = [[0.0, 1.0], [0.4, 0.0]]
    found = differences(
        [stages({"bce": 1.0, "asl": 0}), stages({"bce": ramp, "asl": 0})]
    )
    assert found == {"stages[0].terms.bce": ["1", "(0, 1), (0.4, 0)"]}


def test_a_field_that_one_lacks_is_absent():
    assert differences([{"a": 1, "b": 2}, {"a": 1}]) == {"b": ["2", "-"]}


def test_a_stage_that_one_lacks_is_one_field():
    found = differences([stages({"bce": 1.0}, {"soft_f": 1.0}), stages({"bce": 1.0})])
    assert found == {"stages[1]": ["name: s1, terms: (soft_f: 1)", "-"]}


def test_a_part_that_one_lacks_and_others_differ_in_is_many():
    focal = [{"gamma": gamma, "alpha": None} for gamma in (2.0, 3.0)]
    trees = [stages({"focal": focal[0]}), stages({"focal": focal[1]}), stages({})]
    assert differences(trees) == {
        "stages[0].terms.focal.gamma": ["2", "3", "-"],
        "stages[0].terms.focal.alpha": ["none", "none", "-"],
    }


def test_a_plain_value_against_a_part_is_one_field():
    found = differences([{"bce": 1.0}, {"bce": {"weight": 1.0, "gamma": 2.0}}])
    assert found == {"bce": ["1", "weight: 1, gamma: 2"]}


def test_a_long_value_keeps_both_ends():
    text = f"/start/{'x' * 200}/end"
    short = shorten(text)
    assert len(short) == MAX_VALUE
    assert short.startswith("/start/x")
    assert short.endswith("x/end")
    assert shorten("short") == "short"
