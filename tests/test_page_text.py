"""Tests panels of labels, images, slices and recipe: facts, and names shown as text."""

import base64
import json
import re
from dataclasses import replace

import pytest
from small_runs import constant, slice_metrics
from test_label_table import EVIL, labels_of, map_of
from test_page import CONFIG, HISTORY, STAGES, Reader, make_metrics, summary

from jaxii.evaluation.details import Details, Gallery, ShownImage
from jaxii.evaluation.result import Bootstrap
from jaxii.report.page import render, templates

JPEG = b"\xff\xd8 not really an image"
RTL = "\u202egpj.exe"


def image(**changes):
    facts = {
        "image_id": "0123abcd",
        "slice": "highland",
        "f2": 0.25,
        "right": ("Cat",),
        "missed": ("Boat",),
        "wrong": tuple(f"wrong {i}" for i in range(30)),
        "jpeg": JPEG,
    }
    return ShownImage(**facts | changes)


def details(count=30, **changes):
    gallery = Gallery(split="test", best=(image(f2=0.9),), worst=(image(f2=0.1),))
    parts = {"labels": labels_of(count), "label_map": map_of(count), "gallery": gallery}
    return Details(**parts | changes)


def page(found=None, *, metrics=None, recipe=None):
    return render(
        "run",
        metrics or make_metrics(),
        history=HISTORY,
        config=CONFIG,
        stages=STAGES,
        details=found or details(),
        recipe=recipe,
    )


@pytest.fixture(scope="module")
def full():
    return page()


def test_a_whole_page_is_well_formed_and_fetches_nothing(full):
    read = Reader(full)
    assert len(set(read.ids)) == len(read.ids)
    assert all(url.startswith(("#", "data:")) for url in read.urls)
    assert "http:" not in full
    assert "https:" not in full
    assert full.count("<table") == full.count("<caption>")
    assert full.count("<svg") == full.count('role="img"') == 5


def test_every_section_of_the_navigation_is_on_the_page(full):
    read = Reader(full)
    targets = re.findall(r'<li><a href="#([^"]+)">', full)
    assert len(targets) > 8
    assert set(targets) <= set(read.ids)


def test_the_policy_of_the_page_runs_its_own_script_and_no_other(full):
    scripts = re.findall(r"<script>(.*?)</script>", full, re.DOTALL)
    assert len(scripts) == 1
    assert f"script-src '{templates().globals['script_hash']}'" in full
    assert "unsafe-eval" not in full


def test_the_labels_of_the_script_are_those_of_the_table(full):
    text = re.search(r'id="label-data">(.*?)</script>', full, re.DOTALL)[1]
    data = json.loads(text)
    assert data["names"] == list(labels_of(30).vocabulary.descriptions)
    assert data["names"][0] == EVIL
    assert len(data["columns"]) == 8
    assert {len(column["values"]) for column in data["columns"]} == {30}


def test_hostile_names_are_text_everywhere_and_do_not_turn_their_neighbours():
    slices = {EVIL: slice_metrics(0.2, 3, 0.1), RTL: slice_metrics(0.2, 3, 0.1)}
    gallery = Gallery(
        split=EVIL,
        best=(),
        worst=(image(image_id=EVIL, slice=RTL, right=(EVIL,), missed=(RTL,)),),
    )
    metrics = make_metrics(
        splits={"test": summary(0.4, 0.4, slices=slices)},
        constant=constant({"test": 0.2}, (EVIL, RTL)),
    )
    text = page(
        details(gallery=gallery),
        metrics=metrics,
        recipe={"name": EVIL, "own": {"seed": EVIL}},
    )
    # Only its own script and data; names add no tags or attributes.
    assert text.count("<script") == 2
    assert text.count("</script") == 2
    assert Reader(text).tags <= Reader(page()).tags
    assert "\\u003c/script\\u003e" in text
    body = re.sub(r"<(script|svg).*?</\1>", "", text, flags=re.DOTALL)
    assert body.count(RTL) == body.count(f"<bdi>{RTL}</bdi>") > 2


def test_images_stand_with_their_labels_the_worst_first(full):
    part = full[full.index('id="images"') :]
    assert part.index("F2 0.10") < part.index("F2 0.90")
    assert base64.b64encode(JPEG).decode() in part
    for kind in ("right", "missed", "wrong"):
        assert f'class="kind {kind}"><span class="unseen">{kind}: </span>' in part
    assert "and 22 more wrong" in part


def test_an_image_that_cannot_be_read_is_listed_without_a_image():
    gallery = Gallery(split="test", best=(), worst=(image(jpeg=b""),))
    text = page(details(gallery=gallery))
    assert "no image" in text
    assert "data:image" not in text


def with_intervals():
    slices = {
        "coast": slice_metrics(0.5, 7, interval=[0.45, 0.56]),
        "highland": slice_metrics(0.3, 9, interval=[0.21, 0.4]),
    }
    draws = Bootstrap(by="group", level=0.95, resamples=1000)
    found = summary(0.4, 0.4, slices=slices)
    return replace(found, interval=[0.35, 0.44], bootstrap=draws)


def test_slices_have_their_intervals_the_worst_first_and_the_method_is_said():
    text = page(metrics=make_metrics(splits={"test": with_intervals()}))
    part = text[text.index('id="slices"') : text.index('id="labels"')]
    assert part.index("highland") < part.index("0.210 to 0.400") < part.index("coast")
    assert "1,000 seeded bootstrap resamples of whole groups of images" in part
    assert "95% interval 0.350 to 0.440" in text[: text.index('id="slices"')]
    # The scale is from 0.2 to 0.6, so 0.3 is at a quarter.
    assert 'class="dot" style="left:25.0%"' in part


def test_no_tuning_curve_and_no_tuning_column_unless_tuning_was_scored(full):
    assert ">tuning<" not in full
    splits = {n: summary(0.4, 0.4) for n in ("validation", "tuning", "test")}
    text = page(metrics=make_metrics(splits=splits))
    figure = text[text.index('id="threshold"') : text.index('id="slices"')]
    assert ">tuning<" in figure


def test_what_differs_from_the_recipe_is_listed_and_equal_values_are_not():
    own = {"model.depth": 50, "seed": 0}
    text = page(recipe={"name": "configs/f2_multitask.py", "own": own})
    part = text[text.index('id="configuration"') : text.index("<summary>All")]
    assert re.search(r"model\.depth</th><td><bdi>50</bdi></td><td><bdi>18</bdi>", part)
    assert ">seed<" not in part
    same = page(recipe={"name": "configs/f2_multitask.py", "own": {}})
    assert "All fields are those of the recipe" in same
    assert "was not recorded" in page()


def test_a_report_of_7178_classes_is_light():
    assert len(page(details(7178)).encode()) < 2_000_000
