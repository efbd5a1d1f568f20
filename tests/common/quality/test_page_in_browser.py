"""The pages, in a headless Chromium: what a person does with them works, and nothing a name holds becomes HTML."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from common import InputError, phantom
from common.quality import measure, page, picture, report, review, verdict
from common.quality.views import Views
from common.run.cohort import review_folder
from common.space import mapping
from common.space.points import Points

EVIL = "<script>document.title='bad'</script>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair's files, and in `turned` those that show the patient's left on the left."""
    folder = tmp_path_factory.mktemp("pages") / "pair"
    write_pair(folder)
    write_pair(folder.parent / "turned", neurological=True)
    return folder


def write_pair(
    folder: Path, *, labels: int = 0, neurological: bool = False, strength: float = 1, notes: tuple[str, ...] = ()
) -> None:
    """The phantom and itself, moved by a smooth field, with labels and landmarks; or with so many slabs as labels.

    At a strength of 20 the field folds. `notes` are further reasons to doubt.
    """
    folder.mkdir()
    size, space = (36, 44, 34), nib.affines.from_matvec(np.diag([4.0, 4, 4]), [-70, -86, -66])
    scan, label = phantom.sample(size, space)
    if labels:
        inside = scan > 0
        label[inside] = np.arange(inside.sum()) * labels // inside.sum() + 1
    wave = torch.sin(torch.arange(size[0]) / 6)[None, :, None, None]
    disp = strength * torch.cat([0.5 * wave, wave, 0 * wave]).expand(3, *size).contiguous()
    marks = Points(np.array([[0.0, 0, 0], [20, 10, 0]]), ["a", EVIL])
    pair = measure.Registration(
        *(scan[None], space, scan[None], space),
        start=mapping.affine_transform(np.eye(4)),
        whole=mapping.displacement_transform(disp.numpy(), space),
        work=torch.from_numpy(np.stack([scan, scan])),
        disp=disp,
        work_affine=space,
        moving_label=label,
        fixed_label=label,
        moving_points=marks._replace(lps=marks.lps + 2),
        fixed_points=marks,
    )
    row, details = measure.measure(pair, measure.warp_pair(pair), surface=False)
    row = {"id": EVIL, "fixed": "fixed.nii.gz", "moving": f"{EVIL}.nii.gz"} | row
    content = report.report(row, details, [*verdict.judge(row), *notes], {"seconds": 1.0, "settings": []})
    looked, sides = Views(pair), {"neurological": neurological}
    body = picture.draw_planes(looked, **sides)
    page.write_page(looked, content, body, folder / "report.html", **sides)
    page.write_thumbnail(looked, folder / "thumbnail.webp")
    report.write_report(content, folder / "report.json")


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("no Chromium here; Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


def opened(browser, path: Path):
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(path.absolute().as_uri())
    WebDriverWait(browser, 20).until(lambda b: b.execute_script("return document.body.dataset.ready"))
    return browser.execute_script


PICTURE = "return [...document.querySelectorAll('canvas')].map((c) => c.toDataURL()).join()"


def press(script, key: str) -> None:
    script("document.dispatchEvent(new KeyboardEvent('keydown', { key: arguments[0], bubbles: true }))", key)


def test_page_of_a_pair(folder: Path, browser) -> None:
    """Slider, keys, views, swipe and sides each change what is drawn; the print view shows the still picture."""
    script = opened(browser, folder / "report.html")
    seen = [script(PICTURE)]

    def changed(what: str) -> None:
        found = script(PICTURE)
        assert found not in seen[-1:], what
        seen.append(found)

    script("const s = document.querySelector('.plane input'); s.value = 20; s.dispatchEvent(new Event('input'))")
    changed("slider")
    for key in ("ArrowUp", "1", "4", "5", "6", "7", "3", "e", "l", "p", "s", "r"):
        press(script, key)
        changed(key)
    press(script, "s")
    press(script, "f")
    assert script("return document.getElementById('flicker').getAttribute('aria-pressed')") == "true"
    press(script, "f")
    assert "slice k" in script("return document.querySelector('figcaption').textContent")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    shown = "return ['.viewer', '.without'].map((s) => getComputedStyle(document.querySelector(s)).display)"
    assert script(shown) == ["none", "block"]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert script("return document.title") != "bad" and EVIL in script("return document.body.innerText")
    assert browser.get_log("browser") == []


def test_folds_over_the_anatomy(tmp_path: Path, browser) -> None:
    """Where the map folds, the warped scan is yellow; the box and the key take it away. So it is in the picture."""
    write_pair(tmp_path / "pair", strength=20)
    script = opened(browser, tmp_path / "pair" / "report.html")
    assert "much folding" in script("return document.querySelector('.verdict').textContent")
    yellow = """
        return [...document.querySelectorAll('canvas')].map((c) => {
          const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
          let n = 0;
          for (let p = 0; p < d.length; p += 4) n += d[p] === 240 && d[p + 1] === 228 && d[p + 2] === 66;
          return n;
        })"""
    assert script("return document.querySelector('[data-view=after]').ariaPressed") == "true"
    before = script(yellow)
    assert all(count > 100 for count in before)
    press(script, "o")
    assert script(yellow) == [0, 0, 0]
    script("document.getElementById('folds').click()")
    assert script(yellow) == before
    planes = np.asarray(Image.open(tmp_path / "pair" / "thumbnail.webp").convert("RGB"), int)
    third = planes[:, 2 * picture.THUMB :]
    assert (np.abs(third - [240, 228, 66]).sum(-1) < 60).sum() > 50
    told = [entry for entry in browser.get_log("browser") if "getImageData" not in entry["message"]]
    assert told == [], "but advice on what this test does"


def test_both_sides_beside_each_other(folder: Path, tmp_path: Path, browser) -> None:
    """Where left and right are in doubt, the page shows the moving scan as it is and mirrored; else not."""
    write_pair(tmp_path / "pair", notes=("left and right may be exchanged in one scan: look at both headers",))
    script = opened(browser, tmp_path / "pair" / "report.html")
    shown = "return [...document.querySelectorAll('.mirrored img')].map((i) => i.naturalWidth)"
    assert len(script(shown)) == 2 and min(script(shown)) > 2 * picture.CELL
    assert "mirrored" in script("return document.querySelector('.mirrored').innerText")
    assert script("return document.querySelector('main').firstElementChild.className") == "mirrored"
    script = opened(browser, folder / "report.html")
    assert script(shown) == []


def test_page_alone(folder: Path) -> None:
    """One file of under 3 MB, which asks nobody for anything, with the verdict and a picture before any script."""
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert len(text) < 3e6 and "http" not in text and EVIL not in text
    assert ("PLAUSIBLE" in text) != ("DOUBTFUL" in text)
    assert text.index('<img class="static" src="data:image/jpeg') < text.index("<script>")


def test_page_with_138_labels(tmp_path: Path) -> None:
    """Every label stands in report.json and in the page's table; the page stays small."""
    write_pair(tmp_path / "pair", labels=138)
    text = (tmp_path / "pair" / "report.html").read_text(encoding="utf-8")
    each = json.loads((tmp_path / "pair" / "report.json").read_text())["overlap"]["each"]
    assert len(each) == 138 and len(text) < 3e6
    for name, found in each.items():
        assert f'<td class="number">{name}</td><td class="number">{found["dice_before"]:.3f}</td>' in text


def test_both_sides(folder: Path, browser) -> None:
    """Radiological unless asked for: picture, page and thumbnail; the page's button turns it."""
    script = opened(browser, folder.parent / "turned" / "report.html")
    words = "return document.getElementById('convention').textContent"
    assert script(words).startswith("Neurological view: the patient's left is on the left")
    turned = script(PICTURE)
    assert "displacement. Neurological view" in (folder.parent / "turned" / "report.html").read_text()
    script = opened(browser, folder / "report.html")
    assert script(words).startswith("Radiological view: the patient's left is on the right")
    assert script(PICTURE) != turned
    press(script, "r")
    assert script(PICTURE) == turned
    strips = np.asarray(Image.open(folder / "thumbnail.webp").convert("L"), float)
    assert strips.shape == (2 * picture.THUMB, 3 * picture.THUMB)
    above, below = strips[: picture.THUMB, 20:68], strips[picture.THUMB :, 20:68]  # without the letters
    assert np.abs(above[:, ::-1] - below).mean() < 4 < np.abs(above - below).mean()


def cohort(folder: Path, count: int) -> list[dict]:
    rows = []
    rng = np.random.default_rng(0)
    for n in range(count):
        row = {"id": f"pair{n:04}", "warnings": "much folding" if n % 7 == 3 else "", "error": ""}
        row |= {"structure_after": 0.8 + 0.02 * rng.normal(), "ncc_after": 0.9, "folding_pct": 0.001 * n, "sdlogj": 0.3}
        rows.append(row)
    rows[1] |= {"id": EVIL, "structure_after": 0.1}
    rows[2] |= {"error": f"{EVIL}: no such file", "ncc_after": "", "structure_after": ""}
    return rows


def test_page_of_a_cohort(folder: Path, tmp_path: Path, browser) -> None:
    """1,000 pairs: worst first, sorted and filtered, notes kept and saved as CSV."""
    rows = cohort(tmp_path, 1000)
    (tmp_path / "pair0000").mkdir()
    shutil.copy(folder / "thumbnail.webp", tmp_path / "pair0000")
    review.write_review(tmp_path, rows, tmp_path / "index.html")
    script = opened(browser, tmp_path / "index.html")
    ids = "return [...document.querySelectorAll('tbody tr')].filter((r) => !r.hidden).map((r) => r.dataset.id)"
    assert script(ids)[0] == "pair0002" and 30 <= len(script(ids)) < 1000, "the rest is laid out when it is scrolled to"
    assert script("return document.getElementById('count').textContent") == "1000 of 1000 found"
    script("document.querySelector('th[data-key=folding_pct] button').click()")
    assert script(ids)[0] == "pair0999"
    by_name = "document.querySelector('th[data-key=id] button').click()"
    script(by_name), script(by_name)
    assert script(ids)[:3] == [EVIL, "pair0000", "pair0002"]
    script("[...document.querySelectorAll('circle')].find((c) => c.dataset.id === 'pair0777').onclick()")
    assert "pair0777" in script(ids), "a dot leads to its row"
    look = "return getComputedStyle(document.querySelector('td img')).objectPosition"
    sides = [script(look), script("document.getElementById('sides').click()"), script(look)]
    assert sides == ["50% 0%", None, "50% 100%"]
    assert script("return document.getElementById('convention').textContent").startswith("Neurological")
    script("const s = document.getElementById('only'); s.value = 'failed'; s.dispatchEvent(new Event('change'))")
    assert script(ids) == ["pair0002"]
    note = "const r = document.querySelector('tr[data-id=pair0002] .note'); r.value = 'say \"a\", b'; r.oninput()"
    script(note)
    script = opened(browser, tmp_path / "index.html")
    script("document.getElementById('export').click()")
    saved = script("return document.body.dataset.saved").splitlines()
    assert '"pair0002","failed","","say ""a"", b"' in saved and len(saved) == 1001
    assert script("return document.querySelectorAll('circle[stroke]').length") > 0
    assert script("return document.title") == "1000 registrations" and browser.get_log("browser") == []


def test_review_from_the_folders(folder: Path, tmp_path: Path) -> None:
    """Without results.csv the reports are read; thumbnails are loaded late, names are escaped."""
    shutil.copytree(folder, tmp_path / "out" / "pair")
    path, count = review_folder(tmp_path / "out")
    text = path.read_text(encoding="utf-8")
    assert count == 1 and 'loading="lazy"' in text
    assert '<body>' in text and 'src="pair/thumbnail.webp"' in text and 'href="pair/report.html"' in text
    assert EVIL not in text
    known = json.loads((folder / "report.json").read_text())
    assert f"{known['similarity']['structure_after']:.3f}" in text
    review_folder(tmp_path / "out", neurological=True)
    assert '<body class="neurological">' in path.read_text(encoding="utf-8")
    with pytest.raises(InputError, match="holds no results.csv"):
        review_folder(tmp_path)
