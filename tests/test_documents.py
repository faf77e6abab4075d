"""What documents cite is there: files, symbols, modules, links, flags and config settings."""

import ast
import functools
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("[!.]*/**/README.md"))]
DOCUMENTS = [path for path in DOCUMENTS if ".venv" not in path.parts]
TOPS = r"(?:configs|launch|jointseg_jax|tests|\.assets|\.ci)"
FILE = re.compile(rf"(?<![\w./-]){TOPS}/[\w./-]*[\w/]")
SYMBOL = re.compile(r"(jointseg_jax/[\w/]+\.py):([A-Za-z_][\w.]*)")
MODULE = re.compile(r"python -m (jointseg_jax[\w.]*\w)")
LINK = re.compile(r"\]\(([^)#:]+)\)")
SETTING = re.compile(r"--config\.([\w.]+)")
COMMAND = re.compile(r"launch/(\w+)\.py((?:[^`\n]|\\\n)*)")
FLAG = re.compile(r"(?<![\w-])--([a-z]\w*)(?![\w.]|\.\w)")


def of_documents(pattern):
    """(document, match) of a pattern, by the document's path."""
    return sorted(
        {
            (str(path.relative_to(ROOT)), *([found] if isinstance(found, str) else found))
            for path in DOCUMENTS
            for found in pattern.findall(path.read_text())
        }
    )


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    assert {"configs", "launch", "jointseg_jax", "tests"} <= {p.parent.name for p in DOCUMENTS}


@pytest.mark.parametrize(("document", "path"), of_documents(FILE))
def test_a_cited_file_is_there(document, path):
    assert (ROOT / path).exists(), f"{document} cites {path}"


@pytest.mark.parametrize(("document", "path"), of_documents(LINK))
def test_a_link_leads_to_a_file(document, path):
    assert ((ROOT / document).parent / path).exists()


@pytest.mark.parametrize(("document", "path", "symbol"), of_documents(SYMBOL))
def test_a_cited_symbol_is_there(document, path, symbol):
    body = ast.parse((ROOT / path).read_text()).body
    for name in symbol.split("."):
        found = [node for node in body if name in names_of(node)]
        assert found, f"{document} cites {symbol} of {path}"
        body = getattr(found[0], "body", [])


def names_of(node):
    """The names that a statement binds."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return {node.name}
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return {target.id for target in targets if isinstance(target, ast.Name)}


@pytest.mark.parametrize(("document", "module"), of_documents(MODULE))
def test_a_module_that_is_run_is_there(document, module):
    assert (ROOT / (module.replace(".", "/") + ".py")).exists()


@functools.cache
def flags_of(launcher):
    """The flags of a launcher: its own and those of processes."""
    files = (ROOT / f"launch/{launcher}.py", ROOT / "jointseg_jax/cli.py")
    calls = [
        n for f in files for n in ast.walk(ast.parse(f.read_text())) if isinstance(n, ast.Call)
    ]
    definitions = [c for c in calls if "define_" in ast.unparse(c.func).lower()]
    texts = [[a.value for a in c.args if isinstance(a, ast.Constant)] for c in definitions]
    return {next(filter(None, values), "") for values in texts} | {"config", "help"}


def commands():
    """(document, launcher, flag) of every command."""
    return sorted(
        {
            (document, launcher, flag)
            for document, launcher, rest in of_documents(COMMAND)
            for flag in FLAG.findall(rest)
            if (ROOT / f"launch/{launcher}.py").exists()
        }
    )


@pytest.mark.parametrize(("document", "launcher", "flag"), commands())
def test_a_flag_of_a_command_is_there(document, launcher, flag):
    assert flag in flags_of(launcher)


@functools.cache
def settings():
    """Every path of every config, as a.b.c."""

    def paths(values, prefix=""):
        for key, value in values.items():
            yield prefix + key
            if isinstance(value, dict):
                yield from paths(value, f"{prefix}{key}.")

    found = set()
    for file in (ROOT / "configs").glob("*.py"):
        get = runpy.run_path(str(file))["get_config"]
        for argument in ("",) if file.stem == "quickstart" else ("data=scenes", "data=folders"):
            found |= set(paths(get(argument).to_dict()))
    return found


@pytest.mark.parametrize(("document", "setting"), of_documents(SETTING))
def test_a_setting_of_a_command_is_there(document, setting):
    known = settings() | {"data.train.folder", "PATH", "system.denoiser.remat"}
    assert setting in known, f"{document} sets {setting}"
