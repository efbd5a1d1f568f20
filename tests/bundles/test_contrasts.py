"""Several contrasts of one person as channels: real T1, T2 and FLAIR through a whole inference."""

from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
from commands import bundle_configs, command, succeeded, table
from scipy.ndimage import gaussian_filter

from common.space import io, mapping

CONTRASTS = ("T1", "T2", "FLAIR")


def inside_correlation(a: np.ndarray, b: np.ndarray, inside: np.ndarray) -> float:
    return float(np.corrcoef(a[inside], b[inside])[0, 1])


def test_three_contrasts_as_channels(development_data: Path, tmp_path: Path) -> None:
    """A person against the same, deformed and turned in space: each contrast comes back as itself, and closer.

    At 3 mm; the network is untrained (no weights for three channels exist), 30 steps of refinement do the work.
    """
    folder = development_data / "data" / "dev" / "brain_ms"
    if not (folder / "patient07_T1.nii.gz").exists():
        pytest.skip(f"development data not found at {folder}")
    turn = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1, -0.08, 0.05), [9, -6, 12])
    fixed, disp = {}, None
    for name in (*CONTRASTS, "lesion"):
        scan, affine = io.read_scan(folder / f"patient07_{name}.nii.gz")
        fixed[name] = scan[0, ::3, ::3, ::3]
    affine = affine @ np.diag([3, 3, 3, 1.0])
    size = fixed["T1"].shape
    rng = np.random.default_rng(0)
    disp = np.stack([gaussian_filter(rng.standard_normal(size), 6) for _ in range(3)])
    disp *= 3 / np.abs(disp).max()  # voxels, 9 mm
    truth = mapping.displacement_transform(disp, affine)
    for name, scan in fixed.items():
        moved = mapping.resample(scan, affine, size, affine, truth, nearest=name == "lesion")
        write = io.write_label if name == "lesion" else io.write_scan
        write(scan, affine, tmp_path / f"f_{name}.nii.gz")
        write(moved, turn @ affine, tmp_path / f"m_{name}.nii.gz")
    scans = {
        role: ";".join(str(tmp_path / f"{role[0]}_{name}.nii.gz") for name in CONTRASTS) for role in ("moving", "fixed")
    }
    options = [word for role, paths in scans.items() for word in (f"--{role}", paths)]
    options += ["--network_def#channels", 3, "--weights", "", "--trained_on", "", "--spacing", 3, "--prealign", "rigid"]
    options += ["--refine_steps", 30, "--output_dir", tmp_path / "out"]
    succeeded(command(*bundle_configs("sacb_net", "inference.json"), *options))

    (row,) = table(tmp_path / "out" / "results.csv")
    assert float(row["ncc_after"]) > float(row["ncc_before"]) + 0.02
    pair = tmp_path / "out" / "m_T1_to_f_T1"
    warped = io.read_scan(pair / "warped.nii.gz")[0]
    assert warped.shape == (3, *size)
    inside = fixed["T1"] > 0
    for n, name in enumerate(CONTRASTS):
        scores = [inside_correlation(warped[n], fixed[other], inside) for other in CONTRASTS]
        own = scores.pop(n)
        assert own > 0.75 and own > max(scores) + 0.25, f"{name} is not where it was put: {own}, others {scores}"
    (transform,) = itk.transformread(str(pair / "transform.h5"))
    alone = itk.resample_image_filter(
        itk.imread(str(tmp_path / "m_T2.nii.gz"), itk.F),
        transform=transform,
        use_reference_image=True,
        reference_image=itk.imread(str(tmp_path / "f_T1.nii.gz"), itk.F),
    )
    np.testing.assert_allclose(warped[1], itk.array_from_image(alone).T, atol=1e-3 * float(warped[1].max()))
