"""Tests some saves while disks fill up, permissions change and processes are killed."""

from tests.benchmarks import failing_saves


def test_what_is_listed_restores_whatever_happened_to_the_saves(tmp_path):
    counts, wrong = failing_saves.rehearse(tmp_path, saves=8)
    assert not wrong
    assert counts["listed"] == counts["restored"] > 0
    assert all(counts[kind] == 2 for kind in failing_saves.KINDS[1:])
