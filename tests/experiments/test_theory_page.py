"""The page of the theory holds every figure and number, and needs no network."""

import io
import re

import pandas as pd
import pytest
from rich.console import Console

from experiments import theory_page
from experiments.theory_page import PARTS, TITLE, main, write_theory

QUICK = ("counterexample", "sketch laws")


def written(folder, console=None):
    return write_theory(folder, console or Console(file=io.StringIO()), seeds=2)


def assert_whole(folder, page):
    text = page.read_text(encoding="utf-8")
    figures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert len(figures) == text.count("<svg") == text.count("<figcaption")
    assert {path.stem for path in (folder / "data").glob("*.csv")} >= figures
    for name in figures:
        assert f'id="{name}-' in text
        assert len(pd.read_csv(folder / "data" / f"{name}.csv")) > 0
    # The only links are inside the page: markers and clip paths.
    assert not re.findall(r"""(?:src|href)=["'](?!#)|url\((?!["']?#)|https?://|@import|<script""", text)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text, flags=re.DOTALL)
    for caption in captions:
        assert "measured" in caption.lower()
        assert "seed" in caption
        assert "derived here" in caption or "as quoted in reviews" in caption or "No bound is drawn" in caption
    return text


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theory") / "new" / "folder"
    console = Console(file=io.StringIO())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theory_page, "PARTS", {name: PARTS[name] for name in QUICK})
        page = written(folder, console)
    return folder, page, console.file.getvalue()


def test_the_page_holds_every_figure_and_number_and_no_foreign_link(quick):
    folder, page, _ = quick
    assert page == folder / "theory.html"
    assert TITLE in assert_whole(folder, page)


def test_it_says_what_it_did_and_where_the_page_lies(quick):
    _, page, log = quick
    assert all(name in log for name in QUICK)
    assert str(page) in log.replace("\n", "")


def test_the_counterexample_is_called_a_reconstruction_wherever_it_stands(quick):
    _, page, _ = quick
    text = page.read_text(encoding="utf-8")
    section = text[text.index("<h2>The counterexample") :].split("<h2>")[1]
    places = re.findall(r"<h2>|<figcaption>.*?</figcaption>|<caption>.*?</caption>", "<h2>" + section, flags=re.DOTALL)
    assert "reconstruction" in section.partition("</h2>")[0]
    assert len(places) == 4
    assert all("econstruction" in place for place in places[1:])


def test_the_command_wants_one_folder():
    with pytest.raises(SystemExit, match="usage"):
        main([])


@pytest.mark.slow
def test_every_part_is_on_the_page(tmp_path):
    text = assert_whole(tmp_path, written(tmp_path))
    assert text.count("<h2>") == len(PARTS) + 2
    assert "at 0 of" in text
