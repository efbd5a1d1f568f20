"""python -m common deploy: register two DICOM series with a bundle."""

from common import InputError


def deploy(
    action: str,
    fixed: str,
    moving: str,
    bundle: str,
    output: str,
    fixed_series: str = "",
    moving_series: str = "",
    prealign: str = "affine",
    refine_steps: int = 0,
    device: str = "",
    spacing: float | None = None,
    fixed_lesion: str = "",
    moving_lesion: str = "",
    lesion_margin: float | None = None,
    fixed_points: str = "",
    moving_points: str = "",
    guide: float | None = None,
    holdout_points: float | None = None,
    midspace: bool = False,
):
    """Register two DICOM series by a MONAI Deploy application, and write a DICOM registration object.

    OUTPUT/MOVING_to_FIXED gets what `monai.bundle run` writes, and registration.dcm.

    Args:
        action: run.
        fixed: folder with the series whose frame of reference the result gets.
        moving: folder with the series to bring there.
        bundle: name of a bundle of the repository, or its folder.
        output: folder for the results.
        fixed_series: Series Instance UID, where the folder holds several.
        moving_series: likewise.
        prealign: affine, rigid or none.
        refine_steps: of instance optimisation.
        device: where to compute, as cpu or cuda:0; the first GPU if there is one.
        spacing: voxel size in mm of the network's grid, instead of that of the weights.
        fixed_lesion: mask of what is left out of the fixed series, as NIfTI, on any grid in its space.
        moving_lesion: likewise, of the moving series.
        lesion_margin: mm by which lesions are widened.
        fixed_points: landmarks of the fixed series, in LPS mm, or of 3-D Slicer.
        moving_points: likewise, of the moving series; the n-th belongs to the n-th.
        guide: weight with which the landmarks guide the refinement; without one they are measured only.
        holdout_points: share of the landmarks that do not guide, and are measured.
        midspace: also bring both series into the space in their middle.
    """
    if action != "run":
        raise InputError(f"deploy {action}: there is only `deploy run`")
    try:
        from common.deploy.pair_app import run_pair
    except ImportError as error:
        raise InputError(f"{error}") from error
    options = {"prealign": prealign, "refine_steps": refine_steps, "device": device, "spacing": spacing}
    options |= {"fixed_lesion": fixed_lesion, "moving_lesion": moving_lesion, "lesion_margin": lesion_margin}
    options |= {"fixed_points": fixed_points, "moving_points": moving_points, "guide": guide}
    options |= {"holdout_points": holdout_points, "midspace": midspace or None}
    given = {name: value for name, value in options.items() if value not in ("", None)}
    series = {"fixed_series": str(fixed_series), "moving_series": str(moving_series)}
    folder = run_pair(str(fixed), str(moving), str(bundle), str(output), **series, **given)
    return f"wrote {folder}: registration.dcm and the files of the registration"
