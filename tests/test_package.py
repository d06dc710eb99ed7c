"""The package as a whole: what importing it does, who imports whom, what is installed."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import visualrwkv

PACKAGE = Path(visualrwkv.__file__).parent
ROOT = PACKAGE.parent

# A module imports only from layers above its own in this list (packages may import within themselves).
LAYERS = [
    ["errors"],
    ["addresses", "paths", "prompt", "scan", "state", "ops"],
    ["configuration"],
    [
        "projector",
        "cuda_graphs",
        "tokenization",
        "image_processing",
        "info",
        "scenes",
        "yaml_fields",
    ],
    ["inference", "vision", "processing", "recipe", "streaming", "checkpoint_layout", "sampling", "saved_chat"],
    ["rwkv", "decoding", "runs"],
    ["modeling", "session"],
    ["checkpoints", "chat", "registration"],
    ["loading", "terminal", "serving"],
    ["scenes.accuracy", "data", "trainer"],
    ["scenes.card"],
    ["building"],
    ["contrastive"],
    ["training", "inspection"],
    ["cli"],
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# Slow to import or not always installed: only inside the functions that need them.
LAZY = {"open_clip", "timm", "gradio", "torchvision", "accelerate", "peft", "yaml", "rwkv", "torchao", "httpx"}


def in_a_new_process(script, *arguments, **options):
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_importing_takes_no_time_and_does_nothing_else(tmp_path):
    script = """
import logging, os, sys, time
import torch
before, threads = set(sys.modules), torch.get_num_threads()
start = time.perf_counter()
import visualrwkv
print(time.perf_counter() - start)
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert new <= {"visualrwkv", "importlib"}, new
assert not logging.getLogger().handlers and torch.get_default_dtype() == torch.float32
assert torch.get_num_threads() == threads and os.listdir() == []
"""
    environment = {"PATH": "", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}  # no compiler
    done = in_a_new_process(script, cwd=tmp_path, env=environment)
    assert float(done.stdout) < 1
    assert done.stderr == "" and list(tmp_path.iterdir()) == []


def test_public_names_exist():
    for name in visualrwkv.__all__:
        assert getattr(visualrwkv, name) is not None
        assert name in dir(visualrwkv)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = visualrwkv.nothing
    from visualrwkv.ops import wkv6, wkv6_reference

    assert callable(wkv6) and callable(wkv6_reference)


AUTO = """
import sys
{first}
{second}
folder = sys.argv[1]
assert type(AutoConfig.from_pretrained(folder)) is visualrwkv.VisualRWKVConfig
assert type(AutoModelForImageTextToText.from_pretrained(folder)) is visualrwkv.VisualRWKVForConditionalGeneration
assert type(AutoTokenizer.from_pretrained(folder)) is visualrwkv.RWKVWorldTokenizer
assert type(AutoImageProcessor.from_pretrained(folder)) is visualrwkv.VisualRWKVImageProcessor
assert type(AutoProcessor.from_pretrained(folder)) is visualrwkv.VisualRWKVProcessor
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("visualrwkv")]
"""
OURS = "import visualrwkv"
MODEL = "from visualrwkv import VisualRWKVForConditionalGeneration"
AUTOS = (
    "from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer"
)


@pytest.mark.parametrize(
    ("first", "second"),
    [(OURS, AUTOS), (AUTOS, OURS), (f"{OURS}; {MODEL}", AUTOS)],
    ids=["visualrwkv first", "transformers first", "model first"],
)
def test_auto_classes_know_us(random_folder, first, second):
    in_a_new_process(AUTO.format(first=first, second=second), random_folder)


def imports_of(path):
    """(module, whether at module level) for every import of a file; names inside this package without its name."""
    inside = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT)
    package = ".".join(("visualrwkv", *inside.parent.parts))

    def walk(node, top):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = ".".join(package.split(".")[: len(package.split(".")) - child.level + 1]) if child.level else ""
                module = ".".join(filter(None, (base, child.module)))
                names = [alias.name for alias in child.names] if module == "visualrwkv" else [""]
                yield from ((f"{module}.{name}".rstrip("."), top) for name in names)
            yield from walk(child, top and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), True)


def module_of(name):
    """The entry of `RANK` that a module's dotted name belongs to."""
    parts = name.split(".")
    return name if name in RANK else parts[0]


def test_imports_run_one_way():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if own == "__init__":
            continue
        assert module_of(own) in RANK, f"{own} has no place in LAYERS"
        for name, top in imports_of(path):
            if name.split(".")[0] in LAZY and top:
                wrong.append(f"{own} imports {name} at module level")
            if not name.startswith("visualrwkv."):
                continue
            other = module_of(name.removeprefix("visualrwkv."))
            if other.startswith("__") or other == module_of(own):
                continue
            if own in ("registration",):  # it hands our classes to transformers, inside functions
                assert not top
            elif RANK[other] >= RANK[module_of(own)]:
                wrong.append(f"{own} imports {other}")
            elif own == "cli" and top and other not in ("errors", "prompt"):
                wrong.append(f"cli imports {other} at module level")
    assert not wrong


def test_the_lowest_layer_needs_torch_alone():
    for name in ("state.py", "ops/__init__.py", "ops/reference.py", "ops/chunked.py"):
        third = {module.split(".")[0] for module, _ in imports_of(PACKAGE / name)} - set(sys.stdlib_module_names)
        assert third <= {"torch", "visualrwkv"}, name


def test_nothing_imports_the_app_or_the_evaluation():
    for path in PACKAGE.rglob("*.py"):
        for name, _ in imports_of(path):
            assert not re.match(r"(visualrwkv\.)?(demo|eval)(\.|$)|gradio", name), path


def test_the_evaluation_uses_public_names():
    allowed = {"errors", "prompt", "sampling", "loading", "image_processing", "streaming", "eval"}
    seen = set()
    for path in (ROOT / "eval").glob("*.py"):
        for name, top in imports_of(path):
            package, *parts = name.split(".")
            if package == "visualrwkv" and parts:
                seen.add(parts[0])
                assert parts[0] in allowed and not parts[-1].startswith("_"), f"{path.name} imports {name}"
            slow = {"torch", "transformers", "PIL", "lmms_eval", "tqdm"}  # scoring works without them
            light = ("visualrwkv.errors", "visualrwkv.prompt", "visualrwkv.eval")
            if top and path.name != "lmms.py":
                assert package not in slow and (package != "visualrwkv" or name.startswith(light)), (path.name, name)
    assert seen  # the folder was found


def test_the_demo_uses_public_names():
    allowed = {"InputError", "addresses", "configuration", "demo", "errors", "image_processing", "paths", "scenes"}
    seen = set()
    for path in (ROOT / "demo").glob("*.py"):
        for name, _ in imports_of(path):
            package, *parts = name.split(".")
            if package == "visualrwkv" and parts:
                seen.add(parts[0])
                assert parts[0] in allowed and not parts[-1].startswith("_"), f"{path.name} imports {name}"
    assert seen  # the folder was found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Names in the wheel, built from a copy so that the tree stays clean."""
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("needs the source tree")
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "runs", "shared", "tests")
    shutil.copytree(ROOT, folder / "tree", ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "-w", folder, folder / "tree"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file).namelist()


def test_the_wheel_is_complete_and_adds_one_name(wheel):
    assert {name.split("/")[0] for name in wheel} == {"visualrwkv", f"visualrwkv-{visualrwkv.__version__}.dist-info"}
    sources = [path for path in PACKAGE.rglob("*.py")]
    expected = {f"visualrwkv/{path.relative_to(PACKAGE).as_posix()}" for path in sources}
    parts = (
        ("demo", "*.py"),
        ("demo", "*.css"),
        ("demo", "*.js"),
        ("eval", "*.py"),
        ("configs", "*.yaml"),
        ("csrc", "*"),
    )
    for folder, pattern in parts:
        found = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern) if path.is_file()}
        assert found
        expected |= {f"visualrwkv/{name}" for name in found}
    assets = {path for path in (PACKAGE / "assets").rglob("*") if path.is_file()}
    expected |= {f"visualrwkv/{path.relative_to(PACKAGE).as_posix()}" for path in assets}
    assert expected <= set(wheel)
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def test_the_source_archive_is_the_whole_repository(tmp_path):
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("needs the source tree")
    pytest.importorskip("setuptools", minversion="77")
    tree = tmp_path / "tree"
    folders = (".ci", "bench", "configs", "csrc", "demo", "docs", "eval", "tests", "visualrwkv")
    for folder in folders:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.suffix in (".md", ".toml", ".in") or path.name in ("LICENSE", "Makefile", ".gitignore"):
            shutil.copy(path, tree)
    expected = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    build = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    command = [sys.executable, "-c", build, str(tmp_path)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert "tests/conftest.py" in expected and expected <= names, expected - names


def test_the_oldest_python_is_named_everywhere_and_that_of_the_dependencies():
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("needs the source tree")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    oldest = project["project"]["requires-python"].removeprefix(">=")
    assert f"\nPython {oldest} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.findall(r"Python (3\.\d+) or newer|older than (3\.\d+)", makefile) == [(oldest, ""), ("", oldest)]
    assert f"({oldest.replace('.', ', ')})" in makefile
    assert project["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    for line in project["project"]["dependencies"]:
        needed = Requirement(line)
        floor = max((Version(one.version) for one in needed.specifier), default=None)
        if floor == Version(metadata.version(needed.name)):  # what is installed is the oldest that may be
            asked = metadata.metadata(needed.name)["Requires-Python"] or ""
            assert Version(f"{oldest}.0") in SpecifierSet(asked), f"{line} needs Python {asked}"
