"""The pages as a person meets them: what four registrations look like, how fast the page of a large cohort is.

    python tests/bench/bench_pages.py readers DATA OUT          # a good registration and three bad ones, of real scans
    python tests/bench/bench_pages.py shots OUT                 # their first screens, in an order that is not told
    python tests/bench/bench_pages.py cohort OUT --count 1000   # -> results/pages.json, with the page of 138 labels
    python tests/bench/bench_pages.py cost OUT                  # -> there too: CPU seconds of what a page needs

DATA is the folder with dev and dev_small. `readers` registers with the bundles, as a user would: "good" (two people's
T1, samconvex with 50 steps), "folded" (the same with a rough random field added: what a refinement without a price on
roughness gives), "modality" (T2 onto T1 of one person with sacb_net, whose weights know T1) and "flipped" (as "good",
the moving scan's left and right exchanged). File names tell nothing. OUT/key.txt says which picture is which: show the
others to somebody who has not seen it. Chromium is Debian's; selenium drives it.
"""

import csv
import json
import random
import shutil
import sys
import time
from pathlib import Path

import fire
import numpy as np
from machine import ROOT, hardware

sys.path.insert(0, str(ROOT))

RESULTS = Path(__file__).parent / "results" / "pages.json"
VISITS = 5  # of the page of a cohort; the middle is kept
SIZES = {"": (1280, 800), "_phone": (390, 844)}


def readers(data, out, *only):
    """OUT/NAME/: the folder of each registration. `only`: their names."""
    import torch

    from common.run.registrar import Registrar
    from common.space import io

    torch.set_num_threads(1)
    brains, glioma = Path(data) / "dev_small" / "brain_t1_2mm", Path(data) / "dev" / "brain_glioma"
    known = json.loads((brains / "dataset.json").read_text())
    people = {case["subject"]: case for case in known["validation"]}
    first, second, third = (str(brains / case["image"]) for case in list(people.values())[:3])
    cases = {
        "good": (first, second, "samconvex", {"refine_steps": 50}),
        "modality": (str(glioma / "t1_bet.nii.gz"), str(glioma / "t2_bet.nii.gz"), "sacb_net", {}),
        "flipped": (third, second, "samconvex", {"refine_steps": 50}),
    }
    for name, (fixed, moving, bundle, options) in cases.items():
        if only and name not in only:
            continue
        place = Path(out) / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        for file, scan in (("scan_a", fixed), ("scan_b", moving)):
            array, affine = io.read_scan(scan)
            turned = array[:, ::-1] if name == "flipped" and file == "scan_b" else array
            io.write_scan(np.ascontiguousarray(turned), affine, place / f"{file}.nii.gz")
        begin = time.process_time()
        found = Registrar(bundle, **options).register(place / "scan_b.nii.gz", place / "scan_a.nii.gz", place)
        if name == "good":
            _labelled(found.folder, fixed, moving, Path(out) / "labelled" / "report")
            _folded(found, place, Path(out) / "folded")
        print(f"{name}: {found.verdict}, {time.process_time() - begin:.1f} CPU-s", *found.warnings, sep="\n  - ")


def _labelled(folder, fixed, moving, out):
    """The same registration judged once more, with its 138 labels."""
    from common.__main__ import make_report

    names = {"fixed_label": fixed, "moving_label": moving}
    labels = {name: scan.replace("images", "labels") for name, scan in names.items()}
    make_report(moving, fixed, str(folder / "transform.h5"), str(out), **labels)


def _folded(found, scans, place):
    """A registration with a field of 1.5 voxels added that changes over two of them."""
    from scipy.ndimage import gaussian_filter

    from common.__main__ import make_report
    from common.space import mapping
    from common.space.transform_files import write_transform

    disp, rng = found.pair.disp.numpy(), np.random.default_rng(0)
    rough = np.stack([gaussian_filter(rng.normal(size=disp.shape[1:]), 2) for _ in range(3)])
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    field = mapping.displacement_transform(disp + 1.5 * rough / rough.std() / 3**0.5, found.pair.work_affine)
    write_transform(mapping.compose(field, found.pair.start), place / "transform.h5")
    files = [str(scans / f"scan_{letter}.nii.gz") for letter in "ba"]
    print(make_report(*files, str(place / "transform.h5"), str(place / "scan_b_to_scan_a")))


def browser(size):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(word)
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 600}
    found.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    return found


def opened(driver, path):
    """Milliseconds until the page's script has done its work."""
    from selenium.webdriver.support.ui import WebDriverWait

    begin = time.time()
    driver.get(Path(path).absolute().as_uri())
    WebDriverWait(driver, 60, 0.02).until(lambda b: b.execute_script("return document.body.dataset.ready"))
    return 1000 * (time.time() - begin)


def shots(out, seed=None):
    """OUT/reader_N.png, and reader_N_phone.png: first screens of what `readers` made; OUT/key.txt."""
    pages = sorted(Path(out).glob("*/scan*/report.html"))
    random.Random(seed).shuffle(pages)
    for ending, size in SIZES.items():
        driver = browser(size)
        for n, page in enumerate(pages, 1):
            opened(driver, page)
            driver.save_screenshot(str(Path(out) / f"reader_{n}{ending}.png"))
        driver.quit()
    key = [f"reader_{n}.png: {page.parent.parent.name}" for n, page in enumerate(pages, 1)]
    (Path(out) / "key.txt").write_text("\n".join(key) + "\n")


# A step of a person: its script, and the layout after it; a headless browser on a busy machine may paint much later.
TIMED = """
const begin = performance.now();
new Function(arguments[0])();
return document.body.offsetHeight && performance.now() - begin;
"""
STEPS = {
    "sort": "document.querySelector('th[data-key=folding_pct] button').click()",
    "sort by name": "document.querySelector('th[data-key=id] button').click()",
    "filter": "const s = document.getElementById('only'); s.value = 'doubtful'; s.dispatchEvent(new Event('change'))",
    "search": "const s = document.getElementById('search'); s.value = '7'; s.dispatchEvent(new Event('input'))",
    "scroll": "scrollTo(0, document.body.scrollHeight / 2)",
}


def cohort(out, count=1000, results=str(RESULTS)):
    """The page of a cohort made of the pairs of `readers`, each many times, its measures shaken; and a pair's page."""
    from common.quality.review import rows_of
    from common.run.cohort import review_folder

    made = [path.parent for path in sorted(Path(out).glob("*/scan*/report.html"))]
    tables = [next(row for row in rows_of(folder.parent) if row["id"] == folder.name) for folder in made]
    rng, place = np.random.default_rng(0), Path(out) / "cohort"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    rows = []
    for n in range(count):
        row = {name: _shaken(text, rng) for name, text in tables[n % len(made)].items()} | {"id": f"pair{n:04}"}
        (place / row["id"]).mkdir()
        shutil.copy(made[n % len(made)] / "thumbnail.webp", place / row["id"])
        (place / row["id"] / "report.html").write_text("")
        rows.append(row)
    with (place / "results.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        table.writeheader(), table.writerows(rows)
    begin = time.process_time()
    page, _ = review_folder(place)
    found = {"pairs": count, "made_cpu_s": time.process_time() - begin, "bytes": page.stat().st_size}
    driver = browser(SIZES[""])
    times = [_visit(driver, page) for _ in range(VISITS)]
    found |= {name: float(np.median([time[name] for time in times])) for name in times[0]}
    driver.quit()
    pages = {folder.parent.name: _page(folder) for folder in [*made, Path(out) / "labelled" / "report"]}
    _keep(results, {"hardware": hardware(), "cohort": found, "pairs": pages})


def cost(out, results=str(RESULTS)):
    """CPU seconds of measuring and drawing the pair "good" of `readers`, the middle of five; its stages."""
    import torch

    from common.mind import mind_features
    from common.quality import measure, mirror, page, picture, quick, sides
    from common.quality.metrics import halved
    from common.quality.views import Views

    torch.set_num_threads(1)
    folder = next((Path(out) / "good").glob("scan*/report.json")).parent
    content = json.loads((folder / "report.json").read_text())
    pair = measure.read_registration(content["moving"], content["fixed"], str(folder / "transform.h5"))
    features = [mind_features(half[:1][None])[0] for half in pair.work.float().chunk(2)]
    inside, place = halved(pair.inside), Path(out) / "cost"
    place.mkdir(exist_ok=True)
    warped, looked = measure.warp_pair(pair), Views(pair)
    body = picture.draw_planes(looked)
    acts = {
        "measuring": lambda: measure.measure(pair, warped),
        "of it, both sides": lambda: sides.both_ways(*features, inside),
        "of it, quick registration": lambda: quick.against_quick(*features, inside, pair.disp),
        "planes": lambda: picture.draw_planes(Views(pair)),
        "report.html": lambda: page.write_page(looked, content, body, place / "report.html"),
        "thumbnail.webp": lambda: page.write_thumbnail(looked, place / "thumbnail.webp"),
        "report.png": lambda: picture.draw_report(looked, content, place / "report.png", body=body),
        "both sides beside each other, where in doubt": lambda: mirror.draw_mirrored(looked),
    }
    found = {name: round(float(np.median([_seconds(act) for _ in range(5)])), 3) for name, act in acts.items()}
    _keep(results, {"cost_cpu_s": found | {"stages of the whole": content["run"]["stages_cpu_s"]}})


def _seconds(act):
    begin = time.process_time()
    act()
    return time.process_time() - begin


def _keep(results, found):
    path = Path(results)
    content = (json.loads(path.read_text()) if path.exists() else {}) | found
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def _visit(driver, page):
    """Milliseconds of loading the page, and of each step."""
    found = {"load_ms": opened(driver, page)}
    for name, act in STEPS.items():
        found[f"{name}_ms"] = driver.execute_script(TIMED, act)
        driver.execute_script("const s = document.getElementById('search'); s.value = ''")
    return found


def _shaken(value, rng):
    return round(value * (1 + 0.05 * rng.normal()), 5) if isinstance(value, float) else value


def _page(folder):
    known = json.loads((folder / "report.json").read_text())
    return {"bytes": (folder / "report.html").stat().st_size, "labels": known["overlap"].get("labels", 0)}


if __name__ == "__main__":
    fire.Fire({"readers": readers, "shots": shots, "cohort": cohort, "cost": cost})
