"""Pages of the site that come from the code: commands, recipe keys, the Python API, decisions, and files of the root.

MkDocs calls `on_files` and `on_page_markdown` (`hooks` in mkdocs.yml). Python sources are read and not imported, except
for the command line, which imports nothing large. So a build takes seconds.
"""

import ast
import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SECTIONS = re.compile(r"^(Args|Returns|Raises|Yields|Example):$", re.MULTILINE)
ENTRY = re.compile(r"^([\w`*][\w`*./, -]*?): (.*)", re.DOTALL)
TITLED = re.compile(r"^(?=[A-Z][A-Za-z, ]+$)", re.MULTILINE)  # the titles in the docstring of patchloom
COMMAND = r"(?:\w+=\S+ )*(?:patchloom|make|python|pip|export|mlflow|serve|ray) "
SHELL = re.compile(rf"^```\n(?=(?:# .*\n)*{COMMAND})(.*?)```$", re.MULTILINE | re.DOTALL)
COMMENTED = re.compile(rf"^({COMMAND}.*?\S) +# (.*)$", re.MULTILINE)
COMMENT_ABOVE = r"# \2\n\1"
# classes that are described as a whole: their members are many, and those of torch and pydantic
WHOLE = ("Denoiser", "Recipe")
Node = ast.FunctionDef | ast.ClassDef


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to those of the folder."""
    from mkdocs.structure.files import File

    pages = {
        "reference/commands.md": commands_page(),
        "reference/recipe-keys.md": recipe_keys_page(),
        "reference/python.md": python_page(),
        "reference/method.md": method_page(),
        "decisions.md": decisions_page(),
        "contributing.md": root_page("CONTRIBUTING.md"),
        "changelog.md": root_page("CHANGELOG.md"),
        "emoji.md": example_page("emoji"),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Blocks of commands get the colours of a shell, and short lines: a comment is above its command."""
    return SHELL.sub(lambda found: f"```sh\n{COMMENTED.sub(COMMENT_ABOVE, found[1])}```", markdown)


def on_post_build(config: Any) -> None:
    """The index of the search as a script, which pages load that are opened without a server."""
    folder = Path(config["site_dir"]) / "search"
    (folder / "search_index.js").write_text(f"var __index = {(folder / 'search_index.json').read_text()}")


def root_page(name: str) -> str:
    """A file of the root, with its links to docs/ as links of the site."""
    return re.sub(r"\]\(docs/", "](", (ROOT / name).read_text())


def example_page(name: str) -> str:
    """The README of an example, with its links as links of the site; its files are shown at the end."""
    folder = ROOT / "examples" / name
    text = re.sub(r"\]\(\.\./\.\./docs/", "](", (folder / "README.md").read_text())
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".py", ".yaml")]
    for path in files:
        text = text.replace(f"]({path.name})", f"](#{path.name.replace('.', '')})")
        language = {".py": "python", ".yaml": "yaml"}[path.suffix]
        text += f"\n## {path.name}\n\n```{language}\n{path.read_text()}```\n"
    return text


def decisions_page() -> str:
    """A list of all decisions."""
    lines = ["# Decisions", "", "Why things are as they are, half a page each.", ""]
    for path in sorted((ROOT / "docs" / "decisions").glob("*.md")):
        lines.append(f"- [{path.read_text().splitlines()[0].lstrip('# ')}](decisions/{path.name})")
    return "\n".join(lines) + "\n"


# the Python API


@dataclass(frozen=True)
class Definition:
    """A function or class, and where it is: `module` is the dotted name of its file."""

    module: str
    path: Path
    node: Node

    @property
    def source(self) -> str:
        """Its lines, with decorators."""
        first = min([self.node.lineno, *(each.lineno for each in self.node.decorator_list)])
        return textwrap.dedent("\n".join(self.path.read_text().splitlines()[first - 1 : self.node.end_lineno]))

    @property
    def place(self) -> str:
        """`models/patches.py, line 90`."""
        return f"{self.path.relative_to(ROOT)}, line {self.node.lineno}"

    def methods(self) -> list[ast.FunctionDef]:
        """Public methods with a docstring, in the order of the source."""
        body = self.node.body if isinstance(self.node, ast.ClassDef) else []
        return [each for each in body if isinstance(each, ast.FunctionDef) and is_public(each)]


def is_public(node: ast.FunctionDef) -> bool:
    """Whether a method is shown: it has a docstring, and no underscore but that of a call."""
    return (not node.name.startswith("_") or node.name == "__call__") and ast.get_docstring(node) is not None


def find_definition(module: str, name: str) -> Definition:
    """Where a name of a module of patchloom is defined; follows imports from other modules."""
    path = file_of(module)
    body = ast.parse(path.read_text()).body
    for node in [*body, *(inner for each in body if isinstance(each, ast.If) for inner in each.body)]:
        if isinstance(node, Node) and node.name == name:
            return Definition(module, path, node)
        if isinstance(node, ast.ImportFrom) and node.module and name in {each.name for each in node.names}:
            return find_definition(node.module, name)
    raise ValueError(f"{module} has no {name}")


def file_of(module: str) -> Path:
    """The file of a dotted name; the folders of patchloom are links to those of the root."""
    inside = ROOT.joinpath(*module.split("."))
    path = next(each for each in (inside.with_suffix(".py"), inside / "__init__.py") if each.is_file())
    return path if path.parent.name == "patchloom" else path.resolve()


def api_entry(definition: Definition, anchor: str, has_source: bool = False, is_whole: bool = False) -> list[str]:
    """A heading, the signature and the docstring of a function, or of a class with its methods."""
    node = definition.node
    lines = [f"### {node.name} {{#{anchor}}}", "", "```python", signature(node), "```", "", *docstring(node)]
    for method in [] if is_whole else definition.methods():
        shown = method.name.replace("__", r"\_\_")
        # `__call__` in an anchor would be read as emphasis, and the anchor would be part of the heading
        lines += [f"#### {node.name}.{shown} {{#{anchor}.{method.name.strip('_')}}}", ""]
        lines += ["```python", signature(method), "```", "", *docstring(method)]
    if has_source:
        source = textwrap.indent(f"```python\n{definition.source}\n```", "    ")
        lines += [f'??? quote "{definition.place}"', "", source, ""]
    return lines


def signature(node: Node) -> str:
    """The line of the definition; a class has that of its constructor, or its fields."""
    if isinstance(node, ast.FunctionDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        arguments = split_arguments(node.args)
        line = f"{node.name}({', '.join(arguments)}){returns}"
        return (
            line
            if len(line) < 88
            else f"{node.name}(\n" + "".join(f"    {one},\n" for one in arguments) + f"){returns}"
        )
    made = next((each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"), None)
    if made is not None:
        return signature(made).replace("__init__", f"class {node.name}", 1).removesuffix(" -> None")
    fields = [ast.unparse(each) for each in node.body if isinstance(each, ast.AnnAssign)]
    bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
    return "\n".join([f"class {node.name}{bases}", *(f"    {field}" for field in fields)])


def split_arguments(arguments: ast.arguments) -> list[str]:
    """The arguments of a function as text, one each, without `self` and `cls`."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + [*arguments.defaults]
    shown = [argument(each, default) for each, default in zip(positional, defaults, strict=True)]
    if arguments.vararg:
        shown.append(f"*{argument(arguments.vararg, None)}")
    elif arguments.kwonlyargs:
        shown.append("*")
    shown += [argument(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        shown.append(f"**{argument(arguments.kwarg, None)}")
    return [each for each in shown if each not in ("self", "cls")]


def argument(one: ast.arg, default: ast.expr | None) -> str:
    """`steps: int = 18`."""
    kind = f": {ast.unparse(one.annotation)}" if one.annotation else ""
    equals = " = " if kind else "="
    return f"{one.arg}{kind}{equals + ast.unparse(default) if default else ''}"


def docstring(node: Node) -> list[str]:
    """A docstring in Markdown: lists of arguments and errors, and the example as code."""
    parts = SECTIONS.split(ast.get_docstring(node) or "")
    lines = [prose(parts[0]), ""]
    for title, text in zip(parts[1::2], parts[2::2], strict=True):
        inside = textwrap.dedent(text.strip("\n"))
        if title == "Example":
            lines += ["**Example**", "", f"```python\n{inside.rstrip()}\n```", ""]
        elif title in ("Args", "Raises"):
            lines += [f"**{ {'Args': 'Arguments'}.get(title, title) }**", "", *entries(inside), ""]
        else:
            lines += [f"**{title}**", "", prose(inside), ""]
    return lines


def entries(text: str) -> Iterator[str]:
    """`name: meaning` of a section, with continued lines, as items of a list."""
    for entry in re.split(r"\n(?=\S)", text):
        found = ENTRY.match(" ".join(entry.split()))
        yield f"- `{found[1].strip('`')}`: {prose(found[2])}" if found else f"- {prose(entry)}"


def prose(text: str) -> str:
    """Text of a docstring in Markdown: equations keep their characters, and indented blocks are code."""
    text = re.sub(r"(?<![`\w])\*(?=[\w(])|(?<=\w)\*(?=\w)", r"\*", text)
    return re.sub(r"<(?=\w)", "&lt;", text).strip()


def python_page() -> str:
    """The public names of `patchloom`, by the titles in its docstring."""
    import patchloom

    lines = [
        "# Python API",
        "",
        "`import patchloom` is fast: torch, Ray, MLflow and pydantic are imported when a function first needs them.",
        "A test runs the example of each function. [The method](method.md) has the functions below these.",
        "",
    ]
    rest = {*patchloom.__all__, *WHOLE}
    for block in TITLED.split(patchloom.__doc__ or "")[1:]:
        title, _, text = block.partition("\n")
        names = [name for name in dict.fromkeys(re.findall(r"\w+", text)) if name in rest]
        rest -= set(names)
        lines += [f"## {title}", ""] if names else []
        for name in names:
            lines += api_entry(find_definition("patchloom", name), f"patchloom.{name}", is_whole=name in WHOLE)
    assert not rest, f"the docstring of patchloom has no title for {sorted(rest)}"
    return "\n".join(lines)


def mapped_names() -> list[str]:
    """The dotted names that the map of the paper links to, each once."""
    text = (ROOT / "docs" / "paper-map.md").read_text()
    return list(dict.fromkeys(re.findall(r"method\.md#(patchloom\.models\.[\w.]+)", text)))


def method_page() -> str:
    """The functions that the map of the paper links to, with their source."""
    modules: dict[str, list[str]] = {}
    for name in mapped_names():
        modules.setdefault(".".join(name.split(".")[:3]), []).append(name.split(".")[3])
    lines = [
        "# The method",
        "",
        "The functions behind [the paper's equations](../paper-map.md), with their source.",
        "",
    ]
    for module, names in modules.items():
        lines += [f"## {module}", ""]
        for name in dict.fromkeys(names):  # a method is shown with its class
            lines += api_entry(find_definition(module, name), f"{module}.{name}", has_source=True)
    return "\n".join(lines)


# the command line


def commands_page() -> str:
    """All commands with their arguments and options, from the parsers of the command line."""
    import typer

    from patchloom.pipelines.cli.app import app

    lines = [
        "# Commands",
        "",
        "Made from the parsers of the command line; `patchloom COMMAND --help` prints the same.",
        "",
        "Exit codes: 0 done; 2 a mistake that you can fix (one line says what was found and what to do); 1 a failure "
        "of Patchloom; 130 and 143 stopped by Ctrl-C or SIGTERM.",
        "",
    ]
    for path, command in leaves(typer.main.get_command(app), "patchloom"):
        lines += command_section(path, command)
    return "\n".join(lines) + "\n"


def leaves(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every command below a group with its full name, in the order of the help."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from leaves(command, f"{path} {name}")
        elif not command.hidden:
            yield f"{path} {name}", command


def command_section(path: str, command: Any) -> list[str]:
    """A heading, the help, the usage, an example, and a table of options."""
    context = command.make_context(path, [], resilient_parsing=True)
    usage = " ".join(command.collect_usage_pieces(context))
    lines = [f"## {path}", "", plain(command.help or ""), "", "```text", f"{path} {usage}", "```", ""]
    if command.epilog:
        lines += ["```sh", command.epilog.removeprefix("Example: "), "```", ""]
    records = [
        parameter.get_help_record(context)
        for parameter in command.get_params(context)
        if "--help" not in parameter.opts
    ]
    rows = [f"| <code>{plain(name)}</code> | {plain(meaning)} |" for name, meaning in filter(None, records)]
    return [*lines, "| option | meaning |", "|---|---|", *rows, ""] if rows else lines


def plain(text: str) -> str:
    """Text in one line, with the characters that Markdown and HTML use escaped."""
    escaped = {"&": "&amp;", "<": "&lt;", "|": "&#124;", "*": "&#42;", "[": "&#91;", "_": "&#95;", "`": "&#96;"}
    return "".join(escaped.get(one, one) for one in " ".join(text.replace("\b", "").split()))


# recipes


def recipe_keys_page() -> str:
    """The keys of recipes with their default and meaning, from the published schema."""
    schema = json.loads((ROOT / "tune_configs" / "recipe.schema.json").read_text())
    lines = [
        "# Recipe keys",
        "",
        "Made from `tune_configs/recipe.schema.json`, with which editors complete keys. `--set KEY=VALUE` overrides "
        "one. Keys of the entry of a list have its number, from 0: `ema.0.halflife_images`.",
        "",
        "| key | default | values | meaning |",
        "|---|---|---|---|",
    ]
    return "\n".join([*lines, *recipe_rows(schema, schema, "")]) + "\n"


def recipe_rows(schema: dict[str, Any], node: dict[str, Any], prefix: str) -> Iterator[str]:
    """A row for every key below a node of the schema."""
    for name, value in node.get("properties", {}).items():
        sections = re.findall(r'"#/\$defs/(\w+)"', json.dumps(value))
        if not sections:
            default = f"`{json.dumps(value['default'], ensure_ascii=False)}`" if "default" in value else "required"
            yield f"| `{prefix}{name}` | {default} | {allowed(value)} | {plain(value.get('description', ''))} |"
        for section in dict.fromkeys(sections):
            number = "0." if "array" in json.dumps(value) else ""
            yield from recipe_rows(schema, schema["$defs"][section], f"{prefix}{name}.{number}")


def allowed(value: dict[str, Any]) -> str:
    """The values that a key accepts: a list of names, or a type with its bounds."""
    kinds: Sequence[dict[str, Any]] = [each for each in value.get("anyOf", [value]) if each.get("type") != "null"]
    shown = []
    for kind in kinds:
        if "enum" in kind:
            shown.append(", ".join(f"`{each}`" for each in kind["enum"]))
            continue
        signs = {"minimum": "≥", "exclusiveMinimum": "&gt;", "maximum": "≤", "exclusiveMaximum": "&lt;"}
        bounds = [f"{sign} {kind[key]}" for key, sign in signs.items() if key in kind]
        shown.append(" ".join([str(kind.get("type", "")), ", ".join(bounds)]).strip())
    return "; ".join(filter(None, shown))
