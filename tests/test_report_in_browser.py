"""Tests in a real browser that reports log no errors, react, and pass axe."""

import pytest
from test_page_text import details, page

pytest.importorskip("playwright")
pytest.importorskip("axe_playwright_python")

from tests import report_browser

if not report_browser.CHROMIUM:
    pytest.skip("no Chromium is installed", allow_module_level=True)


@pytest.mark.parametrize("count", [40, 7178])
def test_a_report_reacts_without_noise(tmp_path, count):
    path = tmp_path / "report.html"
    path.write_text(page(details(count)), encoding="utf-8")
    with report_browser.browser() as opened:
        found = report_browser.visit(opened, path)
    assert found.noise == found.wrong == found.axe_serious == []
    assert found.megabytes < 6
