"""Check the backend `tensorrt` against NVIDIA's own Python bindings, without a GPU and without TensorRT's libraries.

    make check-tensorrt

The bindings are installed into an environment of their own, in build/check-tensorrt. Three empty libraries stand for those that
they link, so that they can be imported, which says what every class and function takes; nothing can be built or run that
way. Stubs are made of that, and mypy checks the backend against them, strictly; the double that the tests use has nothing that
is not there either. NVIDIA's licence lets nobody pass on the
stubs, so each machine makes its own.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "check-tensorrt"

BINDINGS = "tensorrt_cu13_bindings==11.4.0.106"
TOOLS = ("pybind11-stubgen==3.0.0", "numpy")

LIBRARIES = {
    "libnvinfer.so.11": (
        "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry", "getPluginRegistry",
    ),
    "libnvonnxparser.so.11": (
        "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion",
    ),
    "libnvinfer_plugin.so.11": ("initLibNvInferPlugins",),
}  # fmt: skip
"""What the bindings link, and the functions that they look for there."""

DOUBLE = ROOT / "tests" / "backends" / "tensorrt_double.py"

PARTS = sorted(path.stem for path in (ROOT / "backends").glob("*tensorrt*.py"))

CONFIG = """[mypy]
strict = True
warn_unused_ignores = False
mypy_path = {path}
[mypy-tensorrt.*]
ignore_errors = True
[mypy-cuda.*,onnxruntime.*]
ignore_missing_imports = True
follow_imports = skip
"""


def main() -> int:
    """The exit code of mypy."""
    python = FOLDER / "env" / "bin" / "python"
    if not python.exists():
        venv.create(FOLDER / "env", with_pip=True)
    pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", BINDINGS], check=True)
    subprocess.run([*pip, *TOOLS], check=True)
    libraries = FOLDER / "libraries"
    make_libraries(libraries)
    make_stubs(python, libraries, FOLDER / "stubs")
    config = FOLDER / "mypy.ini"
    config.write_text(CONFIG.format(path=f"{ROOT / 'build' / 'namespace'}:{FOLDER / 'stubs'}"), encoding="utf-8")
    argv = [sys.executable, "-m", "mypy", "--config-file", str(config), "--cache-dir", str(FOLDER / "cache")]
    wrong = differences(DOUBLE.read_text("utf-8"), (FOLDER / "stubs" / "tensorrt" / "__init__.pyi").read_text("utf-8"))
    for line in wrong:
        print(f"{DOUBLE.relative_to(ROOT)}: {line}")
    modules = [argument for part in PARTS for argument in ("-m", f"lensc.backends.{part}")]
    return subprocess.run([*argv, *modules], check=False).returncode or len(wrong)


def make_libraries(folder: Path) -> None:
    """Libraries whose functions do nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, functions in LIBRARIES.items():
        source = folder / f"{name}.c"
        source.write_text("".join(f"void *{function}(void) {{ return 0; }}\n" for function in functions), "utf-8")
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), str(source)]
        subprocess.run(command, check=True)


def make_stubs(python: Path, libraries: Path, folder: Path) -> None:
    """`<folder>/tensorrt/__init__.pyi`, of what the bindings say of themselves."""
    made = folder / "made"
    command = [
        str(python),
        "-m",
        "pybind11_stubgen",
        "tensorrt_bindings.tensorrt",
        "-o",
        str(made),
        "--ignore-all-errors",
    ]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    environment.pop("PYTHONPATH", None)
    subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)
    text = (made / "tensorrt_bindings" / "tensorrt.pyi").read_text(encoding="utf-8")
    package = folder / "tensorrt"
    package.mkdir(parents=True, exist_ok=True)
    text = re.sub(r"\btensorrt_bindings\.tensorrt\.", "", text)
    text = "\n".join(map(_readable, text.splitlines()))
    # of what the bindings' own __init__ adds, the part that is used
    (package / "__init__.pyi").write_text(text + "\n__version__: str\n", encoding="utf-8")


def differences(double: str, stubs: str) -> list[str]:
    """What the tests' double of TensorRT has that the bindings have not: classes, members, numbers of parameters."""
    real = {node.name: node for node in ast.walk(ast.parse(stubs)) if isinstance(node, ast.ClassDef)}
    [module] = [node for node in ast.parse(double).body if isinstance(node, ast.ClassDef) and node.name == "Double"]
    found = []
    classes = [node for node in ast.walk(module) if isinstance(node, ast.ClassDef) and node is not module]
    for made in classes:
        if made.name not in real:
            found.append(f"{made.name} is no class of TensorRT")
            continue
        members = _members(real[made.name])
        for name, parameters in _members(made).items():
            if name == "__init__" and parameters == {0}:
                continue  # what the bindings make by themselves
            if name not in members:
                found.append(f"{made.name} has no {name}")
            elif parameters and members[name] and not parameters & members[name]:
                found.append(f"{made.name}.{name} takes {sorted(members[name])} arguments, not {sorted(parameters)}")
    return found if classes else ["has no class"]


def _members(made: ast.ClassDef) -> dict[str, set[int]]:
    """The members of a class that are not private, and how many arguments each function may take."""
    found: dict[str, set[int]] = {}
    for node in made.body:
        if isinstance(node, ast.FunctionDef) and (node.name == "__init__" or not node.name.startswith("_")):
            count, optional = len(node.args.args) - 1, len(node.args.defaults)
            found.setdefault(node.name, set()).update(range(count - optional, count + 1))
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                found |= {name.id: set() for name in names if isinstance(name, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = set()
    return found


def _readable(line: str) -> str:
    """The line of a stub, or the function in it without its parameters where they are no Python: one is called `in`."""
    if not re.match(r"\s*def \w+\(", line):
        return line
    try:
        ast.parse(f"{line.strip()} ...")
    except SyntaxError:
        return re.sub(r"\(.*", "(self, *args: typing.Any, **named: typing.Any) -> typing.Any:", line)
    return line


if __name__ == "__main__":
    sys.exit(main())
