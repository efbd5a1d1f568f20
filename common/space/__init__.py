"""Where things are: files and their headers, grids, maps between spaces, the first alignment, points.

The only room that knows millimetres, RAS and LPS, and the only one that imports itk.
In mm: `mapping.displacement_mm` (a map on a grid, LPS), `geometry.length_mm` (lengths, for reports); `mapping.disp_of`
goes back to voxels.
May import: `common.fields`.
"""
