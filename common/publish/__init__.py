"""A bundle on its way to others: zips that run alone, their checksums, exported networks.

Takes bundles as folders and configs, never by import.
May import: `common.run`, `common.quality`, `common.space`, the science, `common.ops`.
"""
