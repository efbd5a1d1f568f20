"""Where things are: files and their headers, grids, maps between spaces, the first alignment, points.

The only room that knows millimetres, RAS and LPS, and the only one that imports itk.
May import: `common.fields`.
"""
