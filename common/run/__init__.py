"""A pair and a cohort from files to files: what the bundles' inference.json and evaluate.json are made of.

Also what everything that starts a run needs: the command line's sentences, the embedded example, the Registrar.
May import: `common.quality`, `common.space`, the science, `common.ops`.
"""
