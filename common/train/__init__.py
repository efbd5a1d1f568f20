"""What only training uses: scans and their pairs, augmentation, labels as classes, checkpoints, public datasets.

What the bundles' train.json and multi_gpu_train.json are made of, beside `common.losses`.
May import: `common.run`, `common.quality`, `common.space`, the science, `common.ops`.
"""
