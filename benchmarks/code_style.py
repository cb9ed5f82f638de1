"""How dense code is, beside that of other projects: a row of figures for each folder.

    python benchmarks/code_style.py [FOLDER ...] [--output=benchmarks/results/code_style.json]

Without a folder it is this repository. Tests, benchmarks and what lies in hidden folders are left
out. "Of code" are lines that are neither blank nor of a comment or docstring alone.

lines          all of them, and those of code
over 100, 120  share of all lines that have more columns, in percent
f-strings      for each 1,000 lines of code; what follows the colon in {share:.2f} is one more
conditionals   `a if b else c`, for each 1,000 lines of code
nested         comprehensions inside of one, or with two loops, for each 1,000 lines of code
typed          share of the arguments that have a type, in percent, without self and cls
"""

import argparse
import ast
import io
import json
import os
import tokenize
from collections import Counter
from collections.abc import Iterator

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LEFT_OUT = ('tests', 'benchmarks')
NO_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('folders', nargs='*', default=[ROOT])
    parser.add_argument('--output')
    options = parser.parse_args()
    report = {}
    for folder in options.folders:
        path = os.path.abspath(folder)
        name = 'this repository' if path == ROOT else os.path.basename(path)
        report[name] = measures(sum((counts(text) for text in sources(folder)), Counter()))
        shown = ', '.join(f'{measure} {value:,}' for measure, value in report[name].items())
        print(f'{name}: {shown}')
    if options.output:
        with open(options.output, 'w') as file:
            json.dump(report, file, indent=1)


def sources(folder: str) -> Iterator[str]:
    """Yields the text of each Python file of the product."""
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in LEFT_OUT and name[0] != '.']
        for name in names:
            if name.endswith('.py'):
                with open(os.path.join(path, name)) as file:
                    yield file.read()


def counts(text: str) -> Counter:
    """Counts in a Python file what `measures` makes shares of."""
    tree = ast.parse(text)
    rows = text.splitlines()
    found = Counter(lines=len(rows), code_lines=len(_code_lines(text) - _docstring_lines(tree)))
    for limit in (100, 120):
        found[f'over_{limit}'] = sum(len(row) > limit for row in rows)
    for node in ast.walk(tree):
        found['f_strings'] += isinstance(node, ast.JoinedStr)
        found['conditionals'] += isinstance(node, ast.IfExp)
        found['nested'] += isinstance(node, COMPREHENSIONS) and _is_nested(node)
        if isinstance(node, FUNCTIONS):
            arguments = _arguments(node)
            found['arguments'] += len(arguments)
            found['typed'] += sum(argument.annotation is not None for argument in arguments)
    return found


def measures(found: Counter) -> dict[str, float]:
    """Returns the figures of the table."""
    report = {'lines': found['lines'], 'code_lines': found['code_lines']}
    for key in ('over_100', 'over_120'):
        report[key] = round(100 * found[key] / max(1, found['lines']), 1)
    for key in ('f_strings', 'conditionals', 'nested'):
        report[key] = round(1000 * found[key] / max(1, found['code_lines']), 1)
    report['typed'] = round(100 * found['typed'] / max(1, found['arguments']), 1)
    return report


def _code_lines(text: str) -> set[int]:
    numbers = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            numbers.update(range(token.start[0], token.end[0] + 1))
    return numbers


def _docstring_lines(tree: ast.Module) -> set[int]:
    numbers = set()
    for node in ast.walk(tree):
        if isinstance(node, WITH_DOCSTRING) and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            numbers.update(range(docstring.lineno, docstring.end_lineno + 1))
    return numbers


def _is_nested(node: ast.expr) -> bool:
    inside = [part for part in ast.walk(node) if part is not node]
    return len(node.generators) > 1 or any(isinstance(part, COMPREHENSIONS) for part in inside)


def _arguments(node: ast.FunctionDef) -> list[ast.arg]:
    arguments = node.args
    found = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    found += [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    return [argument for argument in found if argument.arg not in ('self', 'cls')]


if __name__ == '__main__':
    main()
