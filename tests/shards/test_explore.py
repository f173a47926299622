"""datalth-shards explore: what stands in the page, without a browser; then the page in a real one."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from browser import Browser, needs_chromium
from conftest import inspect, mine
from pages import Page, check_self_contained
from servers import upload
from shards.inspect.compare import overlap
from shards.inspect.page import assemble
from shards.inspect.pictures import view_tiles
from shards.reader import TicketSet

HOSTILE = "<img src=x onerror=alert(1)>"


def explore(*arguments: object, out: Path) -> Page:
    inspect("explore", *arguments, "-o", out)
    return Page(out.read_bytes())


def rankings(said: dict[str, Any], images: int, n: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(said["rankings"]), np.uint8).reshape(images, -1, n)


@pytest.fixture(scope="module")
def odd_set(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of a hostile class, in a hostile folder, and one file that is no image."""
    root = tmp_path_factory.mktemp("odd")
    shutil.copytree(photos / "train", root / "data")
    (root / "data" / "bee").rename(root / "data" / HOSTILE)
    (root / "data" / "ant" / "broken.jpg").write_bytes(b"no image")
    out = root / "<b>set & more"
    mine("--data", root / "data", "--val-share", 0, "--out", out, "--method", "random", "--views", 2, "--tokens", 6,
         "--max-failures", 1)  # fmt: skip
    return out


@pytest.fixture(scope="module")
def other_k(center_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random tickets of 6 patches over the images of `center_set`, whose tickets have 13."""
    out = tmp_path_factory.mktemp("other") / "random"
    mine("--data", center_set, "--out", out, "--images", "link", "--method", "random", "--tokens", 6)
    return out


def test_the_page_holds_what_the_set_holds(center_set, tmp_path):
    page = explore(center_set, "--split", "val", out=tmp_path / "a.html")
    data, opened = page.data(), TicketSet.open(str(center_set))
    check_self_contained(page)
    (said,) = data["sets"]
    samples = {sample.key: sample for sample in opened.stream("val")}
    assert sorted(image["key"] for image in data["images"]) == sorted(samples)
    assert [image["class"] for image in data["images"]] == ["ant", "ant", "bee", "bee", "cat", "cat"]
    assert (said["name"], said["k"], said["samples"], said["failed"], data["grid"]) == ("center", 13, 6, 0, [4, 4])
    for place, image in enumerate(data["images"]):
        sample = samples[image["key"]]
        assert np.array_equal(rankings(said, 6, 16)[place], sample.rankings)
        assert said["boxes"][place] == sample.views.tolist() and image["class"] == image["key"].split("/")[1]
        ((tile,), (number,)) = view_tiles(sample, [0], 224), said["pictures"][place]
        (tmp_path / "tile.jpg").write_bytes(base64.b64decode(data["pictures"][number]))
        with Image.open(tmp_path / "tile.jpg") as stored:
            assert np.abs(np.asarray(stored, float) - np.asarray(tile)).mean() < 4
    assert sum(said["frequency"]) == pytest.approx(13, abs=0.01)


def test_names_are_text_wherever_they_stand(odd_set, tmp_path):
    content = explore(odd_set, out=tmp_path / "a.html")
    check_self_contained(content)
    data = content.data()
    assert data["sets"][0]["name"] == "<b>set & more" and HOSTILE in {image["class"] for image in data["images"]}
    assert content.texts["h1"][0] == "<b>set & more" and not any(tag in ("b", "img") for tag, _ in content.tags)
    wild = {"name": "</script><script>alert(1)</script><!--<script>", "line": "\u2028", "half": "\udc80"}
    page = Page(assemble("</title><script>", "<button id=theme></button>", [], wild))
    check_self_contained(page)
    assert page.data() == wild and page.texts["title"][0] == "</title><script>"


def test_failures_are_counted_and_listed_with_their_reasons(odd_set, tmp_path):
    (said,) = explore(odd_set, out=tmp_path / "a.html").data()["sets"]
    assert (said["failed"], said["samples"], said["reasons"]) == (1, 21, {"not an image": 1})
    (failure,) = said["failures"]
    assert failure["source"] == "ant/broken.jpg" and failure["error"].startswith("not an image: ")


def test_the_same_set_gives_the_same_bytes_wherever_it_is(odd_set, tmp_path, s3):
    explore(odd_set, out=tmp_path / "a.html")
    copy = shutil.copytree(odd_set, tmp_path / "moved" / odd_set.name)
    explore(copy, out=tmp_path / "b.html")
    content = (tmp_path / "a.html").read_bytes()
    assert content == (tmp_path / "b.html").read_bytes() and str(odd_set.parent).encode() not in content
    shutil.copytree(odd_set, tmp_path / "far")
    near, far = (
        explore(tmp_path / "far", out=tmp_path / "c.html"),
        explore(upload(odd_set, f"{s3}/far"), out=tmp_path / "d.html"),
    )
    assert near.data() == far.data()


def test_sets_of_the_same_images_share_their_pictures(center_set, other_k, ranked_set, tmp_path):
    data = explore(center_set, other_k, ranked_set, "--images", 6, out=tmp_path / "a.html").data()
    assert [image["class"] for image in data["images"]] == ["ant"] * 3 + ["bee"] * 3
    assert len(data["pictures"]) == 6 * 3 and len({str(said["pictures"]) for said in data["sets"]}) == 1
    assert [said["k"] for said in data["sets"]] == [13, 6, 6]
    twice = explore(center_set, center_set, out=tmp_path / "b.html").data()
    assert len({said["name"] for said in twice["sets"]} | {"center"}) == 2, "names that are equal get their ids"


def test_sets_by_other_seeds_show_their_own_views(center_set, photos, tmp_path):
    mine("--data", photos, "--out", tmp_path / "seed", "--method", "center", "--views", 2, "--seed", 1)
    data = explore(center_set, tmp_path / "seed", out=tmp_path / "a.html").data()
    first, second = data["sets"]
    assert len(data["pictures"]) == 21 * (3 + 1), "view 0 is that of both"
    assert all(a[0] == b[0] and a[1] != b[1] for a, b in zip(first["pictures"], second["pictures"], strict=True))


def test_of_cut_views_the_page_says_what_is_missing(cut_set, tmp_path):
    (said,) = explore(cut_set, out=tmp_path / "a.html").data()["sets"]
    assert (said["stored"], said["images"]) == (8, "ranked views")


def test_pages_stay_small_whatever_the_pictures_are(tmp_path):
    """Noise is the worst that a JPEG can meet."""
    rng = np.random.default_rng(0)
    for i in range(60):
        path = tmp_path / "data" / f"class{i % 4}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (200, 200, 3), np.uint8)).save(path)
    mine("--data", tmp_path / "data", "--val-share", 0, "--out", tmp_path / "set", "--method", "center", "--views", 9)
    data = explore(tmp_path / "set", out=tmp_path / "a.html").data()
    assert len(data["images"]) == 60 and len(data["pictures"]) == 480 and data["sets"][0]["views"] == 9
    assert 1e6 < (tmp_path / "a.html").stat().st_size < 5e6


def test_refusals(center_set, photos, tmp_path):
    mine("--data", photos, "--out", tmp_path / "fine", "--method", "center", "--patch-size", 8)
    out = ["-o", tmp_path / "a.html"]
    assert "expected equal patch grids" in inspect("explore", center_set, tmp_path / "fine", *out, code=1).output
    shutil.copytree(photos / "val", tmp_path / "alone")
    mine("--data", tmp_path / "alone", "--val-share", 0, "--out", tmp_path / "others", "--method", "center")
    text = inspect("explore", center_set, tmp_path / "others", *out, code=1).output
    assert "expected images of split train that both hold, got none" in text
    assert "expected a split of" in inspect("explore", center_set, "--split", "no", *out, code=1).output
    assert "ends in .html" in inspect("explore", center_set, "-o", tmp_path / "a.png", code=2).output
    for path in (tmp_path / "alone").rglob("*.*"):
        path.write_bytes(b"no image")
    mine("--data", tmp_path / "alone", "--val-share", 0, "--out", tmp_path / "none", "--method", "center",
         "--max-failures", 1)  # fmt: skip
    assert "has no sample to show" in inspect("explore", tmp_path / "none", *out, code=1).output
    assert not (tmp_path / "a.html").exists()


# ---- In a browser --------------------------------------------------------------------------------------------------------

LIT = """[...document.querySelectorAll('.card')].filter((card) => card.checkVisibility()).map((card) =>
    [...card.querySelectorAll('canvas')].map((canvas) => {
        const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
        return data.filter((alpha, i) => i % 4 === 3 && alpha === 0).length;
    }))"""  # of every card in sight, the patches without a shade in each of its tiles


def choose(page: Browser, selector: str, value: object, event: str = "input") -> None:
    """As a hand would: a new value, its event, and what is drawn at the next frame."""
    page.js(f"""{{ const chosen = document.querySelector({json.dumps(selector)}); chosen.value = {json.dumps(str(value))};
        chosen.dispatchEvent(new Event({json.dumps(event)}, {{bubbles: true}})); }}""")
    page.js("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def text(page: Browser, selector: str) -> str:
    found: str = page.js(f"document.querySelector({json.dumps(selector)}).textContent")
    return found


def figures(page: Browser) -> list[list[str]]:
    """The table of mean overlaps, line by line."""
    found: list[list[str]] = page.js(
        "[...document.querySelectorAll('#overall tbody tr')].map((row) => [...row.cells].map((cell) => cell.textContent))"
    )
    return found


@pytest.mark.long
@needs_chromium
def test_the_slider_lights_k_patches_and_every_control_works(odd_set, tmp_path, chromium):
    explore(odd_set, out=tmp_path / "a.html")
    chromium.open(tmp_path / "a.html")
    assert chromium.js(LIT) == [[6]] * 21 and text(chromium, "#k-said") == "K = 6 of 16 (38 %)"
    for k in (1, 9, 16):
        choose(chromium, "#k", k)
        assert chromium.js(LIT) == [[k]] * 21 and f"K = {k} of 16" in text(chromium, "#k-said")
    chromium.js("document.getElementById('k').focus()")
    chromium.press("ArrowLeft")
    chromium.press("ArrowLeft")
    assert chromium.js(LIT) == [[14]] * 21, "arrow keys move the slider"
    chromium.js("document.getElementById('mined').click()")
    assert chromium.js(LIT) == [[6]] * 21

    picture = "document.querySelector('.card img').src"
    before = chromium.js(picture)
    choose(chromium, "#view", 1, "change")
    assert chromium.js(picture) != before and chromium.js(LIT) == [[6]] * 21
    ranked = TicketSet.open(str(odd_set))
    chromium.js("document.querySelector('input[value=rank]').click()")
    assert chromium.js(LIT) == [[0]] * 21, "a heat map colors all patches"
    chromium.js("document.querySelector('input[value=image]').click()")
    assert chromium.js(LIT) == [[16]] * 21
    chromium.js("document.querySelector('input[value=ticket]').click()")

    choose(chromium, "#find", "ONERROR")
    assert len(chromium.js(LIT)) == 7 and text(chromium, "#count") == "7 of 21 images"
    assert chromium.js(
        "[...document.querySelectorAll('#classes h2')].filter((h) => h.checkVisibility()).map((h) => h.textContent)"
    ) == [HOSTILE]
    choose(chromium, "#find", "ant_3")
    assert len(chromium.js(LIT)) == 1
    chromium.js("document.querySelector('.card:not([hidden]) button').focus()")
    chromium.press("Enter")
    assert chromium.js("document.getElementById('detail').open") and text(chromium, "#detail-title") == "ant/ant_3"
    chromium.js("document.querySelector('#detail .tile').focus()")
    chromium.press("ArrowUp")
    sample = next(s for s in ranked.stream("train") if s.key == "ant/ant_3")
    rank = sample.rankings[1].tolist().index(1 * 4 + 2) + 1
    assert text(chromium, "#patch") == f"Row 2, column 3: rank {rank} of 16"
    chromium.press("Escape")
    assert not chromium.js("document.getElementById('detail').open")
    assert "1 of 22 images: 1 x not an image." in text(chromium, "#failures")
    assert "ant/broken.jpg" in text(chromium, "#failures table")
    choose(chromium, "#find", "nothing of that name")
    assert chromium.js(LIT) == [] and text(chromium, "#count") == "0 of 21 images"
    assert chromium.complaints() == []


@pytest.mark.long
@needs_chromium
def test_two_sets_overlap_as_diff_says(center_set, other_k, tmp_path, chromium):
    explore(center_set, other_k, out=tmp_path / "a.html")
    chromium.open(tmp_path / "a.html")
    assert chromium.js(LIT) == [[13, 6]] * 21, "each set's own K, until the slider is moved"
    found = overlap(TicketSet.open(str(center_set)), TicketSet.open(str(other_k)), "train")
    for said in found["views"]:
        choose(chromium, "#view", said["view"], "change")
        both, chance = figures(chromium)
        assert both[:2] == ["center and random", "21"]
        for shown, expected in ((both, said), (chance, found["random"])):  # JavaScript rounds halves up
            assert [float(cell) for cell in shown[2:]] == pytest.approx(
                [expected["overlap"], expected["iou"]], abs=5.1e-4
            )
    choose(chromium, "#view", 0, "change")
    choose(chromium, "#k", 16)
    assert figures(chromium)[0][2:] == ["1.000", "1.000"] and chromium.js(LIT) == [[16, 16]] * 21
    assert chromium.complaints() == []


@pytest.mark.long
@needs_chromium
def test_pages_fit_narrow_and_wide_windows_in_light_and_dark(center_set, other_k, odd_set, tmp_path, chromium):
    explore(center_set, other_k, out=tmp_path / "two.html")
    explore(odd_set, out=tmp_path / "one.html")
    paper = "getComputedStyle(document.body).backgroundColor"
    for width in (360, 800, 1600):
        for name in ("one", "two"):
            colors = []
            for dark in (False, True):
                chromium.resize(width, 800, dark)
                chromium.open(tmp_path / f"{name}.html")
                assert chromium.js("document.documentElement.scrollWidth") <= width, (width, name)
                colors.append(chromium.js(paper))
            assert colors[0] != colors[1]
            chromium.js("document.getElementById('theme').click()")
            assert chromium.js(paper) == colors[0]
            assert chromium.complaints() == []
    chromium.resize(1200, 900)


@pytest.mark.long
@needs_chromium
def test_the_browser_holds_the_page_to_its_policy(odd_set, tmp_path, chromium):
    """The control of `complaints`: a handler, a script and a request that somebody smuggled in are refused and seen."""
    inspect("explore", odd_set, "-o", tmp_path / "a.html")
    smuggled = b"<img src='http://localhost:9/x' onerror='window.ran = 1'><script>window.ran = 2</script>"
    (tmp_path / "b.html").write_bytes((tmp_path / "a.html").read_bytes().replace(b"<main>", b"<main>" + smuggled))
    chromium.open(tmp_path / "b.html")
    chromium.js("new Promise((done) => setTimeout(done, 300))")
    assert chromium.js("window.ran === undefined") and chromium.js("document.querySelectorAll('.card').length") == 21
    refused = json.dumps(chromium.complaints())
    assert "script-src" in refused and "img-src" in refused
