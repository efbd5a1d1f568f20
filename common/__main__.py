"""python -m common COMMAND: what can be done with a registration without any bundle."""

import difflib
import inspect
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Literal

import fire

from common import EmptyResult, InputError, Later, RegistrationWarning
from common.deploy.command import deploy
from common.label.command import label
from common.run.cli import exact_words, printable, sentence_of
from common.run.door import register, run, series, template
from common.run.line import asks_help


def bids(words: list[str]) -> str:
    """Register every T1w scan of a BIDS data set to a template: bids BIDS_DIR OUT participant --fixed TEMPLATE."""
    from common.run.bids import bids

    return bids(words)


np, io, mapping = Later("numpy"), Later("common.space.io"), Later("common.space.mapping")
carry, transform_files = Later("common.space.carry"), Later("common.space.transform_files")
REACH = 0.01  # share of a reference that a displacement has to cover
EMPTY_CODE = 3  # exit code of a command whose result is written, and empty or nearly so


def apply(
    *files: str,
    reference: str = "",
    label: Literal["no", "nearest", "auto", "linear"] = "no",
    inverse: bool = False,
    matrix: str = "",
):
    """Apply a transform to scans, label maps or points: apply FILE [FILE ...] TRANSFORM OUTPUT.

    A result that is empty, or nearly so, is written, said, and ends in exit code 3.

    A registration's transform.h5 takes a point of the fixed space to its place in the moving space. So it brings the
    moving scan (or its label map) onto the fixed grid, and FIXED points to the moving scan. For MOVING points to the
    fixed scan, or the fixed scan onto the moving grid, add --inverse.

    Args:
        files: one or more files, then the transform, then the output. A file is a scan or label map (NIfTI, also 4-D,
            MetaImage, NRRD, DICOM folder), or points: .csv with columns x,y,z (LPS mm, as ANTs) or i,j,k (voxels),
            .fcsv or .mrk.json of 3-D Slicer. The transform is .h5, .tfm, .txt, .mat, .lta, elastix's parameters, or a
            displacement image (.nii.gz, LPS mm). The output is a file, points .csv, .fcsv or .mrk.json in LPS mm; of
            several files it is a folder.
        reference: scan whose grid the result gets, as the fixed one; for points in voxels, the scan they belong to.
        label: how labels are brought along: "nearest" (also --label alone), "linear" (each label's share linearly, the
            largest wins: smoother borders), "auto" (nearest for what looks like a label map), "no".
        inverse: apply the inverse, computed here: for points to 0.001 mm, for scans on the transform's grid.
        matrix: what a plain 4 x 4 matrix is: "ras" (c3d_affine_tool, Greedy, NiftyReg) or "flirt" (FSL's, for which
            FILE is the moving scan and --reference the fixed one).
    """
    if len(files) < 3:
        lacks = ("FILE", "TRANSFORM", "OUTPUT")[len(files) :]
        raise InputError(f"apply needs {' and '.join(lacks)} as well; python -m common apply --help")
    *files, transform, output = map(str, files)
    scans = (files[0], str(reference)) if matrix == "flirt" and reference else None
    the_map = transform_files.read_transform(transform, matrix=str(matrix), scans=scans)
    only_points = all(file.lower().endswith(carry.POINT_ENDINGS) for file in files)
    back = None if not inverse else the_map if only_points else mapping.invert(the_map)
    options = {"reference": str(reference), "label": str(label), "back": back, "name": transform}
    if len(files) == 1:
        return _written(output, carry.carry(files[0], the_map, output, **options))
    places = carry.names_in(output, tuple(files))
    io.output_folder(output)
    told = [carry.carry(file, the_map, place, **options) for file, place in zip(files, places)]
    return "\n".join(_written(place, text) for place, text in zip(places, told))


def compose(output: str, *transforms: str, reference: str = ""):
    """Several transforms in one file: a point goes through them in the order given.

    With fixed scan A and moving scan B in the first registration, B and C in the second, `compose OUT FIRST SECOND`
    brings scan C onto A with one interpolation.

    Args:
        output: .h5 keeps the parts in an ITK composite; .nii.gz, .nrrd, .mha collapse them into one displacement image.
        transforms: two or more files: .h5, .tfm, .txt, .mat, or displacement images.
        reference: scan on whose grid a displacement image is written.
    """
    if not transforms:
        raise InputError(f"{output}: compose needs the transforms after the name of the output")
    maps = [transform_files.read_transform(str(path)) for path in transforms]
    whole = mapping.compose(*maps)
    return _write_map(whole, output, reference, whole)


def invert(transform: str, output: str, *, reference: str = ""):
    """The inverse of a transform; says how far points of the reference come to lie from where they started.

    That is there by the transform and back by the inverse that is written: inverse_file_error_mm of a bundle's report.
    Affine parts are inverted exactly, displacement fields on their own grid. Where a field folds there is no inverse.

    Args:
        transform: .h5, .tfm, .txt, .mat, or a displacement image.
        output: file to write: .h5, or a displacement image on the grid of --reference.
        reference: scan in whose foreground the error is measured: the fixed one.
    """
    the_map = transform_files.read_transform(str(transform))
    back = mapping.invert(the_map)
    text = ""
    if reference:
        from common.quality.measure import inverse_error_inside

        scan, affine = io.read_scan(reference)
        error = inverse_error_inside(the_map, back, scan[0], affine)
        spread = f"mean {error.mean():.3f} mm, 99th percentile {np.percentile(error, 99):.3f} mm"
        text = f"; error of this inverse in the foreground of {reference}: {spread}"
    return _write_map(back, output, reference, the_map) + text


def make_report(
    moving: str,
    fixed: str,
    transform: str,
    output: str,
    *,
    moving_label: str = "",
    fixed_label: str = "",
    moving_points: str = "",
    fixed_points: str = "",
    spacing: float = 0,
    start: str = "",
    neurological: bool = False,
):
    """Judge a registration made by any tool: report.json, report.png and report.html, and in words what looks wrong.

    "Before" is, as in a bundle's report, after the linear alignment: the linear parts of the transform, if it has
    others as well. One displacement image does not show them: then "before" is the scans as they lie, or --start.

    Args:
        moving: moving scan, in its own space.
        fixed: fixed scan.
        transform: of fixed points to the moving scan: .h5, .tfm, .txt, .mat, or a displacement image (LPS mm).
        output: folder for the files.
        moving_label: label map of the moving scan; with the fixed one gives Dice, HD95 and ASSD before and after.
        fixed_label: label map of the fixed scan.
        moving_points: landmarks of the moving scan (.csv, .fcsv, .mrk.json); with the fixed ones gives the TRE in mm.
        fixed_points: landmarks of the fixed scan, in the same order.
        spacing: voxel size in mm on which the deformation is measured; 0 keeps the fixed scan's.
        start: the alignment that "before" is: a linear transform of fixed points to the moving scan.
        neurological: draw the patient's left on the left.
    """
    from common.quality import measure, page, picture, report, verdict, views

    paths = {"moving_label": moving_label, "fixed_label": fixed_label}
    paths |= {"moving_points": moving_points, "fixed_points": fixed_points}
    for kind in ("label", "points"):
        if bool(paths[f"moving_{kind}"]) != bool(paths[f"fixed_{kind}"]):
            has, lacks = sorted((f"moving_{kind}", f"fixed_{kind}"), key=lambda name: not paths[name])
            raise InputError(f"{paths[has]}: with --{has}, --{lacks} is needed as well")
    if not isinstance(spacing, (int, float)) or not 0 <= spacing < math.inf:
        raise InputError(f"--spacing must be a size in mm, or 0 for that of the fixed scan, got {spacing}")
    given = {name: str(path) for name, path in paths.items() if path}
    given |= {"start": str(start)}
    pair = measure.read_registration(str(moving), str(fixed), str(transform), spacing=spacing or None, **given)
    row, details = measure.measure(pair, measure.warp_pair(pair))
    scans = {str(moving): pair.moving[0], str(fixed): pair.fixed[0]}
    halves = dict(zip(scans, (half[0].numpy() for half in pair.work.chunk(2))))
    notes = verdict.judge_scans(scans, halves, None) + verdict.judge(row)
    row = {"id": Path(str(output)).name, "fixed": str(fixed), "moving": str(moving)} | row
    inputs = {"moving": str(moving), "fixed": str(fixed), "transform": str(transform)} | given
    run = {"transform": str(transform), "inputs": report.inputs_of(inputs)}
    content = report.report(row, details, notes, run)
    folder = io.output_folder(str(output))
    io.replaced(folder / "report.json", lambda path: report.write_report(content, path))
    looked = views.Views(pair)
    body = picture.draw_planes(looked, neurological=neurological)
    io.replaced(folder / "report.png", lambda path: picture.draw_report(looked, content, path, body=body))
    options = {"neurological": neurological}
    io.replaced(folder / "report.html", lambda path: page.write_page(looked, content, body, path, **options))
    io.replaced(folder / "thumbnail.webp", lambda path: page.write_thumbnail(looked, path))
    told = _written(output, "report.html, report.png and report.json")
    return "\n    - ".join([f"{told}\n  verdict: {content['verdict'].upper()}", *notes])


def review(folder: str, *, neurological: bool = False):
    """Make the page of a cohort anew, FOLDER/index.html: every pair with its verdict, the most suspicious first.

    Args:
        folder: of results: --output_dir of a bundle, or any folder whose subfolders hold a report.json.
        neurological: show the patient's left on the left.
    """
    from common.run.cohort import review_folder

    path, count = review_folder(Path(str(folder)), neurological=neurological)
    return _written(str(path), f"{count} pairs")


def make_phantom(folder: str):
    """Write the synthetic pair that the bundles register when nothing is given: scans, label maps, landmarks.

    Args:
        folder: new folder for fixed.nii.gz, moving.nii.gz, *_label.nii.gz and *_points.csv.
    """
    from common.run.example import write_phantom

    write_phantom(Path(str(folder)))
    return _written(folder, "the phantom pair")


def datalist(name: str, folder: str, *, output: str = ""):
    """Write dataset.json for a data set of the papers, from the folder as its owners distribute it.

    The sets are ixi, lpba40, abdomen_ctct, oasis, lungct, nlst, ibsr18, cumc12, mgh10. Train and infer on it with
    --dataset_dir and the preset that is printed, as one more --config_file behind train.json or inference.json.

    Args:
        name: of the set.
        folder: the unpacked download.
        output: folder for dataset.json, and for what must be converted; that of the data if not given.
    """
    from common.train.datalists import write_datalist

    content = write_datalist(str(name), str(folder), str(output) or None)
    counts = ", ".join(f"{len(content[part])} {part}" for part in ("training", "validation", "test"))
    preset = Path(__file__).parent / "train" / "presets" / f"{content['preset']}.json"
    pairs = len(content["registration_pairs"])
    path = Path(str(output) or str(folder)) / "dataset.json"
    return _written(str(path), f"{counts}, {pairs} pairs; preset {os.path.relpath(preset)}")


def pack_bundles(*names: str, output: str = "dist", url: str = ""):
    """Write each bundle as NAME_vVERSION.zip that runs alone, NAME_vVERSION.zip.sha256, and models/model_info.json.

    The list is what MONAI's downloader reads in a repository, at the tag of a release: commit it there as it is.

    Args:
        names: of bundles, or their folders.
        output: folder for the files.
        url: folder where the files will be published, https://...; goes into the list.
    """
    from common.publish.pack import pack

    if not names:
        raise InputError("pack needs the names of bundles")
    zips = [pack(str(name), output=str(output), url=str(url))[0] for name in names]
    return _written(output, f"{', '.join(path.name for path in zips)}, .sha256 beside, models/model_info.json")


def publish_bundle(name: str, folder: str, *, layout: str = "huggingface", repo: str = ""):
    """Write a bundle as the files of a Hugging Face repository, or of its entry in MONAI's Model Zoo.

    huggingface, one repository a bundle: upload the folder, tag the commit with the bundle's version, and move the tag
    latest_version to it: that is where `monai.bundle download --source huggingface_hub --repo OWNER/NAME` looks.
    model-zoo: the folder is hf_models/NAME of a fork of Project-MONAI/model-zoo; sign the commit off (git commit -s).

    Args:
        name: of a bundle, or its folder.
        folder: new folder for the files.
        layout: huggingface or model-zoo.
        repo: OWNER/NAME of the repository on Hugging Face, of model-zoo.
    """
    from common.publish.hub import publish

    path = publish(str(name), str(folder), layout=str(layout), repo=str(repo))
    of_hub = "tag its commit VERSION and latest_version"
    return _written(path, of_hub if layout == "huggingface" else "hf_models/NAME; commit it with git commit -s")


def verify_zip(file: str, checksum: str = ""):
    """Compare a downloaded bundle with its SHA-256.

    Args:
        file: the zip; `monai.bundle download` calls it NAME.zip.
        checksum: the .sha256 file of the release, or its 64 digits; by default FILE.sha256.
    """
    from common.publish.pack import verify

    return f"{file}: is as published, SHA-256 {verify(str(file), str(checksum))}"


def export_network(
    name: str, output: str, size: tuple[int, int, int], format: str = "", weights: str = "", config: str = ""
):
    """Write a bundle's network as one file (.pt2, .ts, .onnx): `image`, the stacked scans, gives `disp`.

    In torch: torch.export.load(FILE).module()(image)["disp"], torch.jit.load(FILE)(image)["disp"].

    Args:
        name: of a bundle, or its folder.
        output: file to write: .pt2 for torch.export, .ts for TorchScript, .onnx for ONNX.
        size: I,J,K of the images in voxels, as 96,112,96; a .pt2 and an .onnx take this size only, a .ts any.
        format: pt2, torchscript or onnx, if it is not to be read from the ending.
        weights: of the network; models/model.pt if not given.
        config: one more config file, laid over inference.json, that changes network_def.
    """
    from common.publish.export import export

    export(str(name), str(output), size=size, format=str(format), weights=str(weights), config=str(config))
    return _written(output, f"the network, `image` of {' x '.join(map(str, size))} voxels in, `disp` out")


def options(bundle: str, *, training: bool = False):
    """Every option of a bundle, its default, what it takes and does.

    Args:
        bundle: name of a bundle of the repository, or its folder.
        training: those of train.json, not of inference.json.
    """
    from common.run.help import help_of_bundle

    return help_of_bundle(bundle, training=training)


def _write_map(transform, output: str, reference: str, of_fixed) -> str:
    """Write a map; `of_fixed` is the one whose points are those of the reference."""
    grid = io.read_grid(str(reference)) if reference else None
    transform_files.write_transform(transform, str(output), grid)
    if grid and mapping.reach(of_fixed, *grid) < REACH:
        text = f"{reference}: lies outside of the displacement, which changes nothing there; is it the fixed scan?"
        warnings.warn(text, RegistrationWarning, stacklevel=1)
    return _written(output, f"{len(mapping.parts(transform))} part(s)")


def _written(output: str, what: str) -> str:
    return f"wrote {os.path.abspath(str(output))}: {what}"


COMMANDS = {
    "register": register,
    "run": run,
    "series": series,
    "bids": bids,
    "apply": apply,
    "compose": compose,
    "invert": invert,
    "report": make_report,
    "review": review,
    "template": template,
    "options": options,
    "phantom": make_phantom,
    "datalist": datalist,
    "pack": pack_bundles,
    "publish": publish_bundle,
    "verify": verify_zip,
    "export": export_network,
    "label": label,
    "deploy": deploy,
}


def main() -> None:
    """Run one command; an InputError, or a disk that is full, ends in its sentence and exit code 1."""
    printable()
    command, *words = sys.argv[1:] or ["--help"]
    try:
        if command in ("--help", "-h", "help"):
            print(_overview())
            return
        if command not in COMMANDS:
            near = difflib.get_close_matches(command, COMMANDS, n=1)
            hint = f", did you mean {near[0]}?" if near else f"; there are {', '.join(COMMANDS)}"
            raise InputError(f"{command}: there is no such command{hint}")
        if command in ("register", "run", "series", "bids", "template"):  # options of the bundles
            if said := COMMANDS[command](words):
                print(said)
            return
        if asks_help(words):
            words = ["--", "--help"]  # behind "--" it is fire's own, which says nothing around it
        else:
            words = exact_words(command, COMMANDS[command], words)
        if _run(command, words):
            sys.exit(EMPTY_CODE)
    except (InputError, OSError) as error:
        if (sentence := sentence_of(error)) is None:
            raise
        sys.exit(f"error: {sentence}")


def _run(command: str, words: list[str]) -> bool:
    """Run a command and print its warnings as sentences; whether one of them is an `EmptyResult`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RegistrationWarning)
        fire.Fire(COMMANDS, command=[command, *words], name="common")
    for warning in caught:
        if issubclass(warning.category, RegistrationWarning):
            print(f"warning: {warning.message}", file=sys.stderr)
    return any(issubclass(warning.category, EmptyResult) for warning in caught)


def register_main() -> None:
    """`monai-register`, which the package installs; `monai-register bids` is a command of its own."""
    if sys.argv[1:2] != ["bids"]:
        sys.argv.insert(1, "register")
    main()


def _overview() -> str:
    """Every command with what it does."""
    lines = [f"  {name:9} {inspect.getdoc(function).splitlines()[0]}" for name, function in COMMANDS.items()]
    return "\n".join(["python -m common COMMAND ...; python -m common COMMAND --help says more", "", *lines])


if __name__ == "__main__":
    main()
