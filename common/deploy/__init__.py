"""MONAI Deploy: DICOM in, DICOM out.

`series` reads headers, `dsro` writes DICOM Deformable Spatial Registration objects, both with pydicom alone;
`operators` and `pair_app` need the MONAI Deploy App SDK.
May import: `common.run`, `common.quality`, `common.space`, the science, `common.ops`; the SDK in those two only.
"""
