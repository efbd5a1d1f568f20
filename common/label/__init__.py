"""MONAI Label: label propagation and registration by the bundles, in the annotator's tool.

`folder` writes an app folder, `requests` says what a request means; both need no MONAI Label. `app` is the app itself.
May import: `common.run`, `common.quality`, `common.space`, the science, `common.ops`; the host in `app` only.
"""
