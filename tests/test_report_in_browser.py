"""In a real browser a report makes no noise, reacts, and has nothing axe minds."""

import pytest
from test_report import CONFIG, HISTORY, STAGES, make_metrics
from test_report_details import details

from jaxii.report.page import write_report

pytest.importorskip("playwright")
pytest.importorskip("axe_playwright_python")

from tests import report_browser

if not report_browser.CHROMIUM:
    pytest.skip("no Chromium is installed", allow_module_level=True)


@pytest.mark.parametrize("count", [40, 7178])
def test_a_report_reacts_without_noise(tmp_path, count):
    path = write_report(
        tmp_path,
        metrics=make_metrics(),
        history=HISTORY,
        config=CONFIG,
        stages=STAGES,
        details=details(count),
    )
    with report_browser.browser() as opened:
        found = report_browser.visit(opened, path)
    assert found.noise == found.wrong == found.axe_serious == []
    assert found.megabytes < 6
