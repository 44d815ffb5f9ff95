"""The advice page as text: self-contained, complete, honest about what is absent."""

import base64
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from glocal.report import AdvicePage, Headline, render_advice


def embedded(page: str, name: str):
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found.group(1))


@pytest.mark.parametrize("which", ["advice_page", "large_page", "demonstration_page", "dense_page"])
def test_page_needs_no_network_and_stays_small(which, request):
    page = render_advice(request.getfixturevalue(which))
    assert "http://" not in page and "https://" not in page and "//cdn" not in page
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=\"(?!data:)", page)
    assert "default-src 'none'" in page
    assert len(page.encode()) < 3 * 2**20


def test_rows_and_recipe_travel_inside(advice_page):
    page = render_advice(advice_page)
    rows = embedded(page, "rows")
    assert len(rows) == 8 and rows[0]["note"] == "</script><b>"
    assert [strip["role"] for strip in embedded(page, "strips")] == ["worst", "median", "best", "floor pair"]
    recipe = re.search(r'download="recipe.json" href="data:application/json;base64,([^"]+)"', page)
    assert recipe is not None and json.loads(base64.b64decode(recipe.group(1)))["schema"] == "glocal.recipe/1"


def test_headline_labels_never_mix(advice_page):
    page = re.sub(r"\s+", " ", render_advice(advice_page))
    assert "VALIDATED n = 8" in page
    assert page.index("End to end") < page.index("1.54×") < page.index("operator: attention calls alone")
    assert "one forward of the model" in page and "fastest dense kernel here" in page
    assert "worst <b>0.11</b> (s07)" in page
    assert "Synthetic page for tests" in page


def test_worst_sample_comes_first(advice_page):
    page = render_advice(advice_page)
    assert page.index(">worst</button>") < page.index(">median</button>") < page.index(">best</button>")
    assert '<h2 id="h-strip">Worst held-out sample</h2>' in page


def test_a_page_that_would_hide_the_worst_is_refused(advice_page):
    with pytest.raises(ValueError, match="strips come as 'floor pair', 'best', 'median', 'worst'; the first must be"):
        replace(advice_page, strips=advice_page.strips[::-1])


def test_dense_verdict_gives_its_reason_first(dense_page):
    page = render_advice(dense_page)
    reason = page.index("Attention is 21 % of the step")
    assert page.index("Stay dense.") < reason < page.index("1.06×")
    assert "STAY DENSE" in page and "ranks only, no number" in page
    assert "no drift measured" in page and 'download="recipe.json"' not in page
    assert "What was measured" in page


def test_demonstration_says_so(demonstration_page):
    assert "DEMONSTRATION n = 4" in render_advice(demonstration_page)


def test_smallest_page_says_what_is_missing():
    bare = AdvicePage("model", "workload", "today", Headline("candidate", 2))
    page = render_advice(bare)
    for words in ("No recipe was measured end to end", "no end-to-end speed-up measured", "No pair was validated"):
        assert words in page


def test_prediction_missing_is_said(advice_page):
    page = render_advice(replace(advice_page, curve=replace(advice_page.curve, band=())))
    assert "the prediction only ranks recipes, so it gives no number" in page


def test_words_of_others_cannot_break_the_page(advice_page):
    page = render_advice(replace(advice_page, model="<script>alert(1)</script>"))
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)" in page


def test_importing_report_loads_no_template_or_plot_library():
    code = (
        "import sys, glocal.report; print([m for m in ('jinja2', 'matplotlib', 'torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
