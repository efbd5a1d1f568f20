"""The arrows of the design: who may import whom, read from the source without running it.

`python tests/test_imports.py` prints which folder of `common` imports which, and how often.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMON = sorted((ROOT / "common").rglob("*.py"))
BUNDLE_FILES = sorted((ROOT / "bundles").rglob("*.py"))
BUNDLE_NAMES = sorted(p.name for p in (ROOT / "bundles").iterdir() if p.is_dir())
REFERENCES = sorted((ROOT / "common" / "ops").glob("*/reference.py"))
OTHER_REFERENCES = [f"common.ops.{p.parent.name}.reference" for p in REFERENCES]
# a folder of `common` -> the folders below it that it may import; "science" are the files beside the folders
SCIENCE = ("ops", "science")
ROOMS = {
    "ops": ("ops",),
    "science": SCIENCE,
    "space": ("science", "space"),
    "quality": (*SCIENCE, "space", "quality"),
    "run": (*SCIENCE, "space", "quality", "run"),
    "train": (*SCIENCE, "space", "quality", "run", "train"),
    "publish": (*SCIENCE, "space", "quality", "run", "publish"),
    "label": (*SCIENCE, "space", "quality", "run", "label"),
    "deploy": (*SCIENCE, "space", "quality", "run", "deploy"),
    "adapters": (*SCIENCE, "space", "quality", "run", "adapters"),
    "slicer": (),
    "__main__": (*SCIENCE, "space", "quality", "run", "train", "publish", "label", "deploy"),
}
BY_NAME = ("import_module", "optional_import", "__import__", "importorskip", "Later")  # calls that import by name

# a package that is not everywhere -> the only places that may import it, at any level of a file
GATES = {
    "triton": ("common/ops/_triton.py", "common/ops/*/kernel.py"),
    "common.ops._triton": ("common/ops/*/kernel.py",),
    "itk": ("common/space/*.py",),
    "monailabel": ("common/label/app.py",),
    "common.label.app": (),
    "monai.deploy": ("common/deploy/operators.py", "common/deploy/pair_app.py"),
    "common.deploy.pair_app": ("common/deploy/command.py",),
    "common.deploy.operators": ("common/deploy/pair_app.py",),
    "pydicom": ("common/space/dicom.py", "common/deploy/series.py", "common/deploy/dsro.py"),
    "highdicom": (),
    "nipype": ("common/adapters/nipype_interface.py",),
    "physiotwin4d": ("common/adapters/physiotwin.py",),
    "common.adapters": (),
    "slicer": ("common/slicer/MonaiRegister/MonaiRegister.py",),
    "qt": ("common/slicer/MonaiRegister/MonaiRegister.py",),
    "ctk": ("common/slicer/MonaiRegister/MonaiRegister.py",),
}


def imported(source: str, package: str = "") -> Iterator[str]:
    """Full names of all modules that `source` imports: statements anywhere, and import calls with a literal name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            stem = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in BY_NAME and isinstance(node.args[0].value, str):
                yield node.args[0].value


def imports_of(path: Path) -> set[str]:
    return set(imported(path.read_text(), ".".join(path.relative_to(ROOT).parent.parts)))


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_scanner_sees_every_form() -> None:
    source = (
        "import a.b as x, c\nfrom d import e\nfrom . import f\nfrom ..g import h\n"
        "def late():\n    if True:\n        import i\n    optional_import('j', name='k')\n"
        "    importlib.import_module('l')\nfind_spec('m')\n"
    )
    assert set(imported(source, "p.q")) == {"a.b", "c", "d.e", "p.q.f", "p.g.h", "i", "j", "l"}
    assert within("monai.deploy.core", "monai.deploy") and not within("monai.deployment", "monai.deploy")


def test_files_are_found() -> None:
    names = [name(p) for p in COMMON + BUNDLE_FILES]
    assert {"common/fields.py", "common/space/io.py", "bundles/sacb_net/sacb_net/network.py"} <= set(names)
    assert len(REFERENCES) >= 5


@pytest.mark.parametrize("package", GATES)
def test_gated_packages(package: str) -> None:
    for path in COMMON + BUNDLE_FILES:
        if not any(path.relative_to(ROOT).match(pattern) for pattern in GATES[package]):
            found = [m for m in imports_of(path) if within(m, package)]
            assert not found, f"{name(path)} imports {found}; only {GATES[package]} may"


@pytest.mark.parametrize("path", REFERENCES, ids=name)
def test_references_are_plain_torch(path: Path) -> None:
    for module in imports_of(path):
        plain = within(module, "torch") or module.partition(".")[0] in sys.stdlib_module_names
        plain |= within(module, "common.ops._checks") or any(within(module, other) for other in OTHER_REFERENCES)
        assert plain, f"{name(path)} imports {module}"


def test_references_are_not_compiled() -> None:
    """They are the truth: no custom operator and no autograd function of our own."""
    for path in REFERENCES:
        attributes = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
        assert not {"custom_op", "Function"} & attributes, name(path)


@pytest.mark.parametrize("path", COMMON, ids=name)
def test_common_imports_no_bundle(path: Path) -> None:
    for module in imports_of(path):
        assert module.partition(".")[0] not in {"bundles", *BUNDLE_NAMES}, f"{name(path)} imports {module}"


def room(path: Path) -> str:
    """The folder of `common` that a file lies in, "science" for the files beside the folders."""
    inside = path.relative_to(ROOT / "common")
    return inside.parts[0] if len(inside.parts) > 1 else "__main__" if inside.stem == "__main__" else "science"


def room_of_module(module: str) -> str | None:
    """The same for the name of a module; None for what is not of `common`, or of its __init__.py."""
    head, *rest = module.split(".")
    if head != "common" or not rest:
        return None
    if (ROOT / "common" / rest[0]).is_dir():
        return rest[0]
    return "science" if (ROOT / "common" / f"{rest[0]}.py").is_file() else None


@pytest.mark.parametrize("path", COMMON, ids=name)
def test_arrows_go_down(path: Path) -> None:
    for module in imports_of(path):
        assert room_of_module(module) in (None, *ROOMS[room(path)]), f"{name(path)} imports {module}"


def test_space_takes_only_fields_of_the_science() -> None:
    for path in (ROOT / "common" / "space").glob("*.py"):
        science = [module for module in imports_of(path) if room_of_module(module) == "science"]
        assert all(within(module, "common.fields") for module in science), f"{name(path)} imports {science}"


def test_every_room_says_what_it_is() -> None:
    rooms = {path.parent.name for path in (ROOT / "common").glob("*/__init__.py")}
    assert rooms == set(ROOMS) - {"science", "__main__"}
    for folder in rooms:
        text = ast.get_docstring(ast.parse((ROOT / "common" / folder / "__init__.py").read_text()))
        assert "May import:" in text, folder


def test_table_of_imports(capsys: pytest.CaptureFixture) -> None:
    """What the command prints: nothing above the diagonal, and the arrows that are known to be there."""
    print_table()
    head, *lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = {row: dict(zip(head[1:], cells)) for row, *cells in lines}
    assert list(table) == head[1:] == list(ROOMS)
    assert int(table["run"]["space"]) > 0 and int(table["science"]["ops"]) > 0
    for n, row in enumerate(ROOMS):
        assert all(table[row][column] == "." for column in list(ROOMS)[n + 1 :]), row


@pytest.mark.parametrize("path", BUNDLE_FILES, ids=name)
def test_bundles_import_no_other_bundle(path: Path) -> None:
    own = path.relative_to(ROOT).parts[1]
    others = {"bundles", "scripts", *BUNDLE_NAMES} - {own}
    for module in imports_of(path):
        assert module.partition(".")[0] not in others, f"{name(path)} imports {module}"


@pytest.mark.parametrize("path", COMMON + BUNDLE_FILES, ids=name)
def test_align_corners_is_no_argument(path: Path) -> None:
    """One convention for the whole collection: nobody may choose."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert "align_corners" not in [a.arg for a in arguments], f"{name(path)}:{node.lineno}"


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # what an import of it then raises is ModuleNotFoundError
import torch
from common.ops import SACB, cost_volume, kmeans, match, modulated_conv3d, norm_act, warp

x, disp = torch.randn(1, 4, 3, 4, 5), torch.randn(1, 3, 3, 4, 5)
labels, modulation = torch.zeros(1, 3, 4, 5, dtype=torch.int64), torch.rand(1, 2, 27)
runs = {
    "warp": lambda **kw: warp(x, disp, **kw),
    "match": lambda **kw: match(x, x, **kw),
    "cost_volume": lambda **kw: cost_volume(x, x, 1, disp, **kw),
    "modulated_conv3d": lambda **kw: modulated_conv3d(
        x, torch.randn(2, 4, 3, 3, 3), torch.zeros(1, 2, 2), modulation, labels, **kw
    ),
    "kmeans": lambda **kw: kmeans(x.flatten(2), 2, **kw)[1],
    "norm_act": lambda **kw: norm_act(x, **kw),
    "SACB": lambda **kw: SACB(4, clusters=2, **kw)(x),
}
for name, run in runs.items():
    assert run().isfinite().all(), name
    try:
        run(backend="triton")
    except RuntimeError as error:
        print(error)
"""


def test_runs_without_triton() -> None:
    """A process that cannot import Triton runs every operator on the CPU, and says why it has no kernels."""
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    installed = [line for line in run.stdout.splitlines() if line.endswith("'triton': Triton is not installed")]
    named = {line.partition("()")[0] for line in installed}
    assert named == {"warp", "match", "cost_volume", "modulated_conv3d", "kmeans", "norm_act"}, run.stdout


WITHOUT_HOSTS = """
import sys
for host in ("monailabel", "monai.deploy", "pydicom"):
    sys.modules[host] = None  # what an import of it then raises is ModuleNotFoundError
from common.__main__ import main

sys.argv = ["common", "deploy", "run", "--fixed", "a", "--moving", "b", "--bundle", "sacb_net", "--output", "c"]
try:
    main()
except SystemExit as error:
    print(error)
try:
    import common.label.app
except ImportError as error:
    print(error)
"""


def test_hosts_are_optional() -> None:
    """The commands start without MONAI Label, the Deploy SDK and pydicom; what needs them says so in a sentence."""
    run = subprocess.run([sys.executable, "-c", WITHOUT_HOSTS], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    deploy, label = run.stdout.splitlines()
    assert deploy.startswith("error: the MONAI Deploy App SDK cannot be used here (") and "README.md" in deploy
    assert label.startswith("MONAI Label cannot be used here (") and "common/label/README.md" in label


def print_table() -> None:
    """Rows import columns: how many files do, from the lowest folder to the highest."""
    files = {(room(path), room_of_module(module), path) for path in COMMON for module in imports_of(path)}
    print(" ".join(f"{word:>8}" for word in ("imports", *ROOMS)))
    for row in ROOMS:
        counts = [sum(a == row and b == column for a, b, _ in files) for column in ROOMS]
        print(" ".join(f"{word:>8}" for word in (row, *(count or "." for count in counts))))


if __name__ == "__main__":
    print_table()
