"""Moves modules and renames symbols over the whole checkout at once, by the tables beside this file.

    python scripts/rename/rename.py reexports              imports name the module that defines a thing
    python scripts/rename/rename.py symbols LANGSERVER     renames by type, over code, tests and benchmarks
    python scripts/rename/rename.py modules                moves files, and rewrites imports and dotted names

`symbols` needs pyright's language server (`npm install pyright`; LANGSERVER is its `langserver.index.js`). All renames
are asked of one unchanged snapshot and their edits applied together, so that no table row sees another one's result.
Rows of symbols.tsv are "module, qualified name, new name"; a qualified name is `Class`, `Class.member`, `function`,
`CONSTANT`, `function:parameter` or `Class.method:parameter`.
"""

from __future__ import annotations

import ast
import io
import itertools
import json
import re
import subprocess
import sys
import threading
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ROOTS = ("fusecache", "mount", "tests", "benchmarks")


def sources() -> Iterator[Path]:
    """Every Python file of the project."""
    for name in ROOTS:
        yield from sorted(path for path in (ROOT / name).rglob("*.py") if not path.is_symlink())


def rows(name: str) -> list[list[str]]:
    """The rows of a table."""
    lines = (HERE / name).read_text("utf-8").splitlines()
    return [line.split("\t") for line in lines if line.strip() and not line.startswith("#")]


def file_of(module: str) -> Path:
    """Where a module lies today."""
    base = ROOT.joinpath(*module.split("."))
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def _any_of(words: dict[str, str]) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


# -- reexports


def exported(package: str) -> dict[str, str]:
    """Names that a package's `__init__` takes from its own modules, and the module of each."""
    file = file_of(package)
    found = {}
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(package + "."):
            found.update({alias.asname or alias.name: node.module for alias in node.names})
    return found


def reexports() -> None:
    """Makes every import name the module that defines the thing, and empties the `__init__`s."""
    packages = [
        f"fusecache.{name}"
        for name in ("attest", "catalog", "cluster", "config", "loader", "origin", "store", "telemetry")
    ]
    tables = {package: exported(package) for package in packages}
    for file in sources():
        if file.name == "__init__.py":
            continue
        text = file.read_text("utf-8")
        lines = text.splitlines(keepends=True)
        for node in sorted(ast.walk(ast.parse(text)), key=lambda each: -getattr(each, "lineno", 0)):
            if not isinstance(node, ast.ImportFrom) or node.module not in tables:
                continue
            table = tables[node.module]
            groups: dict[str, list[str]] = defaultdict(list)
            for alias in node.names:
                words = alias.name + (f" as {alias.asname}" if alias.asname else "")
                groups[table.get(alias.name, node.module)].append(words)
            indent = " " * node.col_offset
            new = "".join(
                f"{indent}from {module} import {', '.join(names)}\n" for module, names in groups.items()
            )
            lines[node.lineno - 1 : node.end_lineno] = [new]
        file.write_text("".join(lines), "utf-8")
    for package in packages:
        file = file_of(package)
        if package == "fusecache.origin":
            continue  # it defines open_origin: moved by hand
        text = file.read_text("utf-8")
        doc = ast.get_docstring(ast.parse(text), clean=False)
        file.write_text(f'"""{doc}"""\n' if doc else "", "utf-8")


# -- symbols


class LanguageServer:
    """A pyright that answers rename requests."""

    def __init__(self, script: str) -> None:
        self._process = subprocess.Popen(
            ["node", "--max-old-space-size=6000", script, "--stdio"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._ids = itertools.count(1)
        self._answers: dict[int, Any] = {}
        self._condition = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()
        self.request(
            "initialize",
            {
                "processId": None,
                "rootUri": ROOT.as_uri(),
                "workspaceFolders": [{"uri": ROOT.as_uri(), "name": "root"}],
                "capabilities": {
                    "workspace": {"configuration": True, "workspaceEdit": {"documentChanges": True}},
                    "textDocument": {"rename": {"prepareSupport": False}},
                },
            },
        )
        self.notify("initialized", {})

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps({"jsonrpc": "2.0", **message}).encode()
        assert self._process.stdin is not None
        self._process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(data) + data)
        self._process.stdin.flush()

    def notify(self, method: str, params: Any) -> None:
        """Sends what has no answer."""
        self._send({"method": method, "params": params})

    def request(self, method: str, params: Any) -> Any:
        """Sends a request, and waits for its answer."""
        number = next(self._ids)
        self._send({"id": number, "method": method, "params": params})
        with self._condition:
            if not self._condition.wait_for(lambda: number in self._answers, timeout=600):
                raise SystemExit(f"{method}: no answer")
            return self._answers.pop(number)

    def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        while True:
            length = 0
            while (line := stream.readline().strip()) != b"":
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            if not length:
                return
            message = json.loads(stream.read(length))
            if "method" in message and "id" in message:
                self._send({"id": message["id"], "result": self._configured(message)})
            elif "id" in message:
                with self._condition:
                    self._answers[message["id"]] = message
                    self._condition.notify_all()

    def _configured(self, message: dict[str, Any]) -> Any:
        if message["method"] != "workspace/configuration":
            return None
        python = {
            "pythonPath": str(ROOT / ".venv/bin/python"),
            "analysis": {
                "diagnosticMode": "openFilesOnly",
                "typeCheckingMode": "off",
                "indexing": True,
                "include": list(ROOTS),
                "exclude": ["**/node_modules", "**/__pycache__", ".venv", "scripts"],
            },
        }
        found = {"python": python, "python.analysis": python["analysis"]}
        return [found.get(item.get("section"), {}) for item in message["params"]["items"]]

    def close(self) -> None:
        """Ends it."""
        self._process.kill()


def position(tree: ast.Module, text: str, qualified: str) -> tuple[int, int, str]:
    """(line, column, old name) of where a symbol is defined, both from 0. Raises KeyError."""
    lines = text.splitlines()
    path, _, parameter = qualified.partition(":")
    scope: Any = tree
    parts = path.split(".")
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        found = None
        for node in scope.body if hasattr(scope, "body") else ():
            candidates = [node]
            if isinstance(node, ast.If | ast.Try | ast.With):
                candidates = list(ast.walk(node))
            for each in candidates:
                if (
                    isinstance(each, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                    and each.name == part
                ):
                    found = found or each
        if found is None and last and not parameter:
            return (*_assigned(scope, lines, part), part)
        if found is None:
            raise KeyError(qualified)
        scope = found
    if parameter:
        arguments = scope.args
        for arg in [
            *arguments.posonlyargs,
            *arguments.args,
            *arguments.kwonlyargs,
            arguments.vararg,
            arguments.kwarg,
        ]:
            if arg is not None and arg.arg == parameter:
                return arg.lineno - 1, arg.col_offset, parameter
        raise KeyError(qualified)
    line = lines[scope.lineno - 1]
    match = re.compile(r"(?:class|def)\s+").search(line, scope.col_offset)
    assert match is not None, (qualified, line)
    return scope.lineno - 1, match.end(), parts[-1]


def _assigned(scope: Any, lines: list[str], name: str) -> tuple[int, int]:
    for node in scope.body:
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign)
            else []
        )
        for target in targets:
            for each in ast.walk(target):
                if isinstance(each, ast.Name) and each.id == name:
                    return each.lineno - 1, each.col_offset
    for node in ast.walk(scope):
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign)
            else []
        )
        for target in targets:
            for each in ast.walk(target):
                if isinstance(each, ast.Attribute) and each.attr == name:
                    return each.end_lineno - 1, each.end_col_offset - len(name)  # type: ignore[operator]
    raise KeyError(name)


def symbols(script: str) -> None:
    """Applies symbols.tsv."""
    server = LanguageServer(script)
    edits: dict[Path, dict[tuple[int, int, int, int], str]] = defaultdict(dict)
    problems = []
    trees: dict[Path, tuple[ast.Module, str]] = {}
    opened = set()
    for file in sources():  # pyright looks for references in what it knows
        text = file.read_text("utf-8")
        trees[file] = ast.parse(text), text
        server.notify(
            "textDocument/didOpen",
            {"textDocument": {"uri": file.as_uri(), "languageId": "python", "version": 1, "text": text}},
        )
        opened.add(file)
    table = rows("symbols.tsv")
    for number, (module, qualified, new) in enumerate(table):
        file = file_of(module)
        try:
            tree, text = trees[file]
            line, column, old = position(tree, text, qualified)
        except KeyError:
            problems.append(f"not found: {module} {qualified}")
            continue
        if old == new:
            continue
        answer = server.request(
            "textDocument/rename",
            {
                "textDocument": {"uri": file.as_uri()},
                "position": {"line": line, "character": column},
                "newName": new,
            },
        )
        result = answer.get("result")
        if not result:
            problems.append(f"no answer: {module} {qualified} {answer.get('error')}")
            continue
        count = 0
        for change in result["documentChanges"]:
            if "textDocument" not in change:
                continue
            where = Path(unquote(urlparse(change["textDocument"]["uri"]).path))
            for edit in change["edits"]:
                start, end = edit["range"]["start"], edit["range"]["end"]
                key = (start["line"], start["character"], end["line"], end["character"])
                before = edits[where].get(key)
                if before is not None and before != edit["newText"]:
                    problems.append(
                        f"conflict at {where}:{key}: {before} and {edit['newText']} ({qualified})"
                    )
                    continue
                edits[where][key] = edit["newText"]
                count += 1
        print(f"{number + 1}/{len(table)} {module} {qualified} -> {new}: {count}", flush=True)
        parts = qualified.split(".")
        if len(parts) == 2 and ":" not in qualified:
            _slots(file, tree, parts[0], parts[1], new, edits[file])
    server.close()
    for where, found in edits.items():
        lines = where.read_text("utf-8").split("\n")
        for (line, start, end_line, end), new in sorted(found.items(), reverse=True):
            assert line == end_line
            lines[line] = lines[line][:start] + new + lines[line][end:]
        where.write_text("\n".join(lines), "utf-8")
    _prose(table)
    print("\n".join(problems))


def _slots(file: Path, tree: ast.Module, name: str, old: str, new: str, found: dict[Any, str]) -> None:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            for each in node.body:
                if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "__slots__":
                    for constant in ast.walk(each.value):
                        if isinstance(constant, ast.Constant) and constant.value == old:
                            line = constant.lineno - 1
                            found[line, constant.col_offset + 1, line, constant.col_offset + 1 + len(old)] = (
                                new
                            )


def _prose(table: list[list[str]]) -> None:
    """Renames in comments and docstrings: `Class.member`, and class names that are no English word."""
    classes = {
        qualified: new
        for _, qualified, new in table
        if "." not in qualified and qualified.lstrip("_")[:1].isupper()
    }
    members: dict[str, str] = {}
    for _, qualified, new in table:
        if "." in qualified and ":" not in qualified:
            owner, _, name = qualified.partition(".")
            members[f"{owner}.{name}"] = f"{classes.get(owner, owner)}.{new}"
    humps = {
        old: new for old, new in classes.items() if len(re.findall("[A-Z]", old)) > 1 and not old.isupper()
    }
    words = {**humps, **members}
    if not words:
        return
    pattern = re.compile(
        r"(?<![\w.])(" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + r")(?!\w)"
    )
    for file in sources():
        text = file.read_text("utf-8")
        lines = text.splitlines(keepends=True)
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and '"""' in token.string):
                for number in range(token.start[0] - 1, token.end[0]):
                    lines[number] = pattern.sub(lambda match: words[match[0]], lines[number])
        file.write_text("".join(lines), "utf-8")


# -- modules


def modules() -> None:
    """Applies modules.tsv."""
    table = dict(rows("modules.tsv"))
    for file in [*sources()]:
        file.write_text(_imports(file.read_text("utf-8"), table, file), "utf-8")
    paths = {old.replace(".", "/") + ".py": _target(new) for old, new in table.items()}
    paths |= {
        old.removeprefix("fusecache/"): new
        for old, new in paths.items()
        if old.startswith("fusecache/mount/")
    }
    dotted = {old: new for old, new in table.items() if old.count(".") > 1}
    words = {**dotted, **paths}
    pattern = re.compile(
        r"(?<![\w./])(" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + r")(?![\w])"
    )
    texts = [
        *sources(),
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "scripts").glob("*"),
        ROOT / "setup.cfg",
    ]
    for file in texts:
        if file.is_file():
            text = file.read_text("utf-8")
            changed = pattern.sub(lambda match: words[match[0]], text)
            if changed != text:
                file.write_text(changed, "utf-8")
    for old, new in table.items():
        source = ROOT / (old.replace(".", "/") + ".py")
        target = ROOT / _target(new)
        target.parent.mkdir(parents=True, exist_ok=True)
        if (target.parent / "__init__.py").exists() is False:
            (target.parent / "__init__.py").write_text("", "utf-8")
        temporary = source.with_suffix(".moving")
        subprocess.run(["git", "mv", source, temporary], check=True, cwd=ROOT)
    for old, new in table.items():
        temporary = (ROOT / (old.replace(".", "/") + ".py")).with_suffix(".moving")
        subprocess.run(["git", "mv", temporary, ROOT / _target(new)], check=True, cwd=ROOT)


def _target(module: str) -> str:
    path = module.replace(".", "/") + ".py"
    return f"mount/{path}" if module.startswith("fusecache_mount") else path


def _imports(text: str, table: dict[str, str], file: Path) -> str:
    tree = ast.parse(text)
    lines = text.splitlines(keepends=True)
    changes: list[tuple[int, int, str]] = []
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name in table for alias in node.names):
            raise SystemExit(f"{file}:{node.lineno}: write it as from ... import")
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        groups: dict[str, list[str]] = defaultdict(list)
        touched = False
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            if whole in table:
                package, _, leaf = table[whole].rpartition(".")
                touched = True
                if alias.asname:
                    groups[package].append(f"{leaf} as {alias.asname}")
                else:
                    groups[package].append(leaf)
                    if leaf != alias.name:
                        names[alias.name] = leaf
            else:
                target = table.get(node.module, node.module)
                touched = touched or target != node.module
                groups[target].append(alias.name + (f" as {alias.asname}" if alias.asname else ""))
        if touched:
            indent = " " * node.col_offset
            new = "".join(
                f"{indent}from {module} import {', '.join(found)}\n" for module, found in groups.items()
            )
            changes.append((node.lineno, node.end_lineno or node.lineno, new))
    uses = [each for each in ast.walk(tree) if isinstance(each, ast.Name) and each.id in names]
    for each in sorted(uses, key=lambda node: (-node.lineno, -node.col_offset)):
        line = lines[each.lineno - 1].encode()
        done = (
            line[: each.col_offset]
            + names[each.id].encode()
            + line[each.col_offset + len(each.id.encode()) :]
        )
        lines[each.lineno - 1] = done.decode()
    for first, last, new in sorted(changes, reverse=True):
        lines[first - 1 : last] = [new]
    return "".join(lines)


if __name__ == "__main__":
    {"reexports": reexports, "symbols": symbols, "modules": modules}[sys.argv[1]](*sys.argv[2:])
