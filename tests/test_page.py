"""Tests that the report has the right numbers, fetches nothing and executes no name."""

import html.parser
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from small_runs import (
    constant,
    decoder_in_use,
    decoder_metrics,
    result,
    slice_metrics,
    split_metrics,
)

from jaxii.config import flatten
from jaxii.evaluation.details import StageRow
from jaxii.evaluation.provenance import Provenance
from jaxii.evaluation.result import (
    DomainShiftEstimate,
    Estimate,
    EvaluationResult,
    read_result,
)
from jaxii.report.page import render

EVIL = "<script>alert('$x_1$')</script>"
VOID = {"meta", "link", "br", "img", "hr", "input"}
THRESHOLDS = np.linspace(0.01, 0.99, 99)
CLEAN = (
    Provenance(label_hash="4f1c2a9be0d37715")
    .with_("weights", labels=["train"])
    .with_("label_embedding", labels=["train"])
    .with_("model_selection", labels=["validation"])
    .with_("thresholds", labels=["validation"])
)


def summary(f2, best, *, slices=None, embedding=True):
    curve = f2 * np.exp(-((THRESHOLDS - best) ** 2) / 0.18)
    means = np.linspace(0.02, 0.97, 15)
    decoders = {
        "threshold": decoder_metrics(f2, threshold=0.31),
        "top_k": decoder_metrics(f2 - 0.02, k=4),
        "embedding": decoder_metrics(f2 - 0.05, k=4),
    }
    if not embedding:
        del decoders["embedding"]
    return split_metrics(
        f2,
        num_images=1234,
        thresholds=THRESHOLDS.tolist(),
        f2_by_threshold=curve.tolist(),
        best_threshold=best,
        best_f2=float(curve.max()),
        map=0.5123,
        reliability=[
            [float(m), float(m**1.3), int(9e4 * 0.55**i) + 20]
            for i, m in enumerate(means)
        ],
        slices=slices
        or {
            "coast": slice_metrics(f2 + 0.031, 700, 0.0102),
            "highland": slice_metrics(f2 - 0.0414, 534, 0.0121),
        },
        decoders=decoders,
    )


def make_metrics(**changes):
    splits = {"test": summary(0.4567, 0.44), "validation": summary(0.6543, 0.31)}
    floors = {"validation": 0.3011, "tuning": 0.25, "test": 0.2222}
    facts = {
        "step": 4200,
        "provenance": CLEAN,
        "constant": constant(floors, ("/m/0sky", "/m/0tree", "/m/0water")),
        "splits": splits,
    }
    return result(**facts | changes)


def make_history(num_steps=4200, every=10):
    rng = np.random.default_rng(0)
    rows = []
    for step in range(every, num_steps + 1, every):
        stage = "warmup" if step <= 1400 else "both" if step <= 2800 else "classifier"
        ramp = min(max((step - 1400) / 700, 0.0), 1.0)
        fall = math.exp(-step / 900)
        row = {"kind": "train", "step": step, "stage": stage, "stage_step": step % 1400}
        noise = rng.normal(0, 0.05)
        row |= {
            "objective": 3.0 + 30 * fall + noise * 5,
            "loss/bce": 3.1 + 31 * fall + noise * 5,
            "weight/bce": 1.0 - ramp,
            "learning_rate": 0.1 * fall,
            "gradient_norm": 2.0,
            "images_per_second": 205 + rng.normal(0, 6),
            "input_wait_share": abs(rng.normal(0.03, 0.02)),
        }
        if step > 1400:
            row |= {"loss/focal": 0.6 + fall, "weight/focal": ramp}
            row |= {"loss/soft_f": 0.4 + fall + noise, "weight/soft_f": 2 * ramp}
        if step <= 2800:
            row |= {"loss/embedding": 0.3 + fall + noise / 3, "weight/embedding": 0.5}
        rows.append(row)
        if step % 200 == 0:
            f2 = 0.66 - 0.4 * math.exp(-step / 800) + rng.normal(0, 0.006)
            rows.append({"kind": "evaluation", "step": step, "validation/f2": f2})
    return rows


STAGES = [
    StageRow(
        name="warmup",
        first_step=0,
        last_step=1400,
        embedding_head=True,
        terms={"bce": [1.0, 1.0], "embedding": [0.5, 0.5]},
        enters_from="pretrained",
        train_step_compilations=1,
        best_step=1400,
        best_f2=0.5901,
    ),
    StageRow(
        name="both",
        first_step=1400,
        last_step=2800,
        embedding_head=True,
        terms={"bce": [1.0, 0.0], "focal": [0.0, 1.0], "embedding": [0.5, 0.5]},
        enters_from="warmup, best",
        train_step_compilations=1,
        best_step=2800,
        best_f2=0.6432,
    ),
    StageRow(
        name="classifier",
        first_step=2800,
        last_step=4200,
        embedding_head=False,
        terms={"focal": [1.0, 1.0], "soft_f": [2.0, 2.0]},
        enters_from="both, best",
        train_step_compilations=1,
        best_step=4000,
        best_f2=0.6543,
    ),
]
CONFIG = flatten(
    {
        "seed": 0,
        "data": {
            "dataset": "toy_regions",
            "image_size_pixels": 64,
            "unknown": "negative",
        },
        "model": {"depth": 18, "dtype": "bfloat16", "embedding_dim": 32},
        "optimizer": {"name": "sgd", "peak_lr": 0.1, "weight_decay": 1e-4},
        "stages": [{"name": s.name, "num_steps": 1400} for s in STAGES],
    }
)
HISTORY = make_history()


def page(*, metrics=None, history=(), stages=(), config=None):
    return render(
        "run",
        metrics or make_metrics(),
        history=list(history),
        config=config or {},
        stages=list(stages),
    )


@pytest.fixture(scope="module")
def full():
    return page(history=HISTORY, stages=STAGES, config=CONFIG)


class Reader(html.parser.HTMLParser):
    """Fails on tags that are not closed in order; collects text, ids and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.ids, self.urls = [], [], [], []
        self.tags = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.note(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.note(attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def note(self, attrs):
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names)
        self.ids += [v for k, v in attrs if k == "id"]
        self.urls += [v for k, v in attrs if k in ("href", "src", "xlink:href")]


@pytest.fixture(scope="module")
def read(full):
    return Reader(full)


def test_every_tag_is_closed_in_order_and_ids_are_unique(read):
    assert len(set(read.ids)) == len(read.ids) > 0


def test_figures_refer_only_to_what_the_page_holds(full, read):
    used = re.findall(r"url\(#([^)]*)\)", full)
    used += [u[1:] for u in read.urls if u.startswith("#")]
    assert used
    assert set(used) <= set(read.ids)


def test_nothing_is_fetched(full, read):
    assert all(url.startswith(("#", "data:")) for url in read.urls)
    assert "http:" not in full
    assert "https:" not in full
    assert "@import" not in full
    assert not read.tags & {"iframe", "img", "object", "form"}


@pytest.mark.parametrize(
    "text",
    [
        "0.4567",
        "0.6543",
        "0.2222",
        "+0.2345",
        "0.4153",
        "0.0121",
        "0.5123",
        "11,241,123",
        "/m/0sky",
        "9a0b33cd12ef4567",
        "1.00 → 0.00",
        "k = 4",
        "stages[2].name",
        "0.0001",
    ],
)
def test_the_numbers_of_the_run_are_in_the_text(read, text):
    text = text.replace("1.00 → 0.00", "1 → 0")
    assert text in " ".join(read.text)


def test_the_badge_comes_before_any_figure_of_the_result(full):
    assert full.index("Provenance:</span> clean") < full.index("0.4567")


def test_an_unclean_result_says_so_first():
    tuned = CLEAN.with_("thresholds", labels=["tuning"])
    text = page(metrics=make_metrics(provenance=tuned))
    assert text.index("tuning labels: thresholds") < text.index("0.4567")
    assert "do not represent unseen data" in text
    assert "No labels or images of a tuning" not in text


def test_the_worst_slice_comes_first(full):
    part = full[full.index("slices of <bdi>test") :]
    assert part.index("highland") < part.index("coast")


def test_tables_have_captions_and_scoped_headers(full):
    assert full.count("<table") == full.count("<caption>")
    assert "<th>" not in full


def test_each_figure_has_a_text_for_those_who_cannot_see_it(full):
    assert full.count("<svg") == full.count('role="img" aria-label="') == 4


def test_names_from_data_and_configuration_are_escaped():
    slices = {EVIL: slice_metrics(0.2, 3, 0.1)}
    metrics = make_metrics(
        splits={"test": summary(0.4, 0.4, slices=slices), EVIL: summary(0.4, 0.3)},
        constant=constant({"test": 0.2, EVIL: 0.3}, (EVIL,)),
        dataset=EVIL,
        decoder=decoder_in_use(EVIL, EVIL),
    )
    terms = {EVIL: [0.0, 1.0]}
    stages = [replace(STAGES[0], name=EVIL, terms=terms, enters_from=EVIL)]
    history = [{"kind": "train", "step": 1, f"loss/{EVIL}": 1.0, f"weight/{EVIL}": 1.0}]
    text = render(EVIL, metrics, history=history, config={EVIL: EVIL}, stages=stages)
    assert text.count("<script") == 1
    assert EVIL in "".join(Reader(text).text)


@pytest.mark.parametrize(
    "metrics",
    [
        make_metrics(splits={"validation": summary(0.6, 0.3)}),
        make_metrics(splits={"validation": summary(0.6, 0.3, embedding=False)}),
    ],
    ids=["no test", "no embedding"],
)
def test_a_page_is_whole_without_optional_parts(metrics):
    text = page(metrics=metrics)
    assert "nan" not in " ".join(Reader(text).text).lower().split()


def test_splits_that_were_not_evaluated_are_not_mentioned():
    text = page(metrics=make_metrics(splits={"validation": summary(0.6, 0.3)}))
    assert "Mean F2, test" not in text


def test_gaps_and_missing_values_in_a_history_are_drawn_around():
    history = [
        {"kind": "train", "step": 1, "objective": None, "images_per_second": None},
        {"kind": "train", "step": 2, "objective": 1.0},
        {"kind": "evaluation", "step": 2, "validation/f2": None},
    ]
    Reader(page(history=history, stages=STAGES[:1]))


def test_all_decoders_are_rows_of_one_table_with_every_split():
    splits = {"validation": summary(0.6, 0.3), "test": summary(0.4, 0.4)}
    for figures in splits.values():
        figures.decoders["expected_f2"] = decoder_metrics(0.4321)
    text = page(metrics=make_metrics(splits=splits))
    part = text[text.index("<h2>Decoders") : text.index("<h2>All metrics")]
    rows = re.findall(r'<tr><th scope="row">(.*?)</tr>', part)
    assert len(rows) == 4
    assert [row.count('class="num"') for row in rows] == [6] * 4
    assert "in use" in rows[0]
    assert "0.6000" in rows[0]
    assert "0.4000" in rows[0]
    assert rows[3].startswith("largest expected F2")
    assert "0.4321 ± 0.0054" in rows[3]


def test_estimates_of_the_shift_stand_beside_the_test_and_the_closer_is_marked():
    estimates = DomainShiftEstimate(
        validation=Estimate(f2=0.6, threshold=0.3, test_f2=0.43),
        held_out_domains=Estimate(f2=0.48, threshold=0.4, test_f2=0.5),
        domains={EVIL: 0.4567, "south": 0.5},
        test_f2=0.45,
    )
    text = page(metrics=make_metrics(estimates=estimates))
    part = text[
        text.index("<h2>Estimated domain shift") : text.index("<h2>All metrics")
    ]
    validation, held_out = re.findall(r'<tr><th scope="row">.*?</tr>', part)
    assert "+0.1700" in validation
    assert "closer" not in validation
    assert "−0.0200" in held_out
    assert "closer" in held_out
    assert "0.4567" in part
    assert "<script" not in part
    assert "Estimated domain" not in page()


def test_the_page_is_the_same_for_the_same_run(full):
    assert full == page(history=HISTORY, stages=STAGES, config=CONFIG)


def test_the_page_is_small_whole_and_has_the_name_of_the_run(full):
    assert len(full.encode()) < 300_000
    assert full.endswith("</html>")
    assert "<h1><bdi>run</bdi></h1>" in full


def test_metrics_that_went_through_json_make_the_same_page(full, tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(make_metrics().to_json()))
    metrics = read_result(EvaluationResult, path)
    assert page(metrics=metrics, history=HISTORY, stages=STAGES, config=CONFIG) == full
