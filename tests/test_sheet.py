"""Tests that the contact sheet escapes text, shows damage, and has a bounded size."""

import dataclasses
import re
from html.parser import HTMLParser

import mixed_images
import numpy as np
import pytest
import small_layout

from jaxii.data.labels import Vocabulary
from jaxii.evaluation.predictions import Answer, Facts
from jaxii.evaluation.provenance import Provenance
from jaxii.report import sheet
from jaxii.report.sheet import Sheet, SuspectImage, render_suspects

ODD = (*mixed_images.NAMES, mixed_images.NO_UTF8)
VOCABULARY = Vocabulary(tuple(f"/m/{i}" for i in range(len(ODD))), ODD)
FACTS = Facts(
    source="/photos/<b>mine</b>",
    run="step 3 of stage f2 of runs/<i>",
    provenance=Provenance().with_("thresholds", labels=["validation"]),
    constant=("/m/0",),
    constant_names=(ODD[0],),
    decoder="threshold",
    parameter={"threshold": 0.31},
)


class Page(HTMLParser):
    """The elements of a page as a browser parses them: tags, texts, those in <bdi>."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.isolated, self.open, self.attributes = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "bdi":
            self.open.append("")

    def handle_data(self, data):
        if self.open:
            self.open[-1] += data

    def handle_endtag(self, tag):
        if tag == "bdi":
            self.isolated.append(self.open.pop())


def given(row, fault="", num_labels=2):
    labels = np.arange(0 if fault else num_labels)
    probs = np.linspace(0.9, 0.1, len(ODD), dtype=np.float32)
    return Answer(row=row, label_ids=labels, probs=probs, fault=fault)


def page_of(names, answers, facts=FACTS, thumbnail=lambda row: b"a JPEG"):
    made = Sheet(len(names), names.__getitem__, VOCABULARY, thumbnail)
    assert [one.row for one in made.watch(answers)] == [one.row for one in answers]
    return made, made.render(facts)


@pytest.fixture(scope="module")
def odd():
    answers = [given(row, num_labels=len(ODD)) for row in range(len(ODD))]
    names = [f"{name}.jpg" for name in ODD]
    return page_of(names, answers)[1]


def test_names_of_files_and_labels_are_text_whatever_they_hold(odd):
    page = Page(odd)
    assert "script" not in page.tags
    assert "i" not in page.tags
    assert page.tags.count("b") == 3  # the figures of the cards
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    for name in ODD:
        shown = name
        for hidden in ("\n", "\u202e", "\udcff"):
            shown = shown.replace(hidden, repr(hidden)[1:-1])
        assert shown in page.isolated
        assert f"{shown}.jpg" in page.isolated


def test_every_name_is_isolated_from_the_text_around_it(odd):
    outside = re.sub(r"<bdi[^>]*>.*?</bdi>|title=\"[^\"]*\"", "", odd)
    for name in ("صورة", "תמונה", "smile", "alert"):
        assert name in odd and name not in outside
    assert "\u202e" not in odd


def test_a_page_needs_nothing_but_itself(odd):
    assert not re.search(r"(src|href)=\"(?!data:|#)", odd)
    assert "default-src 'none'" in odd
    assert "color-scheme: light dark" in odd


def test_the_page_is_utf8_even_of_names_that_are_not(odd, tmp_path):
    made, page = page_of(["\udcff.jpg"], [given(0)])
    made.write(tmp_path / "new" / "sheet.html", FACTS)
    assert (tmp_path / "new" / "sheet.html").read_text() == page
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sheet.html"]


def test_scores_and_the_further_labels_are_there():
    _, page = page_of(["a.jpg"], [given(0, num_labels=7)])
    assert re.search(r"--score:90\.0%.*?<span>0\.90</span>", page, re.DOTALL)
    assert "<summary>2 more</summary>" in page
    assert page.count("--score:") == 7
    assert "decoder: threshold 0.31" in page
    assert "Provenance:</span> clean" in page
    _, page = page_of(["a.jpg"], [given(0, num_labels=5)])
    assert "<summary>" not in page


def test_a_result_that_is_not_clean_says_so_first():
    record = FACTS.provenance.with_("weights", labels=["tuning"])
    facts = dataclasses.replace(FACTS, provenance=record)
    _, page = page_of(["a.jpg"], [given(0)], facts)
    assert 'class="badge bad"' in page
    assert record.caveats()[0] in page


def test_damaged_images_are_shown_as_such_and_listed(monkeypatch):
    monkeypatch.setattr(sheet, "MOST_DAMAGED_LISTED", 2)
    answers = [given(0), *(given(row, f"fault <{row}>") for row in (1, 2, 3))]
    _, page = page_of(["a.jpg", "b.jpg", "c.jpg", "d.jpg"], answers)
    assert page.count("<img") == 1
    assert page.count('<p class="missing">damaged</p>') == 3
    assert "fault &lt;3&gt;" in page
    listed = page[page.index('id="damaged"') :]
    assert "b.jpg" in listed and "c.jpg" in listed and "d.jpg" not in listed
    assert "1 more are not listed" in listed
    assert "75.0% of the images" in page
    # The figure of the one image that was read.
    assert "<b>2.00</b>" in page


def test_a_sheet_of_many_images_shows_some_evenly_and_says_so(monkeypatch):
    monkeypatch.setattr(sheet, "MOST_SHOWN", 4)
    read = []

    def thumbnail(row):
        read.append(row)
        return b"a JPEG"

    names = [f"{row}.jpg" for row in range(10)]
    _, page = page_of(names, [given(row) for row in range(10)], thumbnail=thumbnail)
    assert read == [0, 2, 5, 7]
    assert page.count("<img") == 4
    assert "4 shown below, evenly spaced" in page
    _, page = page_of(names[:4], [given(row) for row in range(4)])
    assert "all shown below" in page


def test_a_image_that_is_gone_since_keeps_its_answer():
    def thumbnail(row):
        raise ValueError("no such file")

    _, page = page_of(["a.jpg"], [given(0)], thumbnail=thumbnail)
    assert "file not found" in page
    assert page.count("--score:") == 2


def test_a_sheet_stays_small_however_many_images(monkeypatch):
    jpeg = small_layout.jpeg(100, 240, 240)

    def size(number):
        names = [f"{row}.jpg" for row in range(number)]
        answers = [given(row) for row in range(number)]
        return len(page_of(names, answers, thumbnail=lambda row: jpeg)[1])

    assert size(3_000) < 1.01 * size(sheet.MOST_SHOWN)


def test_a_sheet_of_suspects_says_what_is_wrong_and_what_is_missing(monkeypatch):
    monkeypatch.setattr(sheet, "MOST_SHOWN", 2)
    images = [
        SuspectImage(
            image_id=f"{number}<i>",
            labels=[("<b>cat", True, 0.9), ("dog", False, 0.625)],
            given=["<b>cat", "boat"] * (number > 0),
            jpeg=b"a JPEG",
        )
        for number in range(3)
    ]
    page = render_suspects(
        images, title="mine", run="run <i>", provenance=FACTS.provenance, num_found=70
    )
    elements = Page(page)
    assert not {"i", "script"} & set(elements.tags)
    assert {"0<i>", "1<i>", "<b>cat", "dog", "boat"} <= set(elements.isolated)
    assert "2<i>" not in elements.isolated
    assert page.count("wrong 0.90</span>") == page.count("missing 0.62</span>") == 2
    assert "has no label" in page
    assert "<b>6</b>" in page and "of 70 that may be" in page
    assert "the first 2 shown below" in page
