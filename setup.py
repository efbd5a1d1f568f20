"""What setup.cfg cannot say: the bundles travel inside the package, so that a wheel works in an empty folder."""

from setuptools import find_packages, setup

BUNDLE = ("LICENSE", "configs/*", "docs/*.txt", "docs/*.md", "models/*.pt", "*/*.py")

setup(
    packages=[*find_packages(include=["common", "common.*"]), "common.bundles"],
    package_dir={"common.bundles": "bundles"},
    package_data={
        "common.bundles": [f"*/{part}" for part in BUNDLE],
        "common.train": ["presets/*.json"],
        "common.quality": ["pages/*"],
        "common.slicer": ["MonaiRegister/*.py", "MonaiRegister/*/*.py"],
    },
)
